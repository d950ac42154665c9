"""All is moved to another VMM: who fails, is killed or comes back meanwhile loses nothing of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.journal import Journal
from postcopyd.incoming.moving import Move
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.staging import BlockStage
from postcopyd.incoming.states import State
from postcopyd.kernel.userfaultfd import EVENT_REMOVE
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import Engine, InProcessVmm
from tests.incoming.guest import LIMIT, PAGE, Guest
from tests.incoming.heirs import Holder, succeed
from tests.incoming.replacing import (
    KINDS,
    MakeEngine,
    MakeGuest,
    half_way,
    make_guest,
    refuse_to_load,
)
from tests.incoming.test_recovery import CONTENT, PAGES, ask_what_is_here, come_back, go_on
from tests.support import wait_until

__all__ = ["make_guest"]  # a fixture


async def the_rest_arrives(engine: Engine, guest: Guest) -> None:
    """Half of its memory is here; a source brings the other half, and everything ends well."""
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == set(range(PAGES // 2))
    await go_on(source)
    await source.postcopy("pc.ram", CONTENT, [p * PAGE for p in range(PAGES) if p not in here])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await guest.content() == CONTENT
    source.close()
    await engine.finish()


@pytest.mark.parametrize("fails", ["it refuses", "it cannot be written"])
@pytest.mark.parametrize(("first", "second"), KINDS.values(), ids=KINDS.keys())
async def test_one_that_fails_while_everything_is_moved_changes_nothing_for_the_next(
    make_engine: MakeEngine,
    make_guest: MakeGuest,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
    second: bool,
    fails: str,
) -> None:
    holder = Holder()
    engine = make_engine(pages=PAGES, shared=first, keeper=holder)
    await half_way(engine, CONTENT)
    await refuse_to_load(engine)
    kept = set(holder.held)
    engine.events.clear()
    vmm = InProcessVmm(make_guest(pages=PAGES, shared=second))
    if fails == "it refuses":
        vmm.refuses = "advise"
    else:
        monkeypatch.setattr(Move, "copy", lambda _: os.pwrite(-1, b"", 0))
    engine.migration.attach_vmm(vmm)
    await engine.told(events.VmmLost)
    monkeypatch.undo()
    assert engine.migration.waits_for_vmm
    assert {name for name in holder.held if name.startswith("vmm-")} <= kept

    succeed(engine, holder)
    assert engine.migration.waits_for_vmm
    third = make_guest(pages=PAGES, shared=second)
    engine.migration.attach_vmm(InProcessVmm(third))
    await engine.told(events.DeviceStateLoaded)
    await the_rest_arrives(engine, third)
    assert holder.held == {}, "an ended migration leaves nothing"


async def test_what_a_vmm_before_has_given_back_says_nothing_of_the_next_one(
    make_engine: MakeEngine, make_guest: MakeGuest
) -> None:
    """They may lie at the same addresses, and a successor goes through the last messages again."""
    holder = Holder()
    engine = make_engine(pages=PAGES, keeper=holder)
    await half_way(engine, CONTENT)
    await refuse_to_load(engine)
    second = make_guest(pages=PAGES)
    start, end = second.address + 12 * PAGE, second.address + 16 * PAGE
    message = struct.pack("<B7xQQQ", EVENT_REMOVE, start, end, 0)
    os.pwrite(holder.held["journal"], message, 4096)
    engine.migration.attach_vmm(InProcessVmm(second))
    await engine.told(events.DeviceStateLoaded)

    own, engine.guest = engine.guest, second
    succeed(engine, holder)
    await the_rest_arrives(engine, second)
    engine.guest = own
    assert holder.held == {}, "an ended migration leaves nothing"


class Steps:
    """All that a successor can see of a move; of what comes behind the last one it sees nothing."""

    def __init__(self, holder: Holder, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.seen = 0
        self._last = last
        self._within_one = False
        self._watch(holder, "keep", monkeypatch)
        self._watch(holder, "release", monkeypatch)
        self._watch(Journal, "write", monkeypatch)
        self._watch(Move, "prepare", monkeypatch)
        self._watch(Move, "take_effect", monkeypatch)
        self._watch(BlockStage, "_store", monkeypatch)

    def _watch(self, of: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        step = getattr(of, name)

        def watched(*arguments: object) -> None:
            if self._within_one:
                step(*arguments)
                return
            self.seen += 1
            if self.seen <= self._last:
                self._within_one = True
                step(*arguments)
                self._within_one = False

        monkeypatch.setattr(of, name, watched)


@pytest.mark.parametrize(("first", "second"), KINDS.values(), ids=KINDS.keys())
async def test_who_is_killed_while_everything_is_moved_leaves_all_of_it(
    make_engine: MakeEngine, make_guest: MakeGuest, first: bool, second: bool
) -> None:
    for last in itertools.count():
        holder = Holder()
        engine = make_engine(pages=PAGES, shared=first, keeper=holder)
        await half_way(engine, CONTENT)
        await refuse_to_load(engine)
        vmm = InProcessVmm(make_guest(pages=PAGES, shared=second))
        vmm.may_load.clear()
        with pytest.MonkeyPatch.context() as monkeypatch:
            steps = Steps(holder, monkeypatch, last)
            engine.migration.attach_vmm(vmm)
            async with asyncio.timeout(LIMIT):
                # Without the last steps it cannot be served: it is lost as the first one was.
                while not vmm.asked_to_load.is_set() and not engine.vmms_lost > 1:
                    await asyncio.sleep(0)
        own, engine.guest = engine.guest, vmm.guest
        succeed(engine, holder)
        guest = vmm.guest
        if not engine.migration.has_vmm:
            assert engine.migration.waits_for_vmm
            guest = make_guest(pages=PAGES, shared=not second)
            engine.migration.attach_vmm(InProcessVmm(guest))
        await engine.told(events.DeviceStateLoaded)
        source = come_back(engine)
        here = await ask_what_is_here(source)
        assert here == set(range(PAGES // 2)), last
        await go_on(source)
        await source.postcopy("pc.ram", CONTENT, [p * PAGE for p in range(PAGES) if p not in here])
        await source.end()
        assert await source.wait_for_shut() == Shut(0)
        assert await guest.content() == CONTENT, last
        source.close()
        await engine.finish()
        engine.guest = own
        assert holder.held == {}, "an ended migration leaves nothing"
        if steps.seen <= last:
            assert engine.vmm.guest is vmm.guest, "it has taken the other one's place"
            return


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
async def test_a_source_that_comes_back_is_taken_when_everything_has_been_moved(
    make_engine: MakeEngine, make_guest: MakeGuest, shared: bool
) -> None:
    """A page that came in between would go where nobody looks any more."""
    engine = make_engine(pages=PAGES, shared=shared)
    await half_way(engine, CONTENT)
    await refuse_to_load(engine)
    engine.source.connection.close()
    vmm = InProcessVmm(make_guest(pages=PAGES, shared=shared))
    vmm.may_discard.clear()
    engine.migration.attach_vmm(vmm)
    engine.migration.path_lost("link eth0 was removed", for_good=True)
    await engine.told(events.Paused)
    await asyncio.to_thread(wait_until, lambda: "discard" in vmm.told)
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(Refused, match="waits for another VMM"):
        engine.migration.attach_stream(ours, "the test again")
    ours.close()
    assert engine.migration.state is State.PAUSED
    vmm.may_discard.set()
    await engine.told(events.DeviceStateLoaded)
    source = come_back(engine)
    here = await ask_what_is_here(source)
    assert here == set(range(PAGES // 2))
    await go_on(source)
    await engine.reach(State.RUNNING)
    await source.postcopy("pc.ram", CONTENT, [p * PAGE for p in range(PAGES) if p not in here])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await vmm.guest.content() == CONTENT
