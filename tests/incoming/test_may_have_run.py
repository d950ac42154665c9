"""A VMM that has everything and is lost without a word: its guest is not begun twice unasked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from postcopyd.incoming import events, migration
from postcopyd.incoming.placing import VmmGone
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import DeviceLoad, VmmFailure
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import Engine, InProcessVmm
from tests.incoming.guest import LIMIT, PAGE
from tests.incoming.heirs import Holder, succeed
from tests.incoming.replacing import MakeEngine, MakeGuest, half_way, make_guest
from tests.incoming.test_interrupted_move import the_rest_arrives
from tests.incoming.test_recovery import CONTENT, PAGES

__all__ = ["make_guest"]  # a fixture


class SilentVmm(InProcessVmm):
    """Takes everything, and says nothing until it is told what comes of it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.guest)
        self.given = asyncio.Event()
        self.failure: asyncio.Future[VmmFailure] = asyncio.get_running_loop().create_future()

    async def run(self, load: DeviceLoad) -> None:
        load.given()
        self.given.set()
        raise await self.failure


@pytest.fixture
def holder() -> Iterator[Holder]:
    holder = Holder()
    yield holder
    assert holder.held == {}, "an ended migration leaves nothing"


async def silent(engine: Engine) -> SilentVmm:
    """Have half of the memory, and everything for the devices, in a VMM that says nothing."""
    engine.vmm = vmm = SilentVmm(engine)
    await half_way(engine, CONTENT)
    async with asyncio.timeout(LIMIT):
        await vmm.given.wait()
    return vmm


async def assert_taken(engine: Engine, vmm: InProcessVmm) -> None:
    """The VMM that has come becomes the guest, with all its memory."""
    await engine.told(events.DeviceStateLoaded)
    assert not engine.migration.report().guest_may_have_run
    await engine.source.postcopy("pc.ram", CONTENT, range(PAGES // 2 * PAGE, PAGES * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == CONTENT


def insist(engine: Engine, other: InProcessVmm) -> None:
    """Another VMM is not taken before somebody insists."""
    assert engine.migration.report().guest_may_have_run
    with pytest.raises(Refused, match="may have run in the VMM before"):
        engine.migration.attach_vmm(other)
    assert engine.migration.report().guest_may_have_run and other.told == []
    engine.migration.attach_vmm(other, force=True)


async def lose(engine: Engine, vmm: SilentVmm, how: str) -> None:
    if how == "it exits":
        vmm.dead.set()
    else:
        vmm.failure.set_result(VmmFailure("it has gone", may_have_run=how == "it may have run"))
    await engine.told(events.VmmLost)
    assert engine.migration.waits_for_vmm


@pytest.mark.parametrize("how", ["it exits", "it may have run"])
async def test_another_one_takes_its_place_only_when_its_operator_insists(
    make_engine: MakeEngine, make_guest: MakeGuest, how: str
) -> None:
    engine = make_engine(pages=PAGES)
    await lose(engine, await silent(engine), how)
    other = InProcessVmm(make_guest(pages=PAGES))
    insist(engine, other)
    await assert_taken(engine, other)


async def test_of_one_that_has_not_run_for_sure_nobody_has_to_insist(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    engine = make_engine(pages=PAGES)
    vmm = await silent(engine)
    assert not engine.migration.report().guest_may_have_run, "it is not lost"
    await lose(engine, vmm, "it has not run")
    assert not engine.migration.report().guest_may_have_run
    other = InProcessVmm(make_guest(pages=PAGES))
    engine.migration.attach_vmm(other)
    await assert_taken(engine, other)


async def test_one_that_is_known_to_have_run_is_the_guest_that_is_lost(
    make_engine: MakeEngine,
) -> None:
    """A successor may hear what it has said to a predecessor, when it has gone already."""
    engine = make_engine(pages=PAGES)
    vmm = await silent(engine)
    vmm.has_run = True
    vmm.dead.set()
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.migration.report().guest_lost


async def test_its_own_word_is_waited_for_when_its_memory_has_gone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process gives its memory back first, and then closes what tells that it has not run."""
    monkeypatch.setattr(migration, "_LAST_WORDS", 0.0)
    engine = make_engine(pages=PAGES)
    vmm = await silent(engine)
    engine.migration._filling_broken(VmmGone("it has no memory"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert engine.migration.has_vmm
    await lose(engine, vmm, "it has not run")
    assert not engine.migration.report().guest_may_have_run


@pytest.mark.parametrize("then", ["goes on", "is killed"])
async def test_who_has_insisted_once_need_not_do_so_again(
    holder: Holder, make_engine: MakeEngine, make_guest: MakeGuest, then: str
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await lose(engine, await silent(engine), "it exits")
    engine.events.clear()
    other = InProcessVmm(make_guest(pages=PAGES))
    other.refuses = "advise"
    engine.migration.attach_vmm(other, force=True)
    await engine.told(events.VmmLost)
    if then == "is killed":
        succeed(engine, holder)
    assert engine.migration.waits_for_vmm
    assert not engine.migration.report().guest_may_have_run


@pytest.mark.parametrize("lost", ["before the kill", "after the kill"])
async def test_a_successor_knows_that_it_may_have_run(
    holder: Holder, make_engine: MakeEngine, make_guest: MakeGuest, lost: str
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    vmm = await silent(engine)
    if lost == "before the kill":
        await lose(engine, vmm, "it exits")
    succeed(engine, holder, vmm_gone=True)
    assert engine.migration.state is State.PAUSED
    other = InProcessVmm(make_guest(pages=PAGES))
    insist(engine, other)
    await engine.told(events.DeviceStateLoaded)
    assert not engine.migration.report().guest_may_have_run
    await the_rest_arrives(engine, other.guest)


async def test_a_successor_knows_of_one_that_was_not_given_everything_that_it_has_not_run(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await half_way(engine, CONTENT)
    succeed(engine, holder, vmm_gone=True)
    assert engine.migration.waits_for_vmm
    assert not engine.migration.report().guest_may_have_run
