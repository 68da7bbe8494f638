"""What a program in the kernels form computes, as plain loops: the reference of `llmc verify`."""

from .reference import reference

__all__ = ["reference"]
