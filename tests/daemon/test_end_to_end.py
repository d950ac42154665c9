"""The main job: a daemon, a VMM that hands over its memory, a source that streams it in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from postcopyd.wire.address import Address
from tests.cutting_relay import Cut, CuttingRelay
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import (
    DEVICE_STATE,
    LENGTHS,
    Image,
    assert_sent,
    running_guest,
)
from tests.support import LIMIT


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path) as daemon:
        yield daemon


@pytest.mark.parametrize("kind", ["anonymous", "memory-file"])
@pytest.mark.parametrize("passes", [0, 1])
def test_the_guest_runs_at_once_and_reads_only_what_the_source_holds(
    daemon: RunningDaemon, tmp_path: Path, kind: str, passes: int
) -> None:
    image = Image(tmp_path / "image", seed=1)
    before = daemon.descriptors()
    with running_guest(daemon, "vm0", kind) as guest:
        (listen,) = guest.says()["listen"]
        source = image.start_sending(listen, "--precopy-passes", str(passes))
        assert_sent(source)
        assert guest.says() == {"complete": True, "changed": 0}
        assert guest.process.wait(LIMIT) == 0
    assert guest.memory() == image.memory
    assert guest.device_state() == DEVICE_STATE
    report = daemon.client.wait("vm0", LIMIT)
    assert report["state"] == "end"
    assert report["received"] == report["length"] == sum(LENGTHS.values())
    assert report["listen"] == [listen]
    assert report["counters"]["pages_by_fault"] > 0 or passes
    daemon.wait_for_descriptors(before)
    assert "Traceback" not in daemon.log


async def test_a_source_comes_back_through_all_breaks(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    image = Image(tmp_path / "image", seed=5)
    total = sum(LENGTHS.values())
    with running_guest(daemon, "vm0", "anonymous") as guest:
        (listen,) = (await asyncio.to_thread(guest.says))["listen"]
        port = Address.parse(listen).port
        cuts = [Cut(forward=total // 4), Cut(backward=20), Cut(forward=total // 4)]
        async with CuttingRelay(port, cuts).listening() as relay:
            source = image.start_sending(f"tcp:127.0.0.1:{relay.port}", "--max-bandwidth", "50M")
            await asyncio.to_thread(assert_sent, source)
        assert await asyncio.to_thread(guest.says) == {"complete": True, "changed": 0}
        assert guest.process.wait(LIMIT) == 0
    assert relay.connections > len(cuts)
    assert guest.memory() == image.memory
    assert guest.device_state() == DEVICE_STATE
    assert daemon.client.wait("vm0", LIMIT)["state"] == "end"


def test_several_migrations_at_once_do_not_mix(daemon: RunningDaemon, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    images = {name: Image(tmp_path / f"image-{name}", seed) for seed, name in enumerate(names)}
    before = daemon.descriptors()
    with ExitStack() as guests:
        running = {
            name: guests.enter_context(running_guest(daemon, name, "anonymous")) for name in names
        }
        sources = [
            images[name].start_sending(guest.says()["listen"][0]) for name, guest in running.items()
        ]
        for source in sources:
            assert_sent(source)
        for name, guest in running.items():
            assert guest.says() == {"complete": True, "changed": 0}
            assert guest.process.wait(LIMIT) == 0
            assert guest.memory() == images[name].memory
    assert [daemon.client.wait(name, LIMIT)["state"] for name in names] == ["end"] * 3
    daemon.wait_for_descriptors(before)


def test_a_source_may_come_before_its_vmm_and_over_a_unix_socket(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    image = Image(tmp_path / "image", seed=2)
    stream = tmp_path / "stream.sock"
    created = daemon.client.create("vm0", listen=f"unix:{stream}")
    assert created["listen"] == [f"unix:{stream}"]
    source = image.start_sending(f"unix:{stream}")
    daemon.wait_for_status(lambda status: "1 none" in status)
    with running_guest(daemon, "vm0", "anonymous") as guest:
        assert guest.says() == {"listen": [f"unix:{stream}"]}
        assert_sent(source)
        assert guest.says() == {"complete": True, "changed": 0}
        assert guest.process.wait(LIMIT) == 0
    assert guest.memory() == image.memory
    assert daemon.client.wait("vm0", LIMIT)["state"] == "end"
    assert not stream.exists()


def test_a_vmm_that_dies_ends_its_migration_alone(daemon: RunningDaemon, tmp_path: Path) -> None:
    image = Image(tmp_path / "image", seed=3)
    before = daemon.descriptors()
    with (
        running_guest(daemon, "dies", "anonymous") as dying,
        running_guest(daemon, "lives", "anonymous") as living,
    ):
        dying.says()
        dying.process.kill()
        report = daemon.client.wait("dies", LIMIT)
        assert report["state"] == "failed"
        assert "the VMM has gone" in report["failure"]
        assert_sent(image.start_sending(living.says()["listen"][0]))
        assert living.says() == {"complete": True, "changed": 0}
        assert living.process.wait(LIMIT) == 0
    assert living.memory() == image.memory
    assert daemon.client.wait("lives", LIMIT)["state"] == "end"
    daemon.wait_for_descriptors(before)
    assert daemon.log.count("the migration has failed") == 1
