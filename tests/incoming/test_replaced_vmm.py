"""Another VMM takes the place of one that could not load its devices."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.holdings import Holdings
from postcopyd.incoming.journal import Journal, VmmRecord
from postcopyd.incoming.moving import check_fits
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import DeviceLoad, FedBlock, GuestMemory, HandedBlock
from postcopyd.kernel.userfaultfd import Feature
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import PageRequest, Pong, ReceivedBitmap, Shut
from tests.incoming.engine import MACHINE, InProcessVmm, Source, image
from tests.incoming.guest import HUGE, LIMIT, PAGE
from tests.incoming.heirs import Holder
from tests.incoming.replacing import (
    KINDS,
    MakeEngine,
    MakeGuest,
    half_way,
    make_guest,
    refuse_to_load,
)
from tests.incoming.test_recovery import CONTENT, PAGES, seen

__all__ = ["make_guest"]  # a fixture


@pytest.mark.parametrize(("first", "second"), KINDS.values(), ids=KINDS.keys())
async def test_what_has_come_is_moved_over_and_the_rest_goes_to_the_new_one(
    make_engine: MakeEngine, make_guest: MakeGuest, first: bool, second: bool
) -> None:
    engine = make_engine(pages=256, shared=first)
    content = image(256)
    await half_way(engine, content)
    # The devices touch memory while they load: a page that is here, one that is not.
    assert await asyncio.to_thread(engine.guest.touch(70).result) == content[70 * PAGE : 71 * PAGE]
    touch = engine.guest.touch(200)
    request = await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, [request.offset])
    assert await asyncio.to_thread(touch.result) == content[200 * PAGE : 201 * PAGE]
    await refuse_to_load(engine)
    assert (await engine.told(events.VmmLost)).reason == "the VMM failed: it was refused"
    assert engine.migration.report().waits_for_vmm
    # What the source sends meanwhile is not lost.
    await engine.source.postcopy("pc.ram", content, range(128 * PAGE, 192 * PAGE, PAGE))

    vmm = InProcessVmm(make_guest(pages=256, shared=second))
    engine.migration.attach_vmm(vmm)
    await engine.reach(State.RUNNING)
    assert vmm.told == ["advise", "discard", "listening", "run"]
    assert engine.vmm.told[-1] == "failed" and engine.vmm.closed
    assert vmm.load == engine.vmm.load
    for page in (0, 70, 200, 150):
        touched = await asyncio.to_thread(vmm.guest.touch(page).result)
        assert touched == content[page * PAGE : (page + 1) * PAGE], page
    rest = [page * PAGE for page in range(192, 256) if page != 200]
    await engine.source.postcopy("pc.ram", content, rest)
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert Pong(3) in engine.source.messages
    assert await vmm.guest.content() == content
    assert engine.migration.failure is None


class SlowHolder(Holder):
    """Tells only when it is allowed to that all outlives its migration."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def settled(self) -> None:
        allowed = asyncio.Event()
        self.asked.put_nowait(allowed)
        await allowed.wait()

    @property
    def record(self) -> VmmRecord:
        """What the journal says of the VMM."""
        with contextlib.closing(Journal(os.dup(self.held["journal"]))) as journal:
            record = journal.read()
        assert record is not None and record.vmm is not None
        return record.vmm


async def test_a_successor_is_told_of_it_only_when_what_is_left_of_it_outlives_us(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    """The journal is memory, and what is told to whoever holds descriptors is on its way."""
    holder = SlowHolder()
    engine = make_engine(pages=256, shared=True, keeper=holder)
    content = image(256)
    await half_way(engine, content)
    await refuse_to_load(engine)
    (before,) = holder.record.blocks
    vmm = InProcessVmm(make_guest(pages=256, shared=True))
    engine.migration.attach_vmm(vmm)
    async with asyncio.timeout(LIMIT):
        allowed = await holder.asked.get()
        assert holder.record.blocks == (before,)
        allowed.set()
        allowed = await holder.asked.get()
    (aside,) = holder.record.blocks
    assert aside.address == vmm.guest.address
    assert aside.memory_file == f"1-{before.memory_file}"
    assert engine.migration.waits_for_vmm and "listening" not in vmm.told
    allowed.set()
    await engine.reach(State.RUNNING)
    assert holder.record.blocks[0].memory_file == before.memory_file
    await engine.source.postcopy("pc.ram", content, range(128 * PAGE, 256 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


@pytest.mark.parametrize(("first", "second"), KINDS.values(), ids=KINDS.keys())
async def test_huge_pages_are_moved_over_whole(
    make_engine: MakeEngine,
    make_guest: MakeGuest,
    huge_pages: Callable[[int], None],
    first: bool,
    second: bool,
) -> None:
    huge_pages(10)
    engine = make_engine(pages=4, page_size=HUGE, shared=first)
    content = bytearray(image(4, HUGE))
    content[2 * HUGE : 3 * HUGE] = bytes(HUGE)
    await half_way(engine, bytes(content))
    await engine.source.postcopy("pc.ram", content, range(2 * HUGE, 3 * HUGE, PAGE))
    # The last one is in the middle of its records when the first VMM fails.
    await engine.source.postcopy("pc.ram", content, range(3 * HUGE, 3 * HUGE + HUGE // 2, PAGE))
    touched = await asyncio.to_thread(engine.guest.touch(1).result)
    assert touched == content[HUGE : HUGE + PAGE]
    await refuse_to_load(engine)
    vmm = InProcessVmm(make_guest(pages=4, page_size=HUGE, shared=second))
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", content, range(3 * HUGE + HUGE // 2, 4 * HUGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


async def test_a_page_that_was_lost_silently_while_there_was_no_vmm_is_asked_for_again(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    engine.attach()
    silent = engine.connect_again()
    engine.vmm.may_load.clear()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, len(content))]})
    await engine.source.wait_for_pong(4)
    await engine.reach(State.LISTENING)
    touch = engine.guest.touch(15)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, range(0, 15 * PAGE, PAGE))
    await engine.source.end()
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().bytes_received < engine.source.sent:
            await asyncio.sleep(0)
    await refuse_to_load(engine)
    engine.guest.userfaultfd.zeropage(engine.guest.address + 15 * PAGE, PAGE)
    await asyncio.to_thread(touch.result)
    silent.close()
    vmm = InProcessVmm(make_guest(pages=16))
    engine.migration.attach_vmm(vmm)
    paused = await engine.told(events.Paused)
    assert "may have been the preempt channel has gone" in paused.reason
    source = Source(engine.connect_again(), engine.source.blocks)
    await source.send(stream_writer.received_bitmap_request("pc.ram"))
    await source.wait_for(lambda message: isinstance(message, ReceivedBitmap))
    await source.send(stream_writer.postcopy_resume())
    await source.postcopy("pc.ram", content, [15 * PAGE])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


async def test_a_vmm_that_has_gone_before_it_ran_is_replaced_too(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    await half_way(engine, content)
    engine.vmm.dead.set()
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == "the VMM has gone (the test)"
    vmm = InProcessVmm(make_guest(pages=16))
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", content, range(8 * PAGE, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


async def test_a_vmm_whose_memory_has_gone_at_the_switchover_is_replaced_and_the_source_stays(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, 4 * PAGE, PAGE))
    engine.guest.lose_memory()
    await engine.source.switch_over({"pc.ram": [(4 * PAGE, 12 * PAGE)]})
    await engine.reach(State.PAUSED)
    assert "the VMM failed: its memory cannot be watched" in str(engine.migration.failure)
    assert engine.migration.waits_for_vmm
    vmm = InProcessVmm(make_guest(pages=16))
    engine.migration.attach_vmm(vmm)
    await engine.reach(State.RUNNING)
    await engine.source.postcopy("pc.ram", content, range(4 * PAGE, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


@pytest.mark.parametrize("told", [True, False], ids=["and tells it", "without the event"])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
async def test_what_a_vmm_unmaps_before_it_has_run_is_not_lost_for_the_next(
    make_engine: MakeEngine, make_guest: MakeGuest, shared: bool, told: bool
) -> None:
    """As one does that ends in good order, and is found out later."""
    features = Feature.EVENT_REMOVE | Feature.THREAD_ID
    if told:
        features |= Feature.EVENT_UNMAP
    engine = make_engine(pages=PAGES, shared=shared, features=features)
    await half_way(engine, CONTENT)
    unmapping = engine.guest.unmap(0, PAGES)
    await asyncio.to_thread(unmapping.join, LIMIT)
    await engine.source.postcopy("pc.ram", CONTENT, range(8 * PAGE, 12 * PAGE, PAGE))
    await seen(engine.source)
    await refuse_to_load(engine)
    vmm = InProcessVmm(make_guest(pages=PAGES, shared=shared))
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", CONTENT, range(12 * PAGE, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == CONTENT


async def test_a_mistake_of_ours_pauses_it_and_is_told(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that a migration has begun ends without anybody's knowing."""
    engine = make_engine(pages=PAGES)
    unexpected: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: unexpected.append(context["exception"])
    )
    mistake = KeyError("nobody thought of it")

    async def stumble(load: DeviceLoad) -> None:
        raise mistake

    monkeypatch.setattr(engine.vmm, "run", stumble)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.PAUSED)
    assert "a mistake of postcopyd's" in (engine.migration.failure or "")
    assert unexpected == [mistake]


async def test_it_may_take_several_tries(make_engine: MakeEngine, make_guest: MakeGuest) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    await half_way(engine, content)
    await refuse_to_load(engine)
    for _ in range(3):
        vmm = InProcessVmm(make_guest(pages=16))
        vmm.refuses_to_load = True
        engine.migration.attach_vmm(vmm)
        await engine.reach(State.LISTENING)
        await engine.reach(State.PAUSED)
    vmm = InProcessVmm(make_guest(pages=16))
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", content, range(8 * PAGE, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


async def test_a_page_that_was_asked_for_is_not_asked_again(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    """The source answers each page once: the answer to the first VMM's fault is for the second."""
    engine = make_engine(pages=16)
    content = image(16)
    await half_way(engine, content)
    first_touch = engine.guest.touch(12)
    await engine.source.wait_for_request()
    await refuse_to_load(engine)
    vmm = InProcessVmm(make_guest(pages=16))
    engine.migration.attach_vmm(vmm)
    await engine.reach(State.RUNNING)
    touch = vmm.guest.touch(12)
    await engine.source.postcopy("pc.ram", content, range(8 * PAGE, 16 * PAGE, PAGE))
    assert await asyncio.to_thread(touch.result) == content[12 * PAGE : 13 * PAGE]
    await engine.source.end()
    await engine.source.wait_for_shut()
    engine.guest.userfaultfd.zeropage(engine.guest.address, engine.guest.length)
    await asyncio.to_thread(first_touch.result)
    asked = [message for message in engine.source.messages if isinstance(message, PageRequest)]
    assert asked == []


async def test_unwatched_blocks_are_given_to_the_second_one_too(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    engine = make_engine(pages=16)
    engine.vmm.fed_blocks = (FedBlock("pc.rom", PAGE, PAGE),)
    engine.source.add_block("pc.rom", PAGE)
    content, rom = image(16), image(1, seed=5)
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, 16 * PAGE)], "pc.rom": [(0, PAGE)]})
    request = await engine.source.wait_for_request()
    assert (request.block, request.offset, request.length) == ("pc.rom", 0, PAGE)
    assert "run" not in engine.vmm.told
    await engine.source.postcopy("pc.rom", rom, [0])
    await engine.vmm.asked_to_load.wait()
    await refuse_to_load(engine)
    vmm = InProcessVmm(make_guest(pages=16))
    vmm.fed_blocks = engine.vmm.fed_blocks
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", content, range(0, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.vmm.contents == vmm.contents == {"pc.rom": rom}


OTHERS: dict[str, tuple[dict[str, object], str, str]] = {
    "fewer pages": ({"pages": 8}, MACHINE, "has 0x8000 bytes in pages of 0x1000, not 0x10000"),
    "another name": ({"pages": 16, "name": "ram"}, MACHINE, "it has no RAM block 'pc.ram'"),
    "another machine": ({"pages": 16}, "pc-i440fx-7.2", f"it is no {MACHINE}"),
}


@pytest.mark.parametrize(("options", "machine", "reason"), OTHERS.values(), ids=OTHERS.keys())
async def test_a_vmm_that_is_another_machine_is_refused_and_nothing_is_lost(
    make_engine: MakeEngine,
    make_guest: MakeGuest,
    options: dict[str, object],
    machine: str,
    reason: str,
) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    await half_way(engine, content)
    await refuse_to_load(engine)
    other = InProcessVmm(make_guest(**options))
    other.machine = machine
    with pytest.raises(Refused, match=f"the test cannot take the guest: .*{reason}"):
        engine.migration.attach_vmm(other)
    assert engine.migration.waits_for_vmm
    vmm = InProcessVmm(make_guest(pages=16))
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", content, range(8 * PAGE, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


async def test_a_vmm_with_the_same_memory_file_finds_everything_there(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    engine = make_engine(pages=16, shared=True)
    content = image(16)
    await half_way(engine, content)
    await refuse_to_load(engine)
    vmm = InProcessVmm(make_guest(pages=16, shared=True, predecessor=engine.guest))
    engine.migration.attach_vmm(vmm)
    await engine.source.postcopy("pc.ram", content, range(8 * PAGE, 16 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == content


def test_a_vmm_with_its_blocks_in_another_order_is_another_machine(make_guest: MakeGuest) -> None:
    guest = make_guest(pages=2)
    one, other = (
        HandedBlock(name, guest.address + place * PAGE, PAGE, PAGE, None, 0)
        for place, name in enumerate(("one", "other"))
    )
    memory = GuestMemory((one, other), guest.userfaultfd, registered=False)
    holdings = Holdings(memory, Estate())
    try:
        check_fits(holdings, memory)
        swapped = GuestMemory((other, one), guest.userfaultfd, registered=False)
        with pytest.raises(ValueError, match="in another order than one, other"):
            check_fits(holdings, swapped)
    finally:
        holdings.close()


async def test_once_it_has_run_no_other_can_take_its_place(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=16)
    content = image(16)
    await half_way(engine, content)
    engine.vmm.may_load.set()
    await engine.reach(State.RUNNING)
    engine.vmm.dead.set()
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.migration.failure == "the VMM has gone (the test)"
