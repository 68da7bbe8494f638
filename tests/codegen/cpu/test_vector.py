"""What kernel templates are made of."""

import os

import numpy as np

from tests.codegen.cpu import native

THREADS = 3


def shared_out():
    """(stretches, how often each of so many items was computed), with stretches for all threads and for fewer."""
    os.environ["TVM_NUM_THREADS"] = str(THREADS)
    import tvm
    from tvm.tirx.script import builder as T

    from llmc.codegen.cpu import vector

    tvm.get_global_func("runtime.config_threadpool")(1, THREADS)
    assert tvm.get_global_func("runtime.NumThreads")() == THREADS
    target = native.targets()[0]

    def body(symbols, hits):
        def work(item, state):
            T.buffer_store(state, T.Cast("int32", item), [0])
            T.buffer_store(hits, hits[item] + state[0] - T.Cast("int32", item) + 1, [item])

        vector.share_out(symbols["n"], work, lambda: vector.scratch([1], "int32"))

    found = []
    for stretches in (vector._STRETCHES, THREADS - 1):
        vector._STRETCHES = stretches
        run = native.build(vector.kernel("count", [("hits", ("n",), "int32")], body, target), target)
        for n in (1, 2, 3, 7, 40, 1000):
            hits = np.zeros(n, np.int32)
            for _ in range(20):
                run(hits)
            found.append((stretches, hits))
    return found


def test_every_item_is_computed_once_whoever_draws_it(isolated):
    for stretches, hits in isolated(shared_out):
        assert np.array_equal(hits, np.full(len(hits), 20)), f"{len(hits)} items in {stretches} stretches: {hits}"
