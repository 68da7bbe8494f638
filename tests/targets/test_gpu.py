import ctypes
from types import SimpleNamespace

import pytest

from llmc.targets import GpuTarget, cuda, gpu, listing, metal, parse, rocm, toolchains


@pytest.fixture(autouse=True)
def linux(monkeypatch):
    monkeypatch.setattr(gpu.platform, "system", lambda: "Linux")
    monkeypatch.setattr(gpu.platform, "machine", lambda: "x86_64")


def names(targets):
    return [t.name for t in targets]


def test_a_bare_name_is_the_same_set_everywhere():
    assert names(parse("cuda")) == ["cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90"]
    assert names(parse("rocm")) == ["rocm:gfx942", "rocm:gfx1100"]
    assert names(parse("metal")) == ["metal"]
    assert names(parse("cuda:sm_90, rocm:gfx942,metal,cuda:sm_90")) == ["cuda:sm_90", "rocm:gfx942", "metal"]


@pytest.mark.parametrize("name", [f"cuda:{a}" for a in cuda.ARCHITECTURES] + [f"rocm:{a}" for a in rocm.ARCHITECTURES])
def test_facts_are_whole(name):
    [target] = parse(name)
    assert isinstance(target, GpuTarget) and target.name == name and target.arch == name.partition(":")[2]
    assert target.language == {"cuda": "cuda", "rocm": "amdgpu"}[target.kind]
    # a block fits, with registers for each of its threads
    assert target.shared_bytes <= target.shared_dynamic_bytes <= target.shared_per_multiprocessor
    assert target.max_threads <= target.threads_per_multiprocessor
    assert target.registers // target.max_threads >= 64 and target.max_threads % target.warp == 0
    # between what one needs to be fed and what none has: FLOP per byte
    assert 50 < target.peak / target.bandwidth < 500
    assert not target.keys_token_last


def test_facts_for_tvm():
    [target] = parse("rocm:gfx1100")
    assert target.tvm() == {
        "kind": "rocm",
        "mcpu": "gfx1100",
        "mattr": ["+cumode"],
        "max_num_threads": 256,
        "max_threads_per_block": 256,
        "max_shared_memory_per_block": 65536,
        "thread_warp_size": 32,
    }
    assert target.host_tvm() == {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"}
    assert parse("cuda:sm_90")[0].tvm()["arch"] == "sm_90" and "arch" not in parse("metal")[0].tvm()


def test_hosts():
    assert [t.host for t in parse("cuda:sm_90,metal")] == ["linux-x86_64", "macos-arm64"]
    assert [t.host for t in parse("cuda:sm_90,metal", "linux-aarch64")] == ["linux-aarch64", "macos-arm64"]
    with pytest.raises(ValueError, match="unknown host 'beos': expected one of linux-x86_64, linux-aarch64, macos"):
        parse("cuda", "beos")
    with pytest.raises(ValueError, match="host 'macos-arm64' can't run cuda: expected linux-x86_64 or linux-aarch64"):
        parse("cuda:sm_90", "macos-arm64")
    with pytest.raises(ValueError, match="host 'linux-x86_64' can't run metal: expected macos-arm64"):
        parse("metal", "linux-x86_64")


def test_a_mac_names_the_host_of_others(monkeypatch):
    monkeypatch.setattr(gpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(gpu.platform, "machine", lambda: "arm64")
    assert metal.runs_here()
    with pytest.raises(ValueError, match=r"this machine \(macos-arm64\) can't run rocm: expected .*give it as --host"):
        parse("rocm")


def test_unknown_architectures_name_those_there_are():
    with pytest.raises(ValueError, match=r"unknown architecture cuda:sm_75: expected cuda, cuda:native, .*sm_120"):
        parse("cuda:sm_75")
    with pytest.raises(ValueError, match=r"unknown architecture rocm:gfx906: .*rocm:gfx90a, rocm:gfx942"):
        parse("rocm:gfx906")
    with pytest.raises(ValueError, match="unknown architecture metal:m4: expected metal, the one build"):
        parse("metal:m4")


def driver(capability, version=13020):
    """A libcuda of a machine with one card."""

    def set_to(pointer, value):
        pointer._obj.value = value
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDriverGetVersion=lambda p: set_to(p, version),
        cuDeviceGet=lambda p, index: set_to(p, index),
        cuDeviceGetAttribute=lambda p, which, device: set_to(p, capability[which - 75]),
    )


def test_native_is_this_machines_card(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver((9, 0)))
    assert names(parse("cuda:native")) == ["cuda:sm_90"] and cuda.card() == ((9, 0), 13020)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver((8, 7)))
    assert names(parse("cuda:native")) == ["cuda:sm_86"]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver((7, 5)))
    with pytest.raises(ValueError, match="this machine's card is sm_75: expected one that runs sm_80"):
        parse("cuda:native")


def test_native_without_a_card(monkeypatch, tmp_path):
    def none(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(ValueError, match="no NVIDIA driver with a card was found: name the architecture"):
        parse("cuda:native")
    monkeypatch.setattr(rocm, "card", lambda: None)
    with pytest.raises(ValueError, match=r"Linux's driver \(kfd\) names none: name the architecture, e.g. rocm:gfx90a"):
        parse("rocm:native")
    monkeypatch.setattr(rocm, "card", lambda: "gfx906")
    with pytest.raises(ValueError, match="this machine's card is gfx906: expected one of rocm:gfx90a"):
        parse("rocm:native")


@pytest.mark.parametrize(("version", "name"), [(90402, "gfx942"), (90010, "gfx90a"), (110000, "gfx1100")])
def test_linux_names_amds_cards(tmp_path, version, name):
    for node, number in (("0", 0), ("1", version)):  # node 0 is the CPU
        (tmp_path / node).mkdir()
        (tmp_path / node / "properties").write_text(f"cpu_cores_count 8\ngfx_target_version {number}\n")
    assert rocm.card(tmp_path) == name
    assert rocm.card(tmp_path / "none") is None


def test_listing_tells_what_runs_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(toolchains, "missing", lambda kind: [toolchains.NVRTC] if kind == "cuda" else [])
    monkeypatch.setattr(cuda, "card", lambda: cuda.Card((8, 9), 12040))
    monkeypatch.setattr(rocm, "card", lambda: "gfx1100")
    facts = {fact.name: fact for fact in listing()}
    assert facts["cuda"].status == "no tools" and "NVRTC not found: pip install 'llmc[cuda]'" in facts["cuda"].about
    assert "this machine's card is sm_89, its driver has CUDA 12.4 and 13.0 is needed" in facts["cuda"].about
    assert facts["rocm:gfx1100"].status == "runs here" and facts["rocm:gfx942"].status == "compiles"
    assert facts["metal"].status == "compiles" and "macos-arm64" in facts["metal"].about
    monkeypatch.setattr(cuda, "card", lambda: cuda.Card((8, 9), 13000))
    runs = [fact.name for fact in listing() if fact.status == "runs here" and fact.name.startswith("cuda")]
    assert runs == ["cuda", "cuda:sm_80", "cuda:sm_86", "cuda:sm_89"]


def test_toolchains_are_found_by_their_files():
    absent = toolchains.Toolchain("x", "cuda", ("email", "no_such.module"), (("email", "charset.py"), ("email", "no")))
    assert absent.missing() == ["no_such.module", "email/no"] and not absent.found
    assert absent.advice == "pip install 'llmc[cuda]'"
    assert toolchains.locate("email", "charset.py").is_file() and toolchains.locate("no_such", "x") is None
