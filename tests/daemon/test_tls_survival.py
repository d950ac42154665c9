"""A daemon that speaks TLS and is killed: its guest goes on, and nobody gets in who may not."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest

from tests.daemon.named_source import ALLOWED, VM, NamedSource, named_source
from tests.daemon.whole_migration import DEVICE_STATE, Guest, Image, running_guest
from tests.holding_relay import HoldingRelay
from tests.support import LIMIT, wait_until
from tests.torture.kills import Point, arm, happened
from tests.torture.victims import Victim

HALF = 1 << 20
"""Bytes of the stream, of six times as many, that come before the kill."""
PART_OF_A_HANDSHAKE = 100
"""Bytes of a source's first flight."""

pytestmark = pytest.mark.timeout(120)

Killed = Literal["worker", "all"]


def kill(it: NamedSource, killed: Killed) -> None:
    if killed == "worker":
        it.daemon.kill_worker(it.show()["worker"])
    else:
        it.kill_all()


def assert_came_back(source: subprocess.Popen[str]) -> None:
    """It has heard that all is well, on another connection than its first one."""
    output, errors = source.communicate(timeout=LIMIT)
    assert source.returncode == 0, errors
    summary = json.loads(output)
    assert summary["completed"] and summary["reconnects"] > 0, summary


def assert_complete(guest: Guest, image: Image) -> None:
    """The guest has all its memory, has seen none of it change, and ends."""
    assert guest.says() == {"complete": True, "changed": 0}
    assert guest.process.wait(LIMIT) == 0
    assert guest.memory() == image.memory
    assert guest.device_state() == DEVICE_STATE


async def within(function: Callable[..., None], *arguments: object) -> None:
    """Call it beside the relay."""
    async with asyncio.timeout(2 * LIMIT):
        await asyncio.to_thread(function, *arguments)


@pytest.mark.parametrize(("killed", "kind"), [("worker", "anonymous"), ("all", "memory-file")])
async def test_after_a_kill_the_source_comes_back_over_tls_and_nobody_else_may(
    tmp_path: Path, killed: Killed, kind: str
) -> None:
    image = Image(tmp_path / "image", seed=9)
    with named_source(tmp_path) as it, running_guest(it.daemon, VM, kind) as guest:
        rules = it.rules()
        assert (rules["allowed_sources"], rules["security"]) == ([ALLOWED], "tls")
        async with HoldingRelay(it.port, HALF).listening() as relay:
            guest.says()
            with image.start_sending(f"tcp:127.0.0.1:{relay.port}", *it.options) as source:
                try:
                    async with asyncio.timeout(LIMIT):
                        await relay.holds.wait()
                    await within(it.reach, "running")
                    await within(it.assert_a_stranger_is_refused)
                    await within(kill, it, killed)
                    await within(it.reach, "paused")
                    assert it.rules() == rules
                    await within(it.assert_a_stranger_is_refused)
                    assert it.show()["state"] == "paused"
                    relay.go_on()
                    await within(assert_came_back, source)
                finally:
                    source.kill()
        assert_complete(guest, image)
        it.assert_nobody_else_was_let_in()
        it.reach("end")
        assert it.show()["peer"].endswith(", CN=allowed,O=Tests")
        assert it.rules() == rules


@pytest.mark.parametrize("killed", ["worker", "all"])
async def test_a_kill_in_the_middle_of_the_first_handshake_costs_another_connection(
    tmp_path: Path, killed: Killed
) -> None:
    image = Image(tmp_path / "image", seed=9)
    with named_source(tmp_path) as it, running_guest(it.daemon, VM, "anonymous") as guest:
        async with HoldingRelay(it.port, PART_OF_A_HANDSHAKE).listening() as relay:
            guest.says()
            with image.start_sending(f"tcp:127.0.0.1:{relay.port}", *it.options) as source:
                try:
                    async with asyncio.timeout(LIMIT):
                        await relay.holds.wait()
                    await within(kill, it, killed)
                    relay.go_on()
                    await within(assert_came_back, source)
                finally:
                    source.kill()
        assert_complete(guest, image)
        it.reach("end")


@pytest.mark.parametrize("killed", ["worker", "all"])
def test_a_migration_that_waits_lets_only_its_source_in_after_a_kill(
    tmp_path: Path, killed: Killed
) -> None:
    image = Image(tmp_path / "image", seed=9)
    with named_source(tmp_path) as it, running_guest(it.daemon, VM, "anonymous") as guest:
        rules = it.rules()
        (listen,) = guest.says()["listen"]
        for _ in range(2):
            kill(it, killed)
            assert it.rules() == rules
            it.assert_a_stranger_is_refused()
        with image.start_sending(listen, *it.options) as source:
            try:
                _, errors = source.communicate(timeout=LIMIT)
            finally:
                source.kill()
        assert source.returncode == 0, errors
        assert_complete(guest, image)
        it.assert_nobody_else_was_let_in()


THE_END = {
    "all has come": Point("before", "postcopyd.incoming.filling:MemoryFilling.finish"),
    "its end is on record": Point("before", "postcopyd.incoming.source_link:SourceLink.confirm"),
}


@pytest.mark.parametrize(("killed", "victim"), [("worker", "worker"), ("all", "both")])
@pytest.mark.parametrize("when", THE_END)
def test_who_has_sent_everything_over_tls_comes_back_and_hears_that_all_is_well(
    tmp_path: Path, when: str, killed: Killed, victim: Victim
) -> None:
    """Its connection could not be kept: nobody else knows the keys of the session."""
    image = Image(tmp_path / "image", seed=9)
    with (
        named_source(tmp_path, environment=arm(tmp_path, [(THE_END[when], victim)])) as it,
        running_guest(it.daemon, VM, "anonymous") as guest,
    ):
        (listen,) = guest.says()["listen"]
        with image.start_sending(listen, *it.options) as source:
            try:
                with it.dying() if killed == "all" else nullcontext():
                    wait_until(lambda: happened(tmp_path))
                assert_came_back(source)
            finally:
                source.kill()
        assert_complete(guest, image)
        it.assert_nobody_else_was_let_in()
