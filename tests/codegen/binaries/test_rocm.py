"""AMD's code objects: what is refused before they are linked."""

import pytest

from llmc.codegen.binaries.rocm import check_address_spaces
from llmc.ir.errors import CompileError

KERNEL = """define amdgpu_kernel void @sums_kernel(ptr addrspace(1) %x) {
  %a = addrspacecast ptr addrspace(3) @buffer to ptr
  %b = load float, ptr addrspace(3) @buffer
"""


@pytest.mark.parametrize(
    "line",
    [
        "  store float 0.0, ptr addrspace(1) addrspacecast (ptr addrspace(3) @buffer to ptr addrspace(1))",
        "  %c = addrspacecast ptr addrspace(3) %p to ptr addrspace(1)",
    ],
)
def test_shared_memory_is_not_global_memory(line):
    check_address_spaces(KERNEL)
    with pytest.raises(CompileError, match="sums_kernel: shared memory is taken for global memory: addrspacecast"):
        check_address_spaces(KERNEL + line)
