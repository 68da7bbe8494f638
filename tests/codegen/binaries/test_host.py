"""Linking for every host from this one, and what is refused of what comes out."""

import subprocess
import sys

import pytest

from llmc.codegen.binaries import host
from llmc.codegen.binaries.elf import Elf
from llmc.codegen.binaries.macho import MachO
from llmc.ir.errors import CompileError

TRIPLES = {"linux-x86_64": "x86_64-linux-gnu", "linux-aarch64": "aarch64-linux-gnu", "macos-arm64": host.MACOS}
SOURCE = "double exp(double); int TVMFFIErrorMoveFromRaised(void**); double f(double x) { return exp(x) + %s; }"


@pytest.fixture
def compiled(tmp_path):
    """compiled(host, expression): an object of a small C function."""

    def make(machine, expression="1"):
        (tmp_path / "f.c").write_text(SOURCE % expression)
        command = ["cc", "-target", TRIPLES[machine], "-fno-sanitize=undefined", "-c", "f.c", "-o", f"{machine}.o"]
        subprocess.run([sys.executable, "-m", "ziglang", *command], cwd=tmp_path, check=True, timeout=120)
        return str(tmp_path / f"{machine}.o")

    return make


@pytest.mark.parametrize("machine", TRIPLES)
def test_every_host(compiled, tmp_path, machine):
    library = tmp_path / "f.lib"
    host.link(library, [compiled(machine, "TVMFFIErrorMoveFromRaised(0)")], machine)
    data = library.read_bytes()
    if machine == "macos-arm64":
        found = MachO(data)
        assert found.bound["exp"] == 1 and found.bound["TVMFFIErrorMoveFromRaised"] == MachO.FLAT
        assert found.needed == ["/usr/lib/libSystem.B.dylib"] and found.minimum == (11, 0)
    else:
        assert Elf(data).needed() == ["libm.so.6", "libc.so.6"]
        assert Elf(data).undefined() == ["TVMFFIErrorMoveFromRaised", "exp"]
    with pytest.raises(CompileError, match="expected"):
        host.check(library, "linux-aarch64" if machine != "linux-aarch64" else "linux-x86_64")


@pytest.mark.parametrize("machine", ["linux-x86_64", "macos-arm64"])
def test_a_function_that_nobody_has_is_refused(compiled, tmp_path, machine):
    with pytest.raises(CompileError, match=f"calls no_such: neither TVM's runtime nor {machine}'s C library has that"):
        host.link(tmp_path / "f.lib", [compiled(machine, "({ extern int no_such(void); no_such(); })")], machine)


def test_a_library_changed_after_its_signature_is_refused(compiled, tmp_path):
    library = tmp_path / "f.dylib"
    host.link(library, [compiled("macos-arm64")], "macos-arm64")
    data = bytearray(library.read_bytes())
    MachO(bytes(data)).check_signature()
    data[100] ^= 1
    with pytest.raises(CompileError, match="page 0 was changed after it was signed"):
        MachO(bytes(data)).check_signature()
    unsigned = MachO(bytes(data))
    unsigned.signature = None
    with pytest.raises(CompileError, match="code signature: expected one, found none"):
        unsigned.check_signature()


def test_linker_errors_are_told(tmp_path, monkeypatch):
    (tmp_path / "a.o").write_text("no object")
    with pytest.raises(CompileError, match="the linker failed"):
        host.link(tmp_path / "a.so", [str(tmp_path / "a.o")], "linux-x86_64")
    with pytest.raises(CompileError, match="no linker is set up for plan9-x86_64: expected one of linux-x86_64"):
        host.link(tmp_path / "a.so", [str(tmp_path / "a.o")], "plan9-x86_64")
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"ziglang, which is not installed: pip install 'llmc\[cross\]'"):
        host.zig(["version"])


def test_files_of_another_kind_are_refused():
    with pytest.raises(CompileError, match="x: expected a 64-bit little-endian ELF file, found b'#!/bin'"):
        Elf(b"#!/bin/sh", "x")
    with pytest.raises(CompileError, match="x: expected a Mach-O library for arm64, found 2321"):
        MachO(b"#!/bin/sh", "x")
