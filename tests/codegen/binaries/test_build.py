"""Libraries of GPU targets, made without a GPU: what is in them, and that it is what the sources beside say."""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
import tvm
import tvm_ffi

from llmc import codegen, targets
from llmc.codegen.binaries import barriers, cuda, host, metal, process, rocm
from llmc.codegen.binaries.elf import Elf
from llmc.codegen.binaries.macho import MachO
from llmc.ir.errors import CompileError
from llmc.targets import toolchains
from tests.codegen.binaries.reverse import program

needs_nvrtc = pytest.mark.skipif(bool(toolchains.missing("cuda")), reason="needs llmc[cuda]")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """built(target, host): the target, its library, its sources, the report; built once."""
    done = {}

    def build(name, machine=None):
        if (name, machine) not in done:
            [target] = targets.parse(name, machine)
            folder = tmp_path_factory.mktemp("built")
            library, sources = folder / codegen.library_name(target), folder / codegen.sources_name(target)
            report = codegen.build(program(), target, library, sources)
            done[name, machine] = target, library, sources, report
        return done[name, machine]

    return build


def texts(sources):
    with zipfile.ZipFile(sources) as file:
        return {name: file.read(name).decode() for name in file.namelist()}


@needs_nvrtc
def test_cuda_library_holds_the_cubin_and_no_source(built):
    _, library, sources, report = built("cuda:sm_90", "linux-x86_64")
    content, text = library.read_bytes(), texts(sources)
    cubin = cuda.compile(text["kernels.cu"], "sm_90")
    assert cubin in content  # byte for byte
    assert b"__global__" not in content and b"__syncthreads" not in content
    assert Elf(cubin).machine == "cuda"
    code = cuda.kernels(cubin)["reverse_kernel"]
    assert report["kernels"] == {"reverse_kernel": hashlib.sha256(code).hexdigest()}
    host.check(library, "linux-x86_64")
    assert library.name == "cuda-sm_90-linux-x86_64.so" and sources.name == "cuda-sm_90.zip"


@pytest.mark.parametrize("name", ["rocm:gfx942", "rocm:gfx1100"])
def test_code_objects_wait_before_every_barrier(built, name):
    _, library, sources, report = built(name, "linux-aarch64")
    assembly = texts(sources)["kernels.s"]
    [kernel] = [lines for function, lines in barriers.functions(assembly).items() if function == "reverse_kernel"]
    assert barriers.count_barriers(kernel) == 1 and barriers.unawaited(kernel) is None
    assert any("ds_" in line for line in kernel)
    assert list(report["kernels"]) == ["reverse_kernel"]
    assert Elf(library.read_bytes()).machine == "aarch64"
    # without its wait the same code is refused
    racing = [line for line in kernel if not line.startswith("s_waitcnt")]
    with pytest.raises(CompileError, match=r"reverse_kernel: the barrier at instruction .* does not wait"):
        barriers.check_barriers("\n".join(["reverse_kernel:", *racing]))


def test_metal_library_is_a_signed_dylib_with_the_source(built):
    _, library, sources, report = built("metal")
    text = texts(sources)["kernels.metal"]
    source = metal.kernels(text)["reverse_kernel"]
    assert source.encode() in library.read_bytes()
    assert report["kernels"] == {"reverse_kernel": hashlib.sha256(source.encode()).hexdigest()}
    dylib = MachO(library.read_bytes())
    dylib.check_signature()
    assert dylib.minimum == (11, 0) and dylib.needed == ["/usr/lib/libSystem.B.dylib"]
    assert library.name == "metal-macos-arm64.dylib"


def test_sources_hold_the_module_that_was_compiled(built):
    *_, sources, report = built("metal")
    module = tvm.ir.load_json(texts(sources)["module.json"])
    assert {v.name_hint for v in module.functions} == {"main", "reverse"}
    assert report["max_step_tokens"] == 1024 and report["intermediate_bytes"] > 0


def test_a_process_that_dies_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    [target] = targets.parse("metal")
    with pytest.raises(CompileError, match="building for metal ended with exit code 1"):
        codegen.build(program(), target, tmp_path / "x.dylib")


def test_missing_tools_are_named(monkeypatch, tmp_path):
    [target] = targets.parse("cuda:sm_90", "linux-x86_64")
    absent = toolchains.Toolchain("NVRTC", "cuda", ("no_such_module",))
    monkeypatch.setattr(toolchains, "NEEDED", {"cuda": (absent,)})
    with pytest.raises(
        CompileError, match=r"needs NVRTC and CUDA's headers; .*no_such_module: pip install 'llmc\[cuda"
    ):
        codegen.build(program(), target, tmp_path / "x.so")


@needs_nvrtc
def test_nvrtc_errors_are_told():
    with pytest.raises(CompileError, match=r"NVRTC for sm_80: compiling: NVRTC_ERROR_COMPILATION: kernels.cu\(1\)"):
        cuda.compile("nonsense", "sm_80")


@needs_nvrtc
def test_ptx_for_later_cards():
    text = cuda.compile('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }', "compute_80")
    assert b".target sm_80" in text and list(cuda.kernels(text)) == ["twice"]


def test_shared_memory_beyond_the_machine_is_refused():
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def greedy(a: T.handle):
        A = T.match_buffer(a, (256,), "float32")
        lane = T.launch_thread("threadIdx.x", 256)
        shared = T.alloc_buffer((20000,), "float32", scope="shared")
        shared[lane] = A[lane]
        A[lane] = shared[255 - lane]

    [target] = targets.parse("rocm:gfx942", "linux-x86_64")
    module = tvm.IRModule({"greedy": greedy})
    with pytest.raises(CompileError, match="kernel greedy takes 80000 bytes of shared memory; rocm:gfx942 has 65536"):
        rocm.check_shared_memory(module, target)


def test_report_travels_as_json(built):
    assert json.loads(json.dumps(built("metal")[3]))["kernels"]


def test_a_mac_finds_every_function_in_tvms_library(built):
    """What is looked up among everything that is loaded is declared in the header of TVM's C functions."""
    [header] = Path(tvm_ffi.__file__).parent.rglob("c_api.h")
    declared = set(re.findall(r"\b(TVMFFI\w+)\(", header.read_text()))
    bound = MachO(built("metal")[1].read_bytes()).bound
    looked_up = {name for name, place in bound.items() if place == MachO.FLAT}
    assert looked_up and looked_up <= declared
