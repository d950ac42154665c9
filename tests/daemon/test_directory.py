"""Which worker has which migration."""

from __future__ import annotations

import pytest

from postcopyd.daemon.directory import Directory, Place


@pytest.fixture
def directory() -> Directory:
    return Directory(3, migrations=4, ended=2)


def test_a_name_is_one_workers_until_it_is_given_up(directory: Directory) -> None:
    assert directory.claim(1, "a") is None
    assert directory.claim(2, "a") == directory.claim(1, "a") == "name-taken"
    assert not directory.give_up(2, "a")
    assert directory.owner_of("a") == directory.where("a") == 1
    assert directory.give_up(1, "a")
    assert directory.claim(2, "a") is None


def test_there_are_only_so_many_over_all_workers(directory: Directory) -> None:
    for number, name in enumerate("abcd"):
        assert directory.claim(number % 3, name) is None
    assert directory.claim(0, "e") == "too-many-migrations"
    directory.note(0, "a", "", "unreadable")
    assert directory.claim(0, "e") is None


def test_what_a_killed_daemon_has_left_is_shared_out(directory: Directory) -> None:
    directory.spread({"d", "b", "c", "a"})
    assert [directory.number_of(number) for number in range(3)] == [2, 1, 1]
    assert directory.of(0) == {"a", "d"}
    assert directory.claim(1, "d") == "name-taken"


def test_what_has_ended_is_found_where_it_is_listed(directory: Directory) -> None:
    directory.claim(1, "a")
    directory.note(1, "a", "running", "running")
    directory.give_up(1, "a")
    directory.note(1, "a", "end", "ended")
    assert (directory.where("a"), directory.owner_of("a")) == (1, None)
    directory.strike(1, "a")
    assert directory.where("a") is None


def test_one_of_the_same_name_elsewhere_has_what_has_ended_forgotten(directory: Directory) -> None:
    directory.note(1, "a", "end", "ended")
    directory.claim(2, "a")
    assert directory.note(2, "a", "none", "waiting") == [Place(1, "a")]
    assert directory.where("a") == 2
    # The same if it is heard of only now that it has ended.
    assert directory.note(0, "a", "end", "ended") == [Place(0, "a")]


def test_what_is_to_be_forgotten_is_said_once(directory: Directory) -> None:
    for name in "abcd":
        directory.note(0, name, "end", "ended")
    assert directory.note(0, "e", "end", "ended") == [Place(0, "c")]
    # One that has begun anew is another one.
    assert directory.note(0, "a", "none", "waiting") == []
    assert directory.note(0, "a", "end", "ended") == [Place(0, "d")]
    assert directory.note(1, "f", "end", "ended") == [Place(0, "e")]
    assert directory.note(1, "g", "end", "ended") == [Place(0, "a")]


def test_the_oldest_that_have_ended_are_forgotten_first(directory: Directory) -> None:
    directory.note(0, "a", "none", "waiting")
    directory.note(1, "b", "end", "ended")
    directory.note(0, "a", "end", "ended")
    assert directory.note(2, "c", "failed", "ended") == [Place(1, "b")]
    directory.strike(1, "b")
    assert directory.note(2, "d", "failed", "ended") == [Place(0, "a")]


def test_a_successor_keeps_the_names_of_which_something_is_held(directory: Directory) -> None:
    for name in ("held", "begun", "ended"):
        directory.claim(1, name)
    directory.claim(2, "other")
    directory.note(1, "held", "running", "running")
    directory.give_up(1, "ended")
    directory.note(1, "ended", "end", "ended")
    directory.note(2, "other", "running", "running")
    directory.died(1, {"held", "other"})
    assert directory.of(1) == {"held"} and directory.of(2) == {"other"}
    assert directory.claim(0, "begun") is None
    # Until the successor has listed what it has, whoever asks for that is to wait for it.
    assert directory.where("ended") == directory.where("held") == 1
    directory.note(1, "held", "paused", "running")
    directory.ready(1)
    assert (directory.where("ended"), directory.where("held")) == (None, 1)
    assert directory.under_way() == ["other", "held"] or directory.under_way() == ["held", "other"]


def test_those_that_wait_for_a_vmm_are_told(directory: Directory) -> None:
    directory.note(0, "a", "none", "waiting")
    directory.note(1, "b", "none", "waiting")
    directory.note(1, "c", "none", "running")
    assert directory.waiting() == ["a", "b"]
    directory.note(0, "a", "none", "running")
    assert directory.waiting() == ["b"]


def test_the_summary_says_where_they_are(directory: Directory) -> None:
    assert directory.summary() == "no migration is under way"
    directory.note(0, "a", "none", "waiting")
    assert directory.summary() == "1 migration under way: 1 none"
    directory.note(1, "b", "running", "running")
    assert directory.summary() == "2 migrations under way: 1 none, 1 running"
    directory.note(0, "a", "failed", "ended")
    assert directory.summary() == "1 migration under way: 1 running"
