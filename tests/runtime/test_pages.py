"""Pages under any order of events: none lost, none held twice, none written while shared, content as promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmc.runtime.pages import SCRATCH, PagePool, Pages
from tests.runtime.fake import first_visible, group


class TestPool:
    def test_lowest_first_and_growing_on_demand(self):
        pool = PagePool(10)
        assert [pool.take() for _ in range(4)] == [1, 2, 3, 4]
        pool.give(3)
        pool.give(1)
        assert [pool.take() for _ in range(3)] == [1, 3, 5]
        assert (pool.held, pool.available) == (5, 4)

    def test_idle_pages_go_oldest_first_when_room_is_needed(self):
        pool = PagePool(4)
        pages = [pool.take() for _ in range(3)]
        for page in pages:
            assert pool.publish(page, bytes([page]))
            pool.give(page)
        assert pool.available == 3 and len(pool.by_key) == 3
        pool.share(1)
        assert pool.take() == 2 and pool.by_key == {b"\x01": 1, b"\x03": 3} and pool.forgotten == [b"\x02"]

    def test_idle_pages_are_bounded(self):
        pool = PagePool(100, keep_idle=2)
        for i in range(5):
            page = pool.take()
            pool.publish(page, bytes([i]))
            pool.give(page)
        assert len(pool.by_key) <= 2 and pool.available == 99

    def test_content_is_known_once(self):
        pool = PagePool(10)
        one, other = pool.take(), pool.take()
        assert pool.publish(one, b"x") and pool.publish(one, b"x")
        assert not pool.publish(other, b"x")
        pool.give(other)
        assert pool.take() == other  # free, not idle: its content is known by another page


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (1, 0), (5, 0), (8, 0), (0, 6), (0, 8), (7, 12), (12, 7)])
def test_what_a_sequence_needs_at_once(window, chunk):
    """`required` is what the worst moment takes, token by token."""
    pages = Pages([group(0, window, chunk)], [100])
    for length in (1, 4, 5, 9, 30, 61):
        most = 0
        for position in range(length):
            first = first_visible(pages.groups[0], position)
            assert pages.first_visible(pages.groups[0], position) == first
            most = max(most, position // 4 - first // 4 + 1)
        assert most <= pages.required(length)[0] <= most + 1


def test_groups_of_several_page_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one page size, found \[4, 8\]"):
        Pages([group(0), group(1, page_size=8)], [10, 10])


GROUPS = (group(0), group(1, window=6), group(2, chunk=10))


class PagesMachine(RuleBasedStateMachine):
    """Sequences come, grow, are cancelled; a model of each page says what was written to it."""

    @initialize(capacity=st.integers(8, 24), keep=st.sampled_from([None, 0, 3]))
    def begin(self, capacity, keep):
        self.pages = Pages(GROUPS, [capacity] * 3, keep)
        self.content = [{} for _ in GROUPS]  # page -> [token and all before it, by slot]
        self.running = []  # [holding, tokens]

    @rule(data=st.data(), length=st.integers(1, 40), share=st.booleans())
    def join(self, data, length, share):
        tokens = np.array(data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)), np.int32)
        buffer = np.concatenate([tokens, np.zeros(40, np.int32)])
        holding = self.pages.open(tokens, len(buffer), share)
        assert holding.computed < length
        if share:
            self.pages.copy_partial(holding, tokens)
            assert holding.computed < length
        for g, source, target in self.pages.copies:
            assert self.pages.pools[g].holders[target] == 1
            self.content[g][target] = dict(self.content[g][source])
        self.pages.copied()
        self.running.append([holding, buffer, length])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 12))
    def compute(self, data, count):
        holding, buffer, _ = data.draw(st.sampled_from(self.running))
        start = holding.computed
        count = self.pages.room(holding, min(count, len(buffer) - start))
        if not count:
            return
        self.pages.extend(holding, count)
        self.pages.publish(holding, buffer, start + count)
        for g, one in enumerate(GROUPS):
            for position in range(start, start + count):
                page = int(holding.tables[g, position // 4])
                assert page != SCRATCH and self.pages.pools[g].holders[page] == 1, "a shared page is written"
                if position % 4 == 0:
                    self.content[g][page] = {}
                self.content[g].setdefault(page, {})[position % 4] = buffer[: position + 1].tobytes()
            for position in range(start, start + count):
                self.check_visible(g, one, holding, buffer, position)
        self.pages.advance(holding, buffer, start + count)

    def check_visible(self, g, one, holding, buffer, position):
        for p in range(first_visible(one, position), position + 1):
            page = int(holding.tables[g, p // 4])
            assert self.content[g][page][p % 4] == buffer[: p + 1].tobytes(), "a page holds what it should not"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data):
        i = data.draw(st.integers(0, len(self.running) - 1))
        holding, buffer, _ = self.running.pop(i)
        self.pages.close(holding, buffer)
        assert not holding.tables.any()

    @rule()
    def distrust(self):
        self.pages.forget()
        assert not any(pool.by_key for pool in self.pages.pools)

    @invariant()
    def every_page_is_counted(self):
        if not hasattr(self, "pages"):
            return
        for g, pool in enumerate(self.pages.pools):
            holders = [0] * len(pool.holders)
            for holding, _, _ in self.running:
                for page in holding.tables[g, : holding.count]:
                    if page:
                        holders[page] += 1
            assert holders == pool.holders
            assert pool.held == sum(map(bool, holders))


TestAnyOrder = PagesMachine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_the_longest_known_beginning_is_found(prompts):
    """With one group of full attention, nothing computed before is computed again."""
    pages, known = Pages([group(0)], [1000]), []
    for prompt in prompts:
        tokens = np.array(prompt, np.int32)
        holding = pages.open(tokens, 64)
        pages.copy_partial(holding, tokens)
        common = [
            next((i for i, (a, b) in enumerate(zip(prompt, k, strict=False)) if a != b), min(len(prompt), len(k)))
            for k in known
        ]
        assert holding.computed == min(max(common, default=0), len(prompt) - 1)
        pages.copied()
        pages.extend(holding, len(prompt) - holding.computed)
        pages.publish(holding, tokens, len(prompt))
        pages.advance(holding, tokens, len(prompt))
        pages.close(holding, tokens)
        known.append(prompt)
