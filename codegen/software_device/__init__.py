"""GPU kernels executed on the CPU: what the emitters make for CUDA, ROCm and Metal, exactly.

With the machine's semantics, one fiber a GPU thread, one block at a time. Strictly: what has no meaning on the device,
or what a result may not depend on (a race, memory that nothing wrote, a barrier that some don't reach) is a
DeviceFault, never helped along.
"""

from .faults import DeviceFault
from .run import Unwritten, check_all, run, run_text

__all__ = ["DeviceFault", "Unwritten", "check_all", "install", "run", "run_text"]


def install(kind: str, *, strict: bool = True) -> None:
    """Make this process's device of a kind the software device; see device.install."""
    from . import device

    device.install(kind, strict=strict)
