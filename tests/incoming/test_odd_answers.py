"""What the kernel answers when a VMM does to its memory what it likes, in whole migrations.

The VMM is a process of its own. docs/reliability.md has a table of all of these answers.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.staging import BlockStage
from postcopyd.incoming.states import State
from postcopyd.incoming.unstaging import Unstaging
from postcopyd.incoming.vmm import GuestMemory
from postcopyd.kernel.huge_pages import free_huge_pages
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import PageRequest
from tests.incoming.engine import Engine, InProcessVmm, Source, image
from tests.incoming.guest import HUGE, LIMIT, PAGE, Guest
from tests.incoming.test_recovery import go_on, seen
from tests.torture.guest_memory import GuestElsewhere, engine_for

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")

MakeMigration = Callable[[int], tuple[GuestElsewhere, Engine]]
MakeEngine = Callable[..., Engine]


@pytest.fixture
async def migration() -> AsyncIterator[MakeMigration]:
    """Make migrations into processes of their own."""
    made: list[Engine] = []

    def make(pages: int) -> tuple[GuestElsewhere, Engine]:
        guest = GuestElsewhere(pages)
        made.append(engine_for(guest))
        return guest, made[-1]

    yield make
    for engine in made:
        await engine.close()


async def runs(engine: Engine, length: int) -> None:
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, length)]})
    await engine.reach(State.RUNNING)


async def ends_well(engine: Engine) -> None:
    await engine.source.end()
    assert (await engine.source.wait_for_shut()).status == 0
    engine.source.close()
    await engine.finish()
    assert engine.migration.state is State.END


async def test_a_vmm_that_forks_while_it_is_filled_gets_all_its_pages(
    migration: MakeMigration,
) -> None:
    guest, engine = migration(256)
    content = image(256)
    await runs(engine, guest.length)
    forks = asyncio.ensure_future(
        guest.ask(
            "[(lambda child: os._exit(0) if not child else os.waitpid(child, 0))(os.fork())"
            " for _ in range(20)] and 1"
        )
    )
    for first in range(0, guest.length, 8 * PAGE):
        await engine.source.postcopy("pc.ram", content, range(first, first + 8 * PAGE, PAGE))
    assert await forks == "1"
    await ends_well(engine)
    assert await guest.content() == content


async def test_memory_that_moves_away_while_it_is_filled_is_dropped_and_the_rest_is_right(
    migration: MakeMigration,
) -> None:
    """Without the event nobody is told; with it the handoff would have been refused."""
    guest, engine = migration(128)
    content = image(128)
    await runs(engine, guest.length)
    await engine.source.postcopy("pc.ram", content, range(0, 96 * PAGE, PAGE))
    moved = await guest.ask(
        "setattr(libc.mremap, 'restype', ctypes.c_void_p) or 0 < libc.mremap("
        f"ctypes.c_void_p(mapping.address + {64 * PAGE}), ctypes.c_size_t({64 * PAGE}),"
        f" ctypes.c_size_t({128 * PAGE}), 1)"
    )
    assert moved == "True"
    await engine.source.postcopy("pc.ram", content, range(96 * PAGE, 128 * PAGE, PAGE))
    await ends_well(engine)
    assert await guest.content(0, 64) == content[: 64 * PAGE]


@pytest.mark.parametrize("abandoned", [False, True], ids=["complete", "abandoned"])
async def test_a_whole_block_that_is_unmapped_does_not_keep_the_others_from_their_end(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, abandoned: bool
) -> None:
    """The kernel has nothing to unregister then, and says EINVAL."""
    engine = make_engine(pages=16)
    content = image(16)
    with Guest(pages=4, name="dimm1", register=False) as dimm:
        own = engine.guest.memory
        memory = GuestMemory(dimm.memory.blocks + own.blocks, own.userfaultfd, registered=False)
        monkeypatch.setattr(InProcessVmm, "memory", memory)
        engine.source.add_block("dimm1", 4 * PAGE)
        engine.attach()
        await engine.source.advise()
        await engine.source.switch_over({"pc.ram": [(0, 16 * PAGE)], "dimm1": [(0, 4 * PAGE)]})
        await engine.reach(State.RUNNING)
        await asyncio.to_thread(dimm.unmap(0, 4).join, LIMIT)
        dimm.pages = 0  # for its end: whatever is mapped there now is another's
        await engine.source.postcopy("pc.ram", content, range(0, 16 * PAGE, PAGE))
        if abandoned:
            await seen(engine.source)
            engine.migration.abandon(force=True)
            await engine.finish()
            assert engine.migration.state is State.ABANDONED
        else:
            await engine.source.postcopy("dimm1", content, range(0, 4 * PAGE, PAGE))
            await ends_well(engine)
    assert await engine.guest.content() == content
    # Nothing is watched any more.
    assert own.userfaultfd.zeropage(engine.guest.address, PAGE) == -errno.ENOENT


async def test_a_vmm_that_exits_with_faults_outstanding_ends_its_migration(
    migration: MakeMigration,
) -> None:
    guest, engine = migration(64)
    content = image(64)
    await runs(engine, guest.length)
    await guest.ask(
        "[threading.Thread(daemon=True, target=libc.memchr, args=("
        f"ctypes.c_void_p(mapping.address + page * {PAGE}), 1, 1)).start()"
        " for page in range(0, 64, 4)] and 1"
    )
    for _ in range(3):
        assert isinstance(await engine.source.wait_for_request(), PageRequest)
    guest.process.kill()
    await engine.source.postcopy("pc.ram", content, range(0, 64 * PAGE, PAGE))
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert "the VMM has exited" in (engine.migration.failure or "")
    assert len(engine.failures) == 1


async def test_what_is_given_back_while_it_is_filled_is_zeros_and_the_rest_is_right(
    migration: MakeMigration,
) -> None:
    """Before its page has come, while it comes, and after; never filled from the source again."""
    guest, engine = migration(256)
    content = image(256)
    await runs(engine, guest.length)
    await engine.source.postcopy("pc.ram", content, range(0, 64 * PAGE, PAGE))
    removed = [*range(10, 20), *range(100, 140), *range(200, 210)]
    removing = asyncio.ensure_future(
        guest.ask(
            f"[libc.madvise(ctypes.c_void_p(mapping.address + page * {PAGE}),"
            f" ctypes.c_size_t({PAGE}), 4) for page in {removed}].count(0)"
        )
    )
    for first in range(64, 256, 4):
        await engine.source.postcopy(
            "pc.ram", content, range(first * PAGE, (first + 4) * PAGE, PAGE)
        )
    assert await removing == str(len(removed))
    # Once more, as a source that has lost its bitmap would.
    await engine.source.postcopy("pc.ram", content, range(0, 256 * PAGE, PAGE))
    await ends_well(engine)
    came = await guest.content()
    for page in range(256):
        wanted = bytes(PAGE) if page in removed else content[page * PAGE : (page + 1) * PAGE]
        assert came[page * PAGE : (page + 1) * PAGE] == wanted, page


async def test_a_huge_page_that_is_given_back_before_the_guest_runs_is_zeros(
    make_engine: MakeEngine, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(2)
    engine = make_engine(pages=2, page_size=HUGE)
    content = image(2, HUGE)
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, 2 * HUGE)]})
    await asyncio.wait_for(engine.vmm.asked_to_load.wait(), LIMIT)
    await asyncio.to_thread(engine.guest.remove(1).join, LIMIT)
    await engine.source.postcopy("pc.ram", content, range(0, 2 * HUGE, PAGE))
    engine.vmm.may_load.set()
    await engine.reach(State.RUNNING)
    await ends_well(engine)
    assert engine.migration.report().counters.pages_removed == 1
    assert await engine.guest.content() == content[:HUGE] + bytes(HUGE)


async def test_a_page_that_comes_twice_does_not_undo_what_the_guest_wrote_in_between(
    migration: MakeMigration,
) -> None:
    """The answer to a fault and the background bring the same page."""
    guest, engine = migration(16)
    content = image(16)
    await runs(engine, guest.length)
    touch = asyncio.ensure_future(
        guest.ask(f"ctypes.memset(mapping.address + {5 * PAGE}, 0x77, 8) and 1")
    )
    assert await engine.source.wait_for_request() == PageRequest("pc.ram", 5 * PAGE, PAGE)
    await engine.source.postcopy("pc.ram", content, [5 * PAGE])
    assert await touch == "1"
    await engine.source.postcopy("pc.ram", content, range(0, 16 * PAGE, PAGE))
    await ends_well(engine)
    assert engine.migration.report().counters.pages_duplicate == 1
    written = content[: 5 * PAGE] + b"\x77" * 8 + content[5 * PAGE + 8 :]
    assert await guest.content() == written


async def test_huge_pages_do_not_form_over_pages_that_have_yet_to_come(
    migration: MakeMigration,
) -> None:
    pages = 2 * HUGE // PAGE
    guest, engine = migration(pages)
    content = image(64)
    await runs(engine, guest.length)
    assert await guest.advise(0, pages, MADV_HUGEPAGE) == 0
    await engine.source.postcopy("pc.ram", content, range(0, 64 * PAGE, PAGE))
    # The one whole huge page of it: this is refused, or does not fill what is missing.
    await guest.ask(
        "libc.madvise(ctypes.c_void_p(-(-mapping.address // (2 << 20)) * (2 << 20)),"
        f" ctypes.c_size_t(2 << 20), {MADV_COLLAPSE})"
    )
    touch = asyncio.ensure_future(guest.content(pages - 1, 1))
    asked = await engine.source.wait_for_request()
    assert asked.offset == (pages - 1) * PAGE
    await engine.source.postcopy("pc.ram", b"\xee" * guest.length, [asked.offset])
    assert await touch == b"\xee" * PAGE
    await ends_well(engine)
    assert await guest.content(0, 64) == content
    assert await guest.content(64, 1) == bytes(PAGE)


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """A group of processes with little memory, in which nobody is killed when it is used up."""
    group = MEMORY_CGROUPS / f"postcopyd-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(24 << 20))
    (group / "memory.oom_control").write_text("1")
    yield group
    group.rmdir()


@pytest.mark.skipif(
    not (MEMORY_CGROUPS / "memory.oom_control").exists(),
    reason="cgroup v2 kills a process over its limit: only v1 lets the kernel say ENOMEM",
)
async def test_a_vmm_at_its_limit_of_memory_is_filled_when_it_has_more(
    migration: MakeMigration, memory_limit: Path
) -> None:
    guest, engine = migration((32 << 20) // PAGE)
    (memory_limit / "cgroup.procs").write_text(str(guest.process.pid))
    content = image(256) * (guest.length // (256 * PAGE))
    await runs(engine, guest.length)
    sending = asyncio.ensure_future(
        engine.source.postcopy("pc.ram", content, range(0, guest.length, PAGE))
    )
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().counters.retries < 5:
            await asyncio.sleep(0.01)
    assert engine.migration.state is State.RUNNING
    (memory_limit / "memory.limit_in_bytes").write_text(str(512 << 20))
    await sending
    await ends_well(engine)
    there = await guest.ask(
        "__import__('hashlib').sha256("
        f"ctypes.string_at(mapping.address, {guest.length})).hexdigest()"
    )
    assert there == hashlib.sha256(content).hexdigest()
    guest.process.kill()


@contextmanager
def used_up_pool() -> Iterator[None]:
    """All huge pages that are free are promised to somebody else."""
    free = free_huge_pages(HUGE)
    hungry = Guest(pages=free, page_size=HUGE) if free else None
    yield
    if hungry is not None:
        hungry.close()


def fails_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, code: int
) -> Callable[[], bool]:
    """Have a method fail the next time it is called; return who tells whether it was."""
    original = getattr(owner, name)
    calls: list[object] = []

    def method(self: object, *arguments: object) -> object:
        calls.append(self)
        if len(calls) == 1:
            raise OSError(code, os.strerror(code))
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, method)
    return lambda: bool(calls)


@pytest.mark.parametrize("what", ["address_of", "release"])
async def test_what_is_staged_is_placed_when_there_is_memory_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The staging is mapped a piece at a time, and given back so: either takes memory of ours."""
    engine = make_engine(pages=128)
    content = image(128)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 128 * PAGE, PAGE))
    failed = fails_once(monkeypatch, BlockStage, what, errno.ENOMEM)
    await engine.source.switch_over({})
    await ends_well(engine)
    assert failed()
    assert not engine.failures
    assert await engine.guest.content() == content


async def is_loading(engine: Engine, content: bytes, pages: int) -> None:
    """So many pages are staged, and the VMM loads its devices until it is told that it may."""
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, pages * PAGE, PAGE))
    await engine.source.switch_over({})
    await asyncio.wait_for(engine.vmm.asked_to_load.wait(), LIMIT)


async def test_a_fault_on_what_is_staged_is_answered_when_there_is_memory_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    await is_loading(engine, content, 16)
    failed = fails_once(monkeypatch, BlockStage, "address_of", errno.ENOMEM)
    touch = engine.guest.touch(11)
    assert await asyncio.to_thread(touch.result) == content[11 * PAGE : 12 * PAGE]
    assert failed()
    engine.vmm.may_load.set()
    await ends_well(engine)
    assert not engine.failures
    assert await engine.guest.content() == content


async def test_nothing_is_placed_of_what_is_staged_between_an_error_and_the_sources_return(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the VMM has loaded meanwhile; and then it is placed once."""
    engine = make_engine(pages=512)
    content = image(512)
    await is_loading(engine, content, 508)
    fails_once(monkeypatch, BlockStage, "address_of", errno.EIO)
    touch = engine.guest.touch(3)
    await engine.reach(State.PAUSED)
    engine.vmm.may_load.set()
    await engine.told(events.DeviceStateLoaded)
    batches = 0
    place_batch = Unstaging._place_batch

    def counted(self: Unstaging) -> None:
        nonlocal batches
        batches += 1
        place_batch(self)

    monkeypatch.setattr(Unstaging, "_place_batch", counted)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not batches
    source = Source(engine.connect_again(), engine.source.blocks)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await go_on(source)
    assert await asyncio.to_thread(touch.result) == content[3 * PAGE : 4 * PAGE]
    await source.postcopy("pc.ram", content, range(508 * PAGE, 512 * PAGE, PAGE))
    await source.end()
    assert (await source.wait_for_shut()).status == 0
    assert len(engine.failures) == 1
    assert await engine.guest.content() == content


@pytest.mark.parametrize("who", ["a fault", "the background"])
async def test_what_cannot_be_read_of_the_staging_is_tried_again_when_the_source_is_back(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    await is_loading(engine, content, 12)
    fails_once(monkeypatch, BlockStage, "address_of", errno.EIO)
    touch = engine.guest.touch(3) if who == "a fault" else None
    if touch is None:
        engine.vmm.may_load.set()
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == "filling the memory failed: [Errno 5] Input/output error"
    source = Source(engine.connect_again(), engine.source.blocks)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await go_on(source)
    if touch is not None:
        assert await asyncio.to_thread(touch.result) == content[3 * PAGE : 4 * PAGE]
        engine.vmm.may_load.set()
    await source.postcopy("pc.ram", content, range(12 * PAGE, 16 * PAGE, PAGE))
    await source.end()
    assert (await source.wait_for_shut()).status == 0
    assert await engine.guest.content() == content


async def test_what_cannot_be_read_of_the_staging_is_tried_again_before_the_rest_is_abandoned(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 12 * PAGE, PAGE))
    fails_once(monkeypatch, BlockStage, "address_of", errno.EIO)
    await engine.source.switch_over({})
    await engine.reach(State.PAUSED)
    engine.migration.abandon(force=False)
    await engine.finish()
    assert engine.migration.state is State.ABANDONED
    for page in range(12):
        here = content[page * PAGE : (page + 1) * PAGE]
        assert await asyncio.to_thread(engine.guest.read, page) == here


async def test_a_mistake_behind_a_page_that_was_put_off_ends_its_stream_alone(
    make_engine: MakeEngine, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(4)
    engine = make_engine(pages=4, page_size=HUGE, reserve=False)
    content = image(4, HUGE)
    await runs(engine, 4 * HUGE)
    await engine.source.postcopy("pc.ram", content, range(0, HUGE - PAGE, PAGE))
    await seen(engine.source)
    with used_up_pool():
        writer = engine.source.writer
        # In one message: the end of a huge page, and others that interrupt each other.
        offsets = [HUGE - PAGE, *range(2 * HUGE + PAGE, 2 * HUGE + 13 * PAGE, 3 * PAGE)]
        records = [writer.page("pc.ram", offset) + content[:PAGE] for offset in offsets]
        await engine.source.send(writer.ram_part(), *records)
        await put_off(engine)
    await engine.reach(State.PAUSED)
    assert "begins at" in (engine.migration.failure or "")
    # Faults and removals are read on.
    await asyncio.to_thread(engine.guest.remove(3).join, LIMIT)
    assert await asyncio.to_thread(engine.guest.touch(3).result) == bytes(PAGE)


async def put_off(engine: Engine) -> None:
    """Return when something could not be placed."""
    async with asyncio.timeout(LIMIT):
        while not engine.migration.report().counters.retries:
            await asyncio.sleep(0)


async def test_staged_huge_pages_wait_for_a_pool_that_is_used_up(
    make_engine: MakeEngine, huge_pages: Callable[[int], None]
) -> None:
    """The kernel says then that they are there already."""
    huge_pages(2)
    engine = make_engine(pages=2, page_size=HUGE, reserve=False)
    content = image(2, HUGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 2 * HUGE, PAGE))
    with used_up_pool():
        await engine.source.switch_over({})
        await engine.reach(State.RUNNING)
        await put_off(engine)
    await ends_well(engine)
    assert await engine.guest.content() == content


async def test_a_huge_page_that_was_placed_for_the_devices_holds_nothing_up_in_a_used_up_pool(
    make_engine: MakeEngine, huge_pages: Callable[[int], None]
) -> None:
    """A pool has as many pages as its guest needs, so used up is what it usually is."""
    huge_pages(2)
    engine = make_engine(pages=2, page_size=HUGE)
    content = image(2, HUGE)
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 2 * HUGE, PAGE))
    await engine.source.switch_over({})
    await asyncio.wait_for(engine.vmm.asked_to_load.wait(), LIMIT)
    assert await asyncio.to_thread(engine.guest.touch(1).result) == content[HUGE : HUGE + PAGE]
    with used_up_pool():
        engine.vmm.may_load.set()
        await engine.reach(State.RUNNING)
        await ends_well(engine)
    assert await engine.guest.content() == content
