"""Log events as they reach the journal, a terminal and a program that reads JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import TextIO, get_args

import pytest
import structlog

from postcopyd.daemon import event_log
from postcopyd.daemon.logging import configured, get_logger
from postcopyd.daemon.service import log_unexpected
from postcopyd.incoming import events
from postcopyd.incoming.states import State
from tests.daemon.journald import FakeJournald
from tests.support import belongings


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[FakeJournald]:
    journald = FakeJournald(tmp_path / "socket")
    with configured("debug", "journal", journal_path=journald.path):
        yield journald
    journald.close()


def test_an_event_has_journal_fields(journald: FakeJournald) -> None:
    get_logger().warning("a thing", migration="vm0", size=3, message_id="0" * 32)
    line = sys._getframe().f_lineno - 1
    assert journald.entry() == {
        "MESSAGE": "a thing (migration=vm0, size=3)",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "postcopyd",
        "MESSAGE_ID": "0" * 32,
        "CODE_FILE": __file__,
        "CODE_LINE": str(line),
        "CODE_FUNC": "test_an_event_has_journal_fields",
        "POSTCOPYD_MIGRATION": "vm0",
        "POSTCOPYD_SIZE": "3",
    }


def test_each_level_has_its_priority(journald: FakeJournald) -> None:
    log = get_logger()
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    assert [journald.entry()["PRIORITY"] for _ in range(4)] == ["7", "6", "4", "3"]


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")],
)
def test_what_is_below_the_level_is_not_logged(level: str, expected: str) -> None:
    stream = StringIO()
    with configured(level, "json", stream=stream):
        log = get_logger()
        log.debug("d")
        log.info("i")
        log.warning("w")
        log.error("e")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == list(expected)


def test_an_exception_is_one_entry_with_its_traceback(journald: FakeJournald) -> None:
    try:
        raise ValueError("what was wrong")
    except ValueError:
        get_logger().exception("it failed")
    entry = journald.entry()
    first, *rest = entry["MESSAGE"].splitlines()
    assert first == "it failed"
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: what was wrong"
    assert entry["PRIORITY"] == "3"


def test_lost_entries_are_owned_up_to(journald: FakeJournald) -> None:
    for _ in range(1000):
        get_logger().info("a flood")
    taken = 1
    journald.entry()
    get_logger().info("the next")
    while (entry := journald.entry())["MESSAGE"] == "a flood":
        taken += 1
    assert entry["POSTCOPYD_ENTRIES_LOST"] == str(1000 - taken)
    get_logger().info("and one more")
    assert "POSTCOPYD_ENTRIES_LOST" not in journald.entry()


def test_what_libraries_warn_of_takes_the_same_way(journald: FakeJournald) -> None:
    logging.getLogger("aiohttp.server").info("not worth it")
    logging.getLogger("aiohttp.server").error("broken: %s", "reason")
    entry = journald.entry()
    assert entry["MESSAGE"] == "broken: reason (logger=aiohttp.server)"
    assert entry["CODE_FUNC"] == "test_what_libraries_warn_of_takes_the_same_way"


SAMPLES: list[events.Event] = [
    events.StateChanged(State.NONE, State.ADVISE),
    events.VmmAttached("pid 1, uid 0", 2, 8192),
    events.StreamAttached("192.0.2.1:5"),
    events.StreamDropped("192.0.2.1:5"),
    events.PreemptAttached("192.0.2.1:6"),
    events.ConnectionRefused("192.0.2.9:5", "migration 'vm0' already has a source: 192.0.2.1:5"),
    events.Converged(),
    events.PackageReceived(100),
    events.DeviceStateLoaded(0.5),
    events.MemoryRemoved("pc.ram", 0, 4096),
    events.PathLost("link eth0 is down"),
    events.PathBack(),
    events.Stalled(30.0, 3),
    events.StallOver(31.0),
    events.Abandoned(7, 28672),
    events.VmmLost("the VMM failed"),
    events.Paused("the stream broke"),
    events.Resumed("192.0.2.1:7", 3),
    events.VmmUnheard("another client holds its monitor"),
    events.VmmHeard(),
    events.Restored("paused", 7),
    events.NotNoted("no memory"),
    events.Completed(10, 2, 1.5),
    events.Failed("no reason", guest_lost=False),
    events.Failed("no reason", guest_lost=True),
]


def test_every_event_of_the_engine_has_an_identifier_of_its_own(journald: FakeJournald) -> None:
    identifiers: dict[str, type] = {}
    for event in SAMPLES:
        event_log.log_event("vm0", event)
        entry = journald.entry()
        assert entry["POSTCOPYD_MIGRATION"] == "vm0"
        assert identifiers.setdefault(entry["MESSAGE_ID"], type(event)) is type(event)
    assert set(identifiers.values()) == set(get_args(events.Event))
    assert len(event_log.MESSAGE_IDS) == len(identifiers) + 10
    assert set(identifiers) < event_log.MESSAGE_IDS


def test_a_failure_says_what_becomes_of_the_guest(journald: FakeJournald) -> None:
    event_log.log_event("vm0", events.Failed("no reason", guest_lost=False))
    event_log.log_event("vm0", events.Failed("no reason", guest_lost=True))
    before, after = journald.entry(), journald.entry()
    assert (before["PRIORITY"], before["POSTCOPYD_GUEST"]) == ("4", "goes on at the source")
    assert (after["PRIORITY"], after["POSTCOPYD_GUEST"]) == ("3", "lost")
    assert before["POSTCOPYD_REASON"] == "no reason"


async def test_an_exception_that_nobody_caught_is_one_entry(journald: FakeJournald) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_unexpected)
    loop.call_soon(lambda: 1 // 0)
    await asyncio.sleep(0)
    entry = journald.entry()
    assert entry["MESSAGE_ID"] == event_log.INTERNAL_ERROR_ID
    assert entry["MESSAGE"].endswith("ZeroDivisionError: integer division or modulo by zero")


def test_a_console_gets_lines_to_read() -> None:
    stream = StringIO()
    with configured("info", "console", stream=stream):
        get_logger().info("a thing", migration="vm0", message_id="0" * 32)
        get_logger().info("another")
    first, second = stream.getvalue().splitlines()
    assert "a thing" in first and "migration=vm0" in first
    assert "0" * 32 not in first and __file__ not in first and "\x1b" not in first
    assert "another" in second


def test_a_console_shows_what_it_would_act_on() -> None:
    stream = StringIO()
    with configured("info", "console", stream=stream):
        get_logger().info("a thing", block="\x1b[2J", reason="two\nlines")
    (line,) = stream.getvalue().splitlines()
    assert r"\x1b[2J" in line and r"two\nlines" in line


def test_json_is_one_object_a_line() -> None:
    stream = StringIO()
    with configured("info", "json", stream=stream):
        get_logger().info("a thing\nof two lines", migration="vm0", path=Path("/x"))
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "a thing\nof two lines",
        "level": "info",
        "migration": "vm0",
        "path": "/x",
    }


@pytest.mark.parametrize("ours", [True, False], ids=["the journal's", "redirected"])
def test_auto_is_the_journal_only_if_the_stream_is_the_journals(
    ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journald = FakeJournald(tmp_path / "socket")
    stream: TextIO
    with (tmp_path / "stream").open("w+") as stream:
        status = os.fstat(stream.fileno())
        inode = status.st_ino if ours else status.st_ino + 1
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{inode}")
        with configured("info", "auto", stream=stream, journal_path=journald.path):
            get_logger().info("a thing")
        stream.seek(0)
        if ours:
            assert journald.entry()["MESSAGE"] == "a thing"
            assert stream.read() == ""
        else:
            assert "a thing" in stream.read()
    journald.close()


def test_a_journal_that_is_asked_for_and_not_there_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="no journald listens here"),
        configured("info", "journal", journal_path=str(tmp_path / "nothing")),
    ):
        raise AssertionError("unreachable")


def test_nothing_of_a_configuration_is_left_behind(tmp_path: Path) -> None:
    journald = FakeJournald(tmp_path / "socket")
    before = belongings(), list(logging.getLogger().handlers), structlog.get_config()
    with configured("info", "journal", journal_path=journald.path):
        assert (belongings(), logging.getLogger().handlers) != before[:2]
    assert (belongings(), logging.getLogger().handlers, structlog.get_config()) == before
    journald.close()
