"""The C++ that stands between TVM's host code and a kernel: unpacks arguments and starts the launch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.errors import CompileError

__all__ = ["ENTRY_POINT", "Kernel", "Parameter", "entry_point"]


@dataclass(frozen=True)
class Parameter:
    """name; dtype, "handle" for a tensor."""

    name: str
    dtype: str

    @property
    def is_tensor(self) -> bool:
        return self.dtype == "handle"

    @property
    def c_type(self) -> str:
        return "void *" if self.is_tensor else _C_TYPES[self.dtype]

    def unpack(self, index: int) -> str:
        field = "pointer" if self.is_tensor else "number" if self.dtype.startswith("float") else "integer"
        return f"({self.c_type})packed[{index}].{field}"


_C_TYPES = {
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": "bool",
    "float16": "_Float16",
    "float32": "float",
    "float64": "double",
}


@dataclass(frozen=True)
class Kernel:
    """A function of a device module: what the host passes (parameters, then `launch`), and lanes of a warp.

    launch: what follows the parameters, e.g. "blockIdx.x", "threadIdx.x", "tirx.use_dyn_shared_memory".
    """

    name: str
    parameters: tuple[Parameter, ...]
    launch: tuple[str, ...]
    warp: int = 32


# Of TVM's foreign function interface: TVMFFIAny, what a packed function is passed (tvm/ffi/c_api.h).
ENTRY_POINT = r"""
#include "machine.h"
struct DeviceAny {
  int32_t type, unused;
  union {
    int64_t integer;
    double number;
    void *pointer;
  };
};
extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
"""


def entry_point(
    kernel: Kernel,
    call: Sequence[str] | str,
    *,
    strict: bool,
    masks: bool,
    whole_buffers: bool = False,
    lines: bool = False,
) -> str:
    """The C++ of `__tvm_ffi_<kernel>`. call: an expression that calls the kernel, on `frame.p0`, `frame.p1`, ….

    masks, whole_buffers: as in `DeviceLaunch` of native/machine.h; lines: the kernel announces its lines itself.
    """
    name, parameters = kernel.name, kernel.parameters
    fields = " ".join(f"{p.c_type} p{i};" for i, p in enumerate(parameters))
    values = ", ".join(p.unpack(i) for i, p in enumerate(parameters))
    tensors = [f'{{packed[{i}].pointer, "{p.name}"}}' for i, p in enumerate(parameters) if p.is_tensor]
    setup = []
    for i, tag in enumerate(kernel.launch, len(parameters)):
        index = re.fullmatch(r"(blockIdx|threadIdx)\.([xyz])", tag)
        if index:
            size = "grid" if index[1] == "blockIdx" else "threads"
            setup.append(f"launch.{size}.{index[2]} = (unsigned)packed[{i}].integer;")
        elif tag == "tirx.use_dyn_shared_memory":
            setup.append(f"launch.dynamic_shared = packed[{i}].integer;")
        else:
            raise CompileError(
                f"{name}: the software device knows no launch parameter {tag!r}", stage="software_device"
            )
    flags = ", ".join(str(flag).lower() for flag in (masks, whole_buffers, strict))
    text = "nullptr" if lines else "__ehdr_start"
    setup_lines = "\n  ".join(setup)
    return f"""
struct Frame_{name} {{ {fields} }};
__attribute__((no_sanitize("thread"), nodebug)) static void body_{name}(void *raw) {{
  Frame_{name} &frame = *(Frame_{name} *)raw;
  {call};
}}
extern "C" __attribute__((visibility("default"), no_sanitize("thread"), nodebug))
int __tvm_ffi_{name}(void *, const DeviceAny *packed, int32_t, DeviceAny *result) {{
  Frame_{name} frame{{{values}}};
  DeviceArgument tensors[] = {{{", ".join([*tensors, "{}"])}}};
  DeviceLaunch launch{{"{name}", {{1, 1, 1}}, {{1, 1, 1}}, 0, {kernel.warp}, {flags}, {text}, tensors, {len(tensors)},
                      body_{name}, &frame, sizeof frame}};
  {setup_lines}
  *result = DeviceAny{{}};
  return device_launch(&launch);
}}
"""
