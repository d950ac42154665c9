"""A list of what is missing for which there is no room: it waits, and nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from pathlib import Path

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.daemon import missing_memory
from postcopyd.daemon.entry import Entry
from postcopyd.daemon.logging import configured
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.incoming.report import MOST_RANGES, MissingRange, Report
from postcopyd.vmm.client import Block, Destination
from postcopyd.wire import stream_writer
from postcopyd.wire.messages import BlockEntry
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import PAGE, Hosted, Source
from tests.kernel.small_tmpfs import directory_on_small_tmpfs
from tests.support import LIMIT, wait_until

PAGES = 4096
ROOM = 64
"""Pages: more than the list takes."""
EVERY_SECOND = [MissingRange("pc.ram", page * PAGE, PAGE) for page in range(1, PAGES, 2)]


class Full:
    """A directory in which there is room for a file that is empty, and for nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"
        self._filler.write_bytes(bytes(ROOM * PAGE))

    def make_room(self) -> None:
        self._filler.unlink()

    @property
    def files(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path != self._filler]

    @property
    def listed(self) -> list[MissingRange]:
        """What the one file names, which must be whole."""
        (path,) = self.files
        assert path.name.endswith(".missing.json")
        return [MissingRange(**missing) for missing in json.loads(path.read_text())["missing"]]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    """The directory of the lists, with nothing mounted anywhere: it goes away with us."""
    with directory_on_small_tmpfs(ROOM) as path:
        (tmp_path / "records").symlink_to(path)
        yield Full(path)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[str]:
    """Gets an entry when a try to write a list begins; it is tried again soon."""
    tries: asyncio.Queue[str] = asyncio.Queue()
    write_list = missing_memory.write_list

    async def counted(directory: Path, report: Report, ranges: Iterator[MissingRange]) -> Path:
        tries.put_nowait(report.name)
        return await write_list(directory, report, ranges)

    monkeypatch.setattr(missing_memory, "write_list", counted)
    monkeypatch.setattr(missing_memory, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(missing_memory, "_LONGEST_PAUSE", 0.02)
    return tries


@contextlib.contextmanager
def guest(handoff: Path, name: str) -> Iterator[Destination]:
    """A VMM of this process."""
    with contextlib.closing(Block.anonymous("pc.ram", PAGES * PAGE)) as block:
        vmm = Destination(handoff, name, [block], timeout=LIMIT)
        try:
            yield vmm
        finally:
            vmm.close()


async def send_every_second_page(vmm: Destination) -> None:
    """Have the guest run, send it every second page, and go away."""
    source = Source(vmm.listen[0])
    await source.begin([BlockEntry("pc.ram", PAGES * PAGE, PAGE)])
    await source.send_package()
    await asyncio.to_thread(vmm.wait_for_device_state, LIMIT)
    await asyncio.to_thread(vmm.loaded)
    writer = stream_writer.StreamWriter(2)
    await source.send(
        writer.ram_part(),
        writer.zero_pages("pc.ram", range(0, PAGES * PAGE, 2 * PAGE)),
        writer.ram_footer(),
    )
    source.connection.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(LIMIT):  # all of it is read before its end is
        while await asyncio.get_running_loop().sock_recv(source.connection, 4096):
            pass
    source.close()


@pytest.fixture
async def abandoned(full: Full, hosted: Hosted) -> AsyncIterator[Entry]:
    """A migration that was abandoned, with a guest that goes on, and no room for its list."""
    stack = contextlib.ExitStack()
    vmm = await asyncio.to_thread(stack.enter_context, guest(hosted.handoff, "vm0"))
    entry = hosted.registry.get("vm0")
    await send_every_second_page(vmm)
    await hosted.reach(entry, "paused")
    async with asyncio.timeout(LIMIT):
        await hosted.registry.abandon("vm0", force=False)
    await asyncio.to_thread(vmm.wait_for_completion, LIMIT)
    assert vmm.missing == len(EVERY_SECOND) * PAGE
    yield entry
    await asyncio.to_thread(stack.close)


@pytest.fixture
def log() -> Iterator[StringIO]:
    with configured("info", "json", stream=(stream := StringIO())):
        yield stream


def told(log: StringIO) -> list[str]:
    """What was logged of lists."""
    lines = map(json.loads, log.getvalue().splitlines())
    return [line["event"].split(":")[0] for line in lines if "list" in line["event"]]


WAITS = "the list of what is missing cannot be written"
WRITTEN = "what is missing is listed"
GIVEN_UP = "the list of what is missing is given up"


async def test_it_is_written_in_full_when_there_is_room(
    log: StringIO, tries: asyncio.Queue[str], full: Full, abandoned: Entry
) -> None:
    async with asyncio.timeout(LIMIT):
        for _ in range(4):
            await tries.get()
    assert abandoned.migration is not None, "nobody else could tell what is missing"
    assert told(log) == [WAITS], "once, however often it is tried"
    reason = abandoned.view()["missing_list_failure"]
    assert reason.endswith(
        "/vm0.unfinished: No space left on device; tried again until there is room"
    )
    full.make_room()
    async with asyncio.timeout(LIMIT):
        await abandoned.done
    assert full.listed == EVERY_SECOND
    assert len(EVERY_SECOND) > MOST_RANGES
    assert told(log) == [WAITS, WRITTEN]
    assert abandoned.view()["missing_list_failure"] is None
    assert Path(abandoned.view()["missing_list"]).name == full.files[0].name


async def test_the_log_tells_how_much_it_takes(log: StringIO, full: Full, abandoned: Entry) -> None:
    lines = map(json.loads, log.getvalue().splitlines())
    (least,) = (line["least_bytes"] for line in lines if "least_bytes" in line)
    full.make_room()
    abandoned.give_up_list("the test ends")
    async with asyncio.timeout(LIMIT):
        await abandoned.done
    size = full.files[0].stat().st_size
    assert size * 0.7 < least <= size


async def test_nothing_of_it_takes_room_while_it_waits(full: Full, abandoned: Entry) -> None:
    assert full.files == []
    abandoned.give_up_list("the test ends")


async def test_who_waits_for_its_end_is_told(full: Full, abandoned: Entry) -> None:
    async with asyncio.timeout(LIMIT):
        await abandoned.wait(None)
    assert abandoned.state.value == "abandoned"
    abandoned.give_up_list("the test ends")


async def test_it_is_given_up_by_force_only(
    log: StringIO, hosted: Hosted, full: Full, abandoned: Entry
) -> None:
    with pytest.raises(RegistryError, match="but for the list of what is missing") as refused:
        await hosted.registry.remove("vm0", force=False)
    assert refused.value.code == "past-the-package"
    async with asyncio.timeout(LIMIT):
        await hosted.registry.remove("vm0", force=True)
    assert abandoned.migration is None
    assert told(log) == [WAITS, GIVEN_UP]
    assert abandoned.view()["missing_list_failure"].endswith("given up: cancelled by an operator")
    assert full.files == []


async def test_who_stops_waits_for_guests_and_not_for_lists(
    log: StringIO, hosted: Hosted, full: Full, abandoned: Entry
) -> None:
    async with asyncio.timeout(LIMIT):
        await hosted.registry.stop(wait=True)
    assert told(log) == [WAITS, GIVEN_UP]


async def test_who_stops_writes_it_if_there_is_room_by_now(
    log: StringIO, hosted: Hosted, full: Full, abandoned: Entry
) -> None:
    full.make_room()
    async with asyncio.timeout(LIMIT):
        await hosted.registry.stop(wait=True)
    assert full.listed == EVERY_SECOND
    assert told(log) == [WAITS, WRITTEN]


# -- with a daemon of its own --------------------------------------------------------------------


@contextlib.contextmanager
def daemon_without_room(directory: Path) -> Iterator[RunningDaemon]:
    """A daemon that has abandoned a migration, and whose list waits."""
    with running_daemon(directory) as daemon, guest(daemon.handoff, "vm0") as vmm:
        asyncio.run(send_every_second_page(vmm))
        wait_until(lambda: daemon.client.show("vm0")["state"] == "paused")
        abandoned = daemon.client.abandon("vm0")
        assert (abandoned["state"], abandoned["missing_list"]) == ("abandoned", None)
        assert "No space left on device" in abandoned["missing_list_failure"]
        vmm.wait_for_completion(LIMIT)
        yield daemon


@pytest.mark.parametrize("victim", ["worker", "all"])
def test_a_successor_writes_it(tmp_path: Path, full: Full, victim: str) -> None:
    with daemon_without_room(tmp_path) as daemon:
        if victim == "worker":
            daemon.kill_worker()
        else:
            daemon.kill()
            daemon.start()
        wait_until(lambda: daemon.client.show("vm0")["missing_list_failure"])
        assert full.files == []
        full.make_room()
        wait_until(lambda: daemon.client.show("vm0")["missing_list"])
        assert daemon.client.wait("vm0", LIMIT)["missing_list_failure"] is None
        assert full.listed == EVERY_SECOND
        wait_until(lambda: not any("vm0" in name for name in daemon.manager.stored))


def test_a_daemon_that_is_told_to_stop_stops(tmp_path: Path, full: Full) -> None:
    with daemon_without_room(tmp_path) as daemon:
        with pytest.raises(ControlError, match="but for the list"):
            daemon.client.cancel("vm0")
        daemon.terminate()
        assert daemon.ended() == 0
        assert GIVEN_UP in daemon.log
    assert full.files == []
