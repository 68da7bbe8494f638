"""Whole modules on the software device: Relax's virtual machine on tvm.device(kind), and memory between launches."""

import numpy as np
import pytest

from llmc.codegen import software_device as device
from tests.codegen.software_device import kernels as K

SM80 = K.target("cuda:sm_80")


def two_launches(written):
    """y = (x + 1) * 2 through a workspace of the host code, of which `written` of 128 elements are written."""

    def body(_, x, y):
        T = K.T
        middle = T.alloc_buffer((128,), "float32", scope="global")
        with K.launch(2, 64) as (b, t), T.If(b * 64 + t < written), T.Then():
            T.buffer_store(middle, x[b * 64 + t] + T.float32(1), [b * 64 + t])
        with K.launch(1, 128) as (_b, t):
            T.buffer_store(y, middle[127 - t] * T.float32(2), [127 - t])

    return K.kernel([("x", (128,), "float32"), ("y", (128,), "float32")], body)


def test_launches_are_ordered_and_share_a_workspace():
    x = np.arange(128, dtype=np.float32)
    result = device.check_all(two_launches(128), SM80, [x, device.Unwritten((128,), "float32")])
    np.testing.assert_array_equal(result[1], (x + 1) * 2)


def test_what_a_workspace_holds_before_it_is_written():
    x = np.arange(128, dtype=np.float32)
    with pytest.raises(device.DeviceFault) as caught:
        device.run(two_launches(120), SM80, [x, device.Unwritten((128,), "float32")])
    assert (caught.value.fault, caught.value.kernel) == ("uninitialised", "planted_kernel_1")


def run_module(reach):
    """A Relax function of two calls on tvm.device("cuda"); -> its result, or what it raised."""
    import tvm
    from tvm import relax

    device.install("cuda")
    copy = K.copy(reach=reach)
    builder = relax.BlockBuilder()
    copied = builder.add_func(copy, "planted")
    x = relax.Var("x", relax.TensorType((128,), "float32"))
    with builder.function("main", [x]):
        y = builder.emit(relax.call_tir(copied, (x,), relax.TensorType((128,), "float32")))
        builder.emit_func_output(builder.emit(relax.call_tir(copied, (y,), relax.TensorType((128,), "float32"))))
    machine = tvm.target.Target(SM80.tvm(), host={"kind": "llvm"})
    vm = relax.VirtualMachine(relax.build(builder.get(), machine), tvm.device("cuda"))
    given = tvm.runtime.tensor(np.arange(128, dtype=np.float32), device=tvm.device("cuda"))
    try:
        return vm["main"](given).numpy()
    except device.DeviceFault as fault:
        return type(fault).__name__, fault.fault, str(fault)


def test_a_relax_module(isolated):
    np.testing.assert_array_equal(isolated(run_module, 0), np.arange(128))


def test_a_fault_comes_through_the_virtual_machine(isolated):
    name, kind, message = isolated(run_module, 1)
    assert (name, kind) == ("DeviceFault", "bounds") and message.startswith("bounds: kernel planted_kernel, block (1")
