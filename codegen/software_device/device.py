"""The software device in a process: TVM's device API of a kind, and its emitters' text made runnable."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import tvm_ffi

from llmc.ir.errors import CompileError

from . import cuda, metal, rocm
from .build import cache_folder, kernel_library, machine_library
from .entry import Kernel, Parameter
from .faults import DeviceFault, Fault, Source, describe
from .lines import line_of

__all__ = ["configure", "edit_text", "emitted", "install", "last_fault", "load_kernels"]

_LANGUAGES = {"cuda": cuda, "metal": metal, "rocm": rocm}
_sources: dict[str, Source] = {}
_last: list[DeviceFault] = []
_emitted: list[str] = []
_originals: dict[str, Callable] = {}
_edits: list[tuple[str, str, int | None]] = []


def install(kind: str, *, strict: bool = True, text: str | None = None) -> None:
    """Make this process's device of a kind ("cuda", "rocm", "metal") the software device.

    Then tvm.compile and relax.build for it, and tvm.device(kind), work as if there was one: kernels run on the CPU.
    strict: every access of memory is checked; otherwise kernels only run. text: what an emitter wrote earlier for the
    kernels that will be built, to be run instead of what it writes now. To be called in a child process: it
    replaces TVM's own functions of that kind for good.
    """
    import tvm

    register_memory(kind)
    original = _originals.setdefault(kind, tvm.get_global_func(f"target.build.{kind}"))
    if kind == "rocm":
        original = _with_fences(original)

    def build(module, target):
        emitted = original(module, target).inspect_source("") if text is None else text
        emitted = _edited(emitted)
        kernels = [_kernel(f, target) for f in module.functions.values()]
        _emitted[:] = [emitted]
        return tvm_ffi.load_module(str(load_kernels(kind, emitted, kernels, strict=strict)))

    tvm_ffi.register_global_func(f"target.build.{kind}", build, override=True)


def _with_fences(original: Callable) -> Callable:
    """TVM's builder as binaries/rocm.py uses it, but for the link, which takes no toolchain here."""
    import tvm

    from ..binaries.rocm import FENCES, fence_barriers

    path = cache_folder() / "fences.ll"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FENCES)
    paths = tvm.runtime.convert([str(path)])
    tvm_ffi.register_global_func("tvm_callback_rocm_bitcode_path", lambda *_: paths, override=True)
    tvm_ffi.register_global_func("tvm_callback_rocm_link", lambda code: code, override=True)
    return lambda module, target: original(fence_barriers(module), target)


def register_memory(kind: str) -> None:
    """Register the device's memory as TVM's device API of this kind; needs no `import tvm`."""
    api = _machine().device_api(kind != "metal")
    for name in (kind, f"{kind}_host") if kind in ("cuda", "rocm") else (kind,):
        tvm_ffi.register_global_func(f"device_api.{name}", lambda: ctypes.c_void_p(api), override=True)


def load_kernels(kind: str, text: str, kernels: Sequence[Kernel], *, strict: bool = True) -> Path:
    """The library of what an emitter made: `__tvm_ffi_<kernel>` of every kernel, for tvm_ffi.load_module."""
    if kind not in _LANGUAGES:
        raise CompileError(f"the software device runs {', '.join(_LANGUAGES)}, not {kind!r}", stage="software_device")
    language = _LANGUAGES[kind]
    _machine()
    path = kernel_library(
        kernels[0].name if kernels else kind,
        language.translate(text, kernels, strict=strict),
        strict=strict,
        include=language.INCLUDE,
    )
    for kernel in kernels:
        _sources[kernel.name] = Source(text, lambda place: line_of(path, place))
    return path


def configure(*, order: str = "forward", copies: str = "late") -> None:
    """order: lanes, warps and blocks run "forward" or in "reverse". copies: async ones land "late" or "early"."""
    for value, known in ((order, ("forward", "reverse")), (copies, ("late", "early"))):
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, found {value!r}")
    _machine().device_configure(order == "reverse", copies == "early")


def last_fault() -> DeviceFault | None:
    """The fault of the last launch that had one; forgotten once it is told."""
    return _last.pop() if _last else None


def edit_text(edit: tuple[str, str, int | None] | None) -> None:
    """From now on, text that is emitted is changed before it is compiled: (old, new, which), see run.run; None: no."""
    _edits[:] = [edit] if edit else []


def _edited(text: str) -> str:
    for old, new, which in _edits:
        parts = text.split(old)
        if len(parts) - 1 <= (which or 0):
            raise ValueError(f"expected more than {which or 0} of {old!r} in the emitted text, found {len(parts) - 1}")
        if which is None:
            return new.join(parts)
        text = old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])
    return text


def emitted() -> str:
    """The text that was last compiled for the device."""
    return _emitted[0] if _emitted else ""


def _kernel(function, target) -> Kernel:
    parameters = tuple(Parameter(str(p.name), _dtype(p)) for p in function.params)
    launch = tuple(str(tag) for tag in function.attrs["tirx.kernel_launch_params"])
    warp = int(target.attrs.get("thread_warp_size", 32))
    return Kernel(str(function.attrs["global_symbol"]), parameters, launch, warp)


def _dtype(parameter) -> str:
    return str(getattr(parameter.ty, "dtype", None) or "handle")


class _Told(DeviceFault):
    """What TVM makes of a message: the fault that it tells of, with all that is known of it."""

    def __new__(cls, message: str):
        return _last[0] if _last else DeviceFault(message)


_Describe = ctypes.CFUNCTYPE(None, ctypes.POINTER(Fault), ctypes.c_void_p, ctypes.c_size_t)
_callbacks: list[Callable] = []


@cache
def _machine() -> ctypes.CDLL:
    """The machine, its names for all libraries of kernels to see."""
    machine = ctypes.CDLL(str(machine_library()), ctypes.RTLD_GLOBAL)
    machine.device_api.restype = ctypes.c_void_p
    machine.device_api.argtypes = [ctypes.c_bool]
    machine.device_configure.argtypes = [ctypes.c_bool, ctypes.c_bool]

    @_Describe
    def tell(fault, text, size):
        kernel = (fault.contents.kernel or b"").decode()
        found = describe(fault.contents, _sources.get(kernel))
        _last[:] = [found]
        message = str(found).encode()[: size - 1] + b"\0"
        ctypes.memmove(text, message, len(message))

    _callbacks.append(tell)
    raise_error = ctypes.CDLL(_ffi_library()).TVMFFIErrorSetRaisedFromCStr
    machine.device_connect(tell, raise_error)
    for known in (DeviceFault, CompileError):  # what passes through TVM comes out as it went in
        tvm_ffi.error.register_error(known.__name__, known)
    tvm_ffi.error.register_error("DeviceFault", _Told)
    return machine


def _ffi_library() -> str:
    return str(next((Path(tvm_ffi.__file__).parent / "lib").glob("libtvm_ffi.so")))
