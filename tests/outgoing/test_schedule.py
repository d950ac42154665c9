"""Which page goes next."""

from __future__ import annotations

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopyd.outgoing.schedule import Run, SendSchedule

PAGE = 4096
HUGE = 2 << 20


def schedule_of(*dirty: bitarray, page_size: int = PAGE) -> SendSchedule:
    return SendSchedule(dirty, [page_size] * len(dirty))


def all_dirty(*pages: int) -> SendSchedule:
    return schedule_of(*(bitarray("1" * count) for count in pages))


def test_without_requests_all_goes_in_ascending_order() -> None:
    schedule = all_dirty(5, 2)
    assert schedule.take_requested() is None
    runs = [schedule.take_scanned(3 * PAGE) for _ in range(4)]
    assert runs == [Run(0, 0, 3), Run(0, 3, 2), Run(1, 0, 2), None]


def test_clean_pages_are_never_handed_out() -> None:
    schedule = schedule_of(bitarray("0110010"))
    assert [schedule.take_scanned(64 * PAGE) for _ in range(3)] == [
        Run(0, 1, 2),
        Run(0, 5, 1),
        None,
    ]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (HUGE, 1), (3 * HUGE + PAGE, 3)])
def test_a_run_has_as_many_host_pages_as_fit_and_at_least_one(size: int, count: int) -> None:
    schedule = schedule_of(bitarray("1" * 8), page_size=HUGE)
    assert schedule.take_scanned(size) == Run(0, 0, count)


def test_the_scan_goes_on_behind_the_requested_page_and_wraps() -> None:
    schedule = all_dirty(4, 4)
    assert schedule.request(1, 1)
    assert schedule.take_requested() == Run(1, 1, 1)
    rest = [schedule.take_scanned(64 * PAGE) for _ in range(4)]
    assert rest == [Run(1, 2, 2), Run(0, 0, 4), Run(1, 0, 1), None]


def test_a_request_alone_does_not_move_the_scan() -> None:
    schedule = all_dirty(8)
    schedule.request(0, 6)
    assert schedule.take_scanned(2 * PAGE) == Run(0, 0, 2)


def test_requests_are_answered_in_their_order() -> None:
    schedule = all_dirty(8)
    for page in (5, 1, 3):
        assert schedule.request(0, page)
    assert [schedule.take_requested() for _ in range(4)] == [
        Run(0, 5, 1),
        Run(0, 1, 1),
        Run(0, 3, 1),
        None,
    ]


def test_a_request_for_a_page_already_sent_is_ignored_and_does_not_move_the_scan() -> None:
    schedule = all_dirty(8)
    assert schedule.take_scanned(2 * PAGE) == Run(0, 0, 2)
    assert not schedule.request(0, 1)
    assert schedule.take_requested() is None
    assert schedule.take_scanned(1 * PAGE) == Run(0, 2, 1)


def test_a_page_requested_twice_is_sent_once() -> None:
    schedule = all_dirty(8)
    assert schedule.request(0, 4)
    assert not schedule.request(0, 4)
    assert schedule.take_requested() == Run(0, 4, 1)
    assert schedule.take_requested() is None


def test_a_requested_page_that_the_scan_reached_first_is_sent_once() -> None:
    schedule = all_dirty(2)
    schedule.request(0, 1)
    assert schedule.take_scanned(2 * PAGE) == Run(0, 0, 2)
    assert schedule.take_requested() is None
    assert schedule.remaining == 0


def test_a_request_for_many_pages_gives_them_one_by_one() -> None:
    schedule = schedule_of(bitarray("1101"))
    assert schedule.request(0, 0, 4)
    assert [schedule.take_requested() for _ in range(4)] == [
        Run(0, 0, 1),
        Run(0, 1, 1),
        Run(0, 3, 1),
        None,
    ]


@pytest.mark.parametrize(("first", "count"), [(4, 1), (0, 5), (-1, 1), (0, 0), (3, 2)])
def test_a_request_outside_the_block_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="block 0 of 4 pages"):
        all_dirty(4).request(0, first, count)


class ScheduleMachine(RuleBasedStateMachine):
    """Against a model: a set of pages to send, in whatever order requests and scan mix."""

    @initialize(
        blocks=st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=4)
    )
    def begin(self, blocks: list[list[bool]]) -> None:
        self.lengths = [len(block) for block in blocks]
        self.left = {
            (number, page)
            for number, block in enumerate(blocks)
            for page, dirty in enumerate(block)
            if dirty
        }
        self.requested: list[tuple[int, int]] = []
        self.schedule = schedule_of(*(bitarray(block) for block in blocks))

    @rule(data=st.data())
    def request(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, len(self.lengths) - 1))
        first = data.draw(st.integers(0, self.lengths[block] - 1))
        count = data.draw(st.integers(1, self.lengths[block] - first))
        new = [(block, page) for page in range(first, first + count)]
        new = [page for page in new if page in self.left and page not in self.requested]
        assert self.schedule.request(block, first, count) == bool(new)
        self.requested += new

    @rule()
    def take_requested(self) -> None:
        run = self.schedule.take_requested()
        if run is None:
            assert not self.requested
            return
        assert run.pages == 1
        assert (run.block, run.first) in self.requested
        self._sent(run)

    @rule(limit=st.integers(1, 8))
    def take_scanned(self, limit: int) -> None:
        run = self.schedule.take_scanned(limit * PAGE)
        if run is None:
            assert not self.left
            return
        assert 1 <= run.pages <= limit
        self._sent(run)

    def _sent(self, run: Run) -> None:
        for page in range(run.first, run.first + run.pages):
            self.left.remove((run.block, page))  # KeyError: clean, or sent before
            if (run.block, page) in self.requested:
                self.requested.remove((run.block, page))

    @precondition(lambda self: hasattr(self, "left"))
    @invariant()
    def the_count_is_right(self) -> None:
        assert self.schedule.remaining == len(self.left) * PAGE

    def teardown(self) -> None:
        while hasattr(self, "left") and self.left:
            self.take_requested()
            self.take_scanned(8 * PAGE)


TestEveryDirtyPageIsSentExactlyOnceWhateverTheRequests = ScheduleMachine.TestCase


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 59)), max_size=30),
    st.integers(1, 64),
)
def test_a_requested_page_goes_before_any_page_of_the_scan(
    lengths: list[int], requests: list[tuple[int, int]], limit: int
) -> None:
    schedule = all_dirty(*lengths)
    wanted = list(
        dict.fromkeys(
            (block, page)
            for block, page in requests
            if block < len(lengths) and page < lengths[block]
        )
    )
    for block, page in wanted:
        schedule.request(block, page)
    first = []
    while run := schedule.take_requested():
        first.append((run.block, run.first))
    assert first == wanted
    sent = len(first)
    while run := schedule.take_scanned(limit * PAGE):
        sent += run.pages
    assert sent == sum(lengths)
