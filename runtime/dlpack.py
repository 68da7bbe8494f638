"""Memory handed to compiled code without a copy, whatever its dtype.

numpy exports neither read-only arrays nor bfloat16 through DLPack, and mapped weights are both. So the few words of
a DLManagedTensor (https://github.com/dmlc/dlpack, `include/dlpack/dlpack.h`) are laid out here.
"""

import ctypes
from collections.abc import Sequence

# dtype -> (DLDataTypeCode, bits)
_CODES = {
    "bool": (6, 8),
    "uint8": (1, 8),
    "int8": (0, 8),
    "uint16": (1, 16),
    "int16": (0, 16),
    "uint32": (1, 32),
    "int32": (0, 32),
    "uint64": (1, 64),
    "int64": (0, 64),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8),
}
CPU = 1  # DLDeviceType


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class View:
    """Memory at an address as a contiguous tensor, for any `from_dlpack`; of a CPU, or of `device` (type, number).

    It has no deleter: whoever made it keeps both the memory and this object for as long as the importer lives.
    """

    def __init__(self, address: int, shape: Sequence[int], dtype: str, device: tuple[int, int] = (CPU, 0)):
        code, bits = _CODES[dtype]
        n = len(shape)
        strides, step = [0] * n, 1
        for i in reversed(range(n)):
            strides[i], step = step, step * shape[i]
        self._shape, self._strides = (ctypes.c_int64 * n)(*shape), (ctypes.c_int64 * n)(*strides)
        self._device = device
        tensor = _DLTensor(address, *device, n, code, bits, 1, self._shape, self._strides, 0)
        self._managed = _DLManagedTensor(tensor, None, None)

    def __dlpack__(self, **_):
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self):
        return self._device
