"""A migration whose process dies at a moment of the test's choice, and its heir."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.journal import JournalUnreadable
from postcopyd.incoming.recipient import Recipient
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import FedBlock
from postcopyd.kernel.userfaultfd import (
    EVENT_REMOVE,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
)
from postcopyd.wire.return_path import PageRequest, Pong, Shut
from tests.incoming.engine import DEVICE_STATE, Engine, image
from tests.incoming.guest import LIMIT, PAGE
from tests.incoming.heirs import Holder, succeed
from tests.incoming.test_recovery import (
    CONTENT,
    PAGES,
    ask_what_is_here,
    come_back,
    go_on,
    seen,
    send_the_rest,
)

MakeEngine = Callable[..., Engine]
KINDS = pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])


@pytest.fixture
def holder() -> Iterator[Holder]:
    holder = Holder()
    yield holder
    assert holder.held == {}, "an ended migration leaves nothing"


async def is_listening(engine: Engine, precopied: range = range(0)) -> None:
    """A guest whose VMM loads its devices, until it is told that it may."""
    engine.vmm.may_load.clear()
    await _switches_over(engine, precopied)
    await engine.reach(State.LISTENING)
    await seen(engine.source)


async def runs(engine: Engine, precopied: range = range(0)) -> None:
    """A guest that runs, with pages from before the switchover and none from after it."""
    await _switches_over(engine, precopied)
    await engine.reach(State.RUNNING)


async def _switches_over(engine: Engine, precopied: range) -> None:
    engine.attach()
    await engine.source.advise()
    if precopied:
        await engine.source.precopy("pc.ram", CONTENT, [page * PAGE for page in precopied])
    stale = (len(precopied) * PAGE, (PAGES - len(precopied)) * PAGE)
    await engine.source.switch_over({"pc.ram": [stale]})


@KINDS
async def test_an_heir_goes_on_with_what_is_here_and_asks_for_what_is_waited_for(
    holder: Holder, make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES, shared=shared)
    await runs(engine, precopied=range(4))
    await engine.source.postcopy("pc.ram", CONTENT, [4 * PAGE, 5 * PAGE])
    await seen(engine.source)
    touch = engine.guest.touch(9)
    await engine.source.wait_for_request()

    succeed(engine, holder)
    assert engine.migration.state is State.PAUSED
    assert (await engine.told(events.Restored)).missing == PAGES - 6
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == set(range(6))
    await go_on(source)
    assert await source.wait_for_request() == PageRequest("pc.ram", 9 * PAGE, PAGE)
    await source.postcopy("pc.ram", CONTENT, [9 * PAGE])
    assert await asyncio.to_thread(touch.result) == CONTENT[9 * PAGE : 10 * PAGE]
    await send_the_rest(engine, source, here | {9})
    assert engine.vmm.told == ["listening", "complete"]


@KINDS
async def test_a_guest_that_has_not_loaded_its_devices_is_asked_again(
    holder: Holder, make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES, shared=shared)
    await is_listening(engine, precopied=range(2))

    succeed(engine, holder)
    assert engine.migration.package is not None
    await engine.told(events.DeviceStateLoaded)
    assert engine.vmm.load is not None and engine.vmm.load.device_state == DEVICE_STATE
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == {0, 1}
    await go_on(source)
    await engine.reach(State.RUNNING)
    await send_the_rest(engine, source, here)


async def test_it_may_not_become_the_guest_before_what_is_left_of_it_outlives_the_heir(
    holder: Holder, make_engine: MakeEngine
) -> None:
    """Its predecessor may have been killed before it knew that."""
    engine = make_engine(keeper=holder, pages=PAGES)
    await is_listening(engine)

    holder.may_settle.clear()
    succeed(engine, holder)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    assert engine.vmm.told == ["listening"]
    holder.may_settle.set()
    await engine.reach(State.RUNNING)
    await send_the_rest(engine, source, here)


async def test_blocks_that_are_not_watched_are_collected_on(
    holder: Holder, make_engine: MakeEngine
) -> None:
    rom = image(8, seed=3)
    engine = make_engine(keeper=holder, pages=PAGES)
    engine.vmm.fed_blocks = (FedBlock("pc.rom", 8 * PAGE, 8 * PAGE),)
    engine.source.add_block("pc.rom", 8 * PAGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", rom, range(0, 6 * PAGE, PAGE))
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.LISTENING)
    await seen(engine.source)

    succeed(engine, holder)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    assert await source.wait_for_request() == PageRequest("pc.rom", 6 * PAGE, 2 * PAGE)
    await source.postcopy("pc.rom", rom, [6 * PAGE, 7 * PAGE])
    await engine.reach(State.RUNNING)
    assert engine.vmm.contents == {"pc.rom": rom}
    await send_the_rest(engine, source, here)


async def test_before_the_package_the_source_begins_anew_with_the_same_vmm(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", image(PAGES, seed=9), [0, PAGE, 2 * PAGE])
    await seen(engine.source)

    holder.may_settle.clear()
    succeed(engine, holder)
    assert engine.migration.state is State.NONE
    source = come_back(engine)
    await source.advise()
    await source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.LISTENING)
    await seen(source)
    assert "run" not in engine.vmm.told, "what was left of it may not outlive us"
    holder.may_settle.set()
    await engine.reach(State.RUNNING)
    assert engine.migration.report().received == 0
    await send_the_rest(engine, source, set())


@KINDS
async def test_when_everything_has_come_the_source_still_hears_that_all_is_well(
    holder: Holder, make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES, shared=shared)
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.switch_over({})
    await engine.reach(State.LISTENING)
    await engine.source.end()
    async with asyncio.timeout(10):
        while engine.migration.report().bytes_received < engine.source.sent:
            await asyncio.sleep(0)

    succeed(engine, holder)
    assert await engine.source.wait_for_shut() == Shut(0)
    engine.source.close()
    await engine.finish()
    assert engine.migration.state is State.END
    assert await engine.guest.content() == CONTENT


@pytest.mark.parametrize("noticed", ["when it is restored", "when its memory is registered"])
@pytest.mark.parametrize("ending", ["end", "abandoned"])
async def test_one_that_has_ended_well_ends_though_its_vmm_has_exited_since(
    holder: Holder,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    noticed: str,
) -> None:
    engine = make_engine(Settings(close_timeout=0.1), keeper=holder, pages=PAGES)
    told = asyncio.Event()

    async def complete_never(missing: int) -> None:
        told.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(engine.vmm, "complete", complete_never)
    await runs(engine)
    if ending == "end":
        await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
        await engine.source.end()
    else:
        engine.migration.abandon(force=True)
    async with asyncio.timeout(LIMIT):
        await told.wait()
    if noticed == "when its memory is registered":

        def exited(*_: object) -> None:
            raise OSError(errno.ENOMEM, "the process has exited")

        monkeypatch.setattr(Recipient, "listen", exited)
    gone = noticed == "when it is restored"
    succeed(engine, holder, Settings(close_timeout=0.1), vmm_gone=gone)
    await engine.finish()
    report = engine.migration.report()
    assert report.state == ending and not report.guest_lost
    assert bool(report.missing) == (ending == "abandoned")


async def test_what_was_removed_and_read_but_not_noted_reads_as_zeros(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    await engine.source.postcopy("pc.ram", CONTENT, [0])
    await seen(engine.source)
    # As the kernel has written it, and nobody hands it out twice.
    start = engine.guest.address + 3 * PAGE
    message = struct.pack("<B7xQQQ", EVENT_REMOVE, start, start + PAGE, 0)
    os.pwrite(holder.held["journal"], message, 4096)

    succeed(engine, holder)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == {0, 3}
    await go_on(source)
    await source.postcopy("pc.ram", CONTENT, [3 * PAGE])  # too late: it is the guest's own page
    assert await asyncio.to_thread(engine.guest.touch(3).result) == bytes(PAGE)
    await source.postcopy("pc.ram", CONTENT, [p * PAGE for p in range(PAGES) if p not in here])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)


async def test_each_heir_has_an_heir(holder: Holder, make_engine: MakeEngine) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    here: set[int] = set()
    for page in range(4):
        succeed(engine, holder)
        source = come_back(engine)
        assert await ask_what_is_here(source) == here
        await go_on(source)
        await source.postcopy("pc.ram", CONTENT, [page * PAGE])
        await seen(source)
        here.add(page)
    await send_the_rest(engine, source, here)
    assert Pong(9) not in source.messages


async def test_what_cannot_be_read_is_left_as_it_is(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    touch = engine.guest.touch(1)
    await engine.source.wait_for_request()
    lost = os.dup(holder.held["vmm-userfaultfd"])
    holder.release("vmm-userfaultfd")
    with pytest.raises(JournalUnreadable, match="userfaultfd was not kept"):
        succeed(engine, holder)
    assert touch.waits, "nobody may read zeros"
    holder.held["vmm-userfaultfd"] = lost
    succeed(engine, holder)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    await send_the_rest(engine, source, here)
    assert await asyncio.to_thread(touch.result) == CONTENT[PAGE : 2 * PAGE]


async def test_a_guest_that_has_run_and_cannot_be_watched_any_more_is_lost(
    holder: Holder, make_engine: MakeEngine
) -> None:
    """No other VMM can take its place: what it did to its memory is nowhere else."""
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    engine.guest.userfaultfd.unregister(engine.guest.address, engine.guest.length)
    with Userfaultfd.open() as other:  # as an exited VMM's memory: nobody can register it
        other.handshake(Feature(0))
        other.register(
            engine.guest.address, engine.guest.length, RegisterMode.MISSING, Operation.COPY
        )
        succeed(engine, holder)
        await engine.finish()
    assert engine.migration.state is State.FAILED
    assert not engine.migration.waits_for_vmm
    assert "the VMM has gone" in (engine.migration.failure or "")


async def test_a_package_that_is_not_whole_is_no_record_to_go_on_from(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    package = os.pread(holder.held["package"], 1 << 20, 0)
    os.ftruncate(holder.held["package"], 3)
    with pytest.raises(JournalUnreadable, match="is not whole"):
        succeed(engine, holder)
    os.pwrite(holder.held["package"], package, 0)
    succeed(engine, holder)
    assert engine.migration.package == package
