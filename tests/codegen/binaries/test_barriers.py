"""Barriers in assembly text: what waits, what does not, along every path."""

import pytest

from llmc.codegen.binaries.barriers import functions, unawaited


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ds_write_b32 v1, v2; s_waitcnt lgkmcnt(0); s_barrier", None),
        ("ds_write_b32 v1, v2; s_barrier", 1),
        ("ds_write_b32 v1, v2; s_waitcnt vmcnt(0); s_barrier", 2),
        ("ds_write_b32 v1, v2; s_waitcnt lgkmcnt(1); s_barrier", 2),
        ("ds_write_b32 v1, v2; s_waitcnt vmcnt(0) lgkmcnt(0); s_barrier", None),
        ("ds_store_b32 v1, v2; s_wait_dscnt 0x0; s_barrier_signal -1; s_barrier_wait -1", None),
        ("ds_store_b32 v1, v2; s_wait_dscnt 0x1; s_barrier_signal -1; s_barrier_wait -1", 2),
        ("ds_read_b32 v1, v2; s_barrier", None),
        ("s_waitcnt lgkmcnt(0); ds_write_b32 v1, v2; s_barrier", 2),
        # a write in front of a branch, the barrier behind it
        ("ds_write_b32 v1, v2; s_cbranch_vccz .L1; s_waitcnt lgkmcnt(0); .L1:; s_barrier", 4),
        # a write at a loop's end meets the barrier at its beginning
        (".L1:; s_barrier; ds_write_b32 v1, v2; s_cbranch_vccz .L1; s_endpgm", 1),
        (".L1:; s_barrier; ds_write_b32 v1, v2; s_waitcnt lgkmcnt(0); s_cbranch_vccz .L1; s_endpgm", None),
        # nothing goes on behind the end
        ("ds_write_b32 v1, v2; s_endpgm; .L1:; s_barrier", None),
    ],
)
def test_paths(code, expected):
    assert unawaited(code.split("; ")) == expected


def test_functions_of_assembly_text():
    text = "\t.text\nfirst:  ; @first\n\tds_write_b32 v1, v2 ; comment\n.LBB0_1:\n\ts_endpgm\n.section x\n"
    text += "second:\n\ts_nop 0\n"
    assert functions(text) == {"first": ["ds_write_b32 v1, v2", ".LBB0_1:", "s_endpgm"], "second": ["s_nop 0"]}
