"""The runtime of AMD's cards, on a stand-in for HIP's library: in processes without the compiler."""

import os
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmc.runtime import hip
from llmc.runtime.errors import ArtifactError
from llmc.runtime.hip import build
from tests.runtime.hip import card


@pytest.fixture
def scene(files, isolated):
    """scene(name, **environment) -> what it returned, and the calls of HIP; TVM's compiler is never imported."""

    def play(name, **environment):
        found, calls, compiler = isolated(_run, name, files, environment)
        assert not compiler
        return found, calls

    return play


def _run(name, files, environment):
    return card.run(name, files, **environment)


def test_a_card_tells_about_itself(scene):
    [facts, others], _ = scene("facts")
    # In the order of TVM's DeviceAttrKind; an attribute's value is 1000 more than HIP's number for it.
    assert facts[:5] == [1, 1056, 1087, 1074, "1023.1061"]
    assert facts[5:11] == ["a stand-in", 1005, 1063, "[1026, 1027, 1028]", 1071, "gfx942"]
    assert facts[11:] == [60443484, 60443485, 1019, 4 << 30, 3 << 30]
    assert others == [1, 0]


def test_a_kernel_is_launched_with_its_grid_block_and_arguments(scene):
    found, calls = scene("launch")
    assert found == (True, "hip")
    launches = [c for c in calls if "Launch" in c]
    assert launches == ["hipModuleLaunchKernel scale_kernel grid 2 3 1 block 128 1 1 shared 0, 40 bytes on 0"] * 2
    assert sum("hipModuleLoadData" in c for c in calls) == sum("GetFunction" in c for c in calls) == 1
    assert "hipMemcpy 2400 kind 1 on 0" in calls and "hipMemcpy 2400 kind 2 on 0" in calls
    assert calls[-1] == "hipModuleUnload on 0" and "hipFree, 0 left" in calls


def test_an_empty_grid_is_no_launch(scene):
    found, calls = scene("empty_grid")
    assert found is None and not any("Launch" in c for c in calls)


def test_streams_wait_for_one_another(scene):
    (before, after), calls = scene("streams")
    assert (before, after) == ([[0, 0, 0, 0]], [[0, 2, 4, 6]])
    assert calls.count("hipStreamCreateWithFlags 1 on 0") == calls.count("hipStreamDestroy") == 2
    assert calls.count("hipEventCreateWithFlags 2 on 0") == calls.count("hipEventDestroy") == 1


def test_copies_between_cards(scene):
    found, calls = scene("two_cards")
    assert found is True and "hipMemcpyPeerAsync 32 from 0 to 1" in calls


def test_threads_launch_side_by_side(scene):
    found, calls = scene("many_threads")
    assert found == [64.0 * i for i in range(8)]
    assert sum("hipModuleLoadData" in c for c in calls) == 1


def test_scratch_is_kept_for_the_next_call(scene):
    found, calls = scene("workspace")
    assert found is True
    assert calls.count("hipMalloc 12288 on 0") == 2  # one a thread, in whole pages of 4096 bytes
    assert "hipFree, 1 left" in calls  # the ended thread's


def test_damaged_modules_are_refused(scene):
    found, _ = scene("damaged")
    assert ["expected 8 more bytes, found 0" in found[0], "expected 5 more bytes" in found[1]] == [True, True]
    assert "format hsaco, found ptx" in found[2]


def test_a_wrong_number_of_arguments_is_refused(scene):
    found, _ = scene("wrong_count")
    assert "TypeError: scale_kernel: expected" in found and "found 1" in found


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("allocate", {"LLMC_HIP_LIBRARY": "none.so"}, "libamdhip64.so, found none; install ROCm's HIP"),
        ("allocate", {"LLMC_HIP_LIBRARY": "old.so"}, "libamdhip64.so lacks hipEventElapsedTime; install ROCm 6.0"),
        ("allocate", {"HIP_STAND_IN_DEVICES": "0"}, "hipSetDevice: hipErrorNoDevice (100): as told; check that the am"),
        ("third_card", {}, "device 2: HIP finds 2 AMD GPU(s), counted from 0"),
        ("allocate", {"HIP_STAND_IN_FAIL": "hipMalloc=2"}, "1073741824 bytes were asked for, 3221225472 of 4294967296"),
        ("launch", {"HIP_STAND_IN_FAIL": "hipMemcpy=719"}, "hipMemcpy: hipErrorLaunchFailure (719): as told"),
        ("launch", {"HIP_STAND_IN_FAIL": "hipModuleLaunchKernel=719"}, "Kernel of scale_kernel: hipError"),
        ("launch", {"HIP_STAND_IN_FAIL": "hipModuleLoadData=209"}, "(209): as told; compile the model for this card"),
        ("launch", {"HIP_STAND_IN_FAIL": "hipModuleGetFunction=500"}, "hipModuleGetFunction of scale_kernel: "),
        (
            "launch",
            {"HIP_STAND_IN_ARCH": "gfx1100"},
            "expected a card of architecture gfx942, which the code is for, found gfx1100 (device 0); "
            "compile the model for rocm:gfx1100",
        ),
    ],
)
def test_errors(scene, files, name, environment, message):
    if environment.get("LLMC_HIP_LIBRARY") == "old.so":
        environment = {"LLMC_HIP_LIBRARY": f"{files}/old.so"}
    found, _ = scene(name, **environment)
    assert isinstance(found, str) and message in found, found


def test_without_hip_there_is_no_card(scene):
    assert scene("exists", LLMC_HIP_LIBRARY="none.so")[0] == 0


def _with_compiler(files):
    """TVM's own entry point finds it; the time evaluator measures with its events."""
    log = f"{files}/log-{os.getpid()}"
    os.environ |= {"LLMC_HIP_LIBRARY": f"{files}/libamdhip64.so", "HIP_STAND_IN_LOG": log}
    import numpy as np
    import tvm

    device = tvm.rocm(0)
    kernels = tvm.runtime.load_module(f"{files}/scale.so")
    tensors = [tvm.runtime.tensor(np.ones((1, 4), np.float32), device) for _ in range(2)]
    seconds = kernels.time_evaluator("scale", device, number=3)(*tensors, 2.0).mean
    return device.exist, seconds, Path(log).read_text().splitlines()


def test_tvm_finds_it_and_measures_time_with_events(files, isolated):
    exists, seconds, calls = isolated(_with_compiler, files)
    assert exists and 0 < seconds < 1
    assert calls.count("hipEventCreateWithFlags 0 on 0") == 2
    assert sum("Launch" in c for c in calls) >= 3


def test_entry_points():
    [ours] = [e for e in entry_points(group="llmc.runtime_backends") if e.name == "rocm"]
    [theirs] = [e for e in entry_points(group="tvm.backends") if e.name == "llmc_hip"]
    assert (ours.load(), theirs.load()) == (hip.load, hip.autoload)


def test_not_built(monkeypatch, tmp_path):
    monkeypatch.setenv(hip.ELSEWHERE, str(tmp_path))
    monkeypatch.setattr(hip, "_opened", [])
    assert hip.library().parent == tmp_path
    hip.autoload()  # silent
    monkeypatch.setitem(sys.modules, "tvm_ffi", SimpleNamespace(get_global_func=lambda *_, **__: None))
    with pytest.raises(ArtifactError, match=r"found none; build it with `python -m llmc\.runtime\.hip\.build`"):
        hip.load()
    hip.library().write_bytes(b"not a library")
    with pytest.raises(ArtifactError, match="could not open the runtime of AMD's cards"):
        hip.load()


def test_a_name_tells_what_it_is_built_from(monkeypatch, tmp_path):
    before = hip.library()
    source = shutil.copytree(hip.SOURCE, tmp_path / "source")
    monkeypatch.setattr(hip, "SOURCE", source)
    assert hip.library() == before
    (source / "hip.cc").write_text("// other\n")
    assert hip.library() != before


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "found no 'no-such-compiler'; install g++"),
        ("false", "expected a C++ compiler with libstdc++, and 'false' says"),
    ],
)
def test_no_compiler(monkeypatch, compiler, message, capsys, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv(hip.ELSEWHERE, str(tmp_path))
    with pytest.raises(build.BuildError) as error:
        build.build()
    assert message in str(error.value)
    monkeypatch.setattr("sys.argv", ["build"])
    assert build.main() == 2 and message in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["build", "--optional"])
    assert build.main() == 0 and message in capsys.readouterr().err
