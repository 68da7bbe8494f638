"""What this machine's drivers tell, and why a target can't run here."""

import pytest

from llmc.runtime.artifact import TargetEntry
from llmc.runtime.devices import drivers
from llmc.runtime.devices.drivers import Card, cards, obstacle, runs


def entry(name):
    return TargetEntry(name, name.partition(":")[0], "linux-x86_64", (), "lib/x.so", "", (), {})


def test_no_card():
    assert obstacle(entry("cuda:sm_90"), []) == "cuda:sm_90 needs an NVIDIA card, found none (or no driver for it)"
    assert "needs an AMD card" in obstacle(entry("rocm:gfx942"), [])
    assert "needs an Apple GPU" in obstacle(entry("metal"), [])


def test_a_driver_that_is_too_old():
    why = obstacle(entry("cuda:sm_90"), [Card("sm_90", 12040)])
    assert "needs a driver for CUDA 13.0, which is NVIDIA driver 580 or later, found one for CUDA 12.4" in why


def test_another_architecture():
    assert obstacle(entry("cuda:sm_90"), [Card("sm_86", 13000)]) == "cuda:sm_90 is machine code for sm_90, found sm_86"
    assert obstacle(entry("rocm:gfx942"), [Card("gfx1100"), Card("gfx942")]) is None
    assert obstacle(entry("metal"), [Card("")]) is None


@pytest.mark.parametrize(
    "arch, card, expected",
    [
        ("sm_80", "sm_80", True),
        ("sm_80", "sm_89", True),  # the same major number, a later minor one
        ("sm_89", "sm_86", False),
        ("sm_90", "sm_100", False),
        ("sm_100", "sm_100", True),
        ("sm_90a", "sm_90", False),
        ("gfx942", "gfx90a", False),
        ("compute_80", "sm_120", True),
        ("compute_80", "sm_75", False),
        ("compute_80", "gfx942", False),
    ],
)
def test_what_a_card_runs(arch, card, expected):
    assert runs(arch, card) is expected


def test_the_kernels_list_of_amd_cards(tmp_path):
    for number, version in enumerate((0, 90402, 110000, 90010)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
    assert [c.arch for c in drivers._rocm(tmp_path)] == ["gfx942", "gfx1100", "gfx90a"]


def test_this_machine_is_asked():
    assert all(isinstance(cards(kind), tuple) for kind in ("cuda", "rocm", "metal"))
