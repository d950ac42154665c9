"""Which worker something is for."""

from __future__ import annotations

from postcopyd.daemon.routing import Placements


def test_who_has_a_migration_is_asked_whatever_others_have_to_do() -> None:
    assert Placements().worker_for("a", 2, {0: 0, 1: 0}) == 2


def test_a_new_one_goes_to_the_worker_with_the_fewest() -> None:
    placements = Placements()
    assert placements.worker_for("a", None, {0: 2, 1: 1, 2: 1}) == 1
    assert placements.worker_for("a", None, {0: 0, 2: 0}) == 0
    assert placements.worker_for("a", None, {}) is None


def test_those_that_are_on_their_way_count() -> None:
    placements = Placements()
    with placements.placed("a", 0), placements.placed("b", 1):
        assert placements.worker_for("c", None, {0: 0, 1: 0, 2: 0}) == 2
    assert placements.worker_for("c", None, {0: 0, 1: 0, 2: 0}) == 0


def test_who_asks_for_one_that_is_being_created_is_sent_after_it() -> None:
    placements = Placements()
    with placements.placed("a", 1):
        with placements.placed("a", 1):
            assert placements.worker_for("a", None, {0: 0, 1: 5}) == 1
        assert placements.worker_for("a", None, {0: 0, 1: 5}) == 1
    assert placements.worker_for("a", None, {0: 0, 1: 5}) == 0
