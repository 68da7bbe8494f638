"""What comes out for a device: the sources of its kernels, and what a driver is given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import tvm


@dataclass
class DeviceCode:
    """sources: file name -> text. binaries: what the driver is given: cubins, code objects, or sources.
    kernels: kernel -> its machine code, or its source where the driver compiles it. threads: kernel -> threads of a
    block, where that is fixed."""

    sources: dict[str, str]
    binaries: list[bytes]
    kernels: dict[str, bytes]
    threads: dict[str, int] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """kernel -> SHA-256 of its machine code or text."""
        return {name: hashlib.sha256(code).hexdigest() for name, code in sorted(self.kernels.items())}


class DeviceCompiler(Protocol):
    """Makes device code for one target within one process."""

    def install(self) -> None:
        """Take the place of TVM's own compiler, from now on in this process."""

    def device_code(self, module: tvm.runtime.Module) -> DeviceCode:
        """What was made for the module that was built since, looked over. Raises CompileError where it is not right."""


def device_modules(module: tvm.runtime.Module, kind: str) -> list:
    """The modules of a kind among what a built module imports, at any depth."""
    found = []
    for each in module.imports:
        found += [each] if each.kind == kind else device_modules(each, kind)
    return found
