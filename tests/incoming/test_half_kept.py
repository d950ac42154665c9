"""A process that dies while it leaves something to a successor, or takes it back."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from postcopyd.incoming.estate import JOURNAL, Estate
from postcopyd.incoming.inheriting import InheritedVmm
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import Vmm, VmmFailure
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import Engine
from tests.incoming.guest import PAGE
from tests.incoming.heirs import Holder, succeed
from tests.incoming.test_recovery import (
    CONTENT,
    PAGES,
    ask_what_is_here,
    come_back,
    go_on,
    send_the_rest,
)
from tests.incoming.test_restoring import runs

MakeEngine = Callable[..., Engine]


class WatchfulHolder(Holder):
    """Minds that what it holds is not held for an instant."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        """In which everything was let go of."""
        self.inherits = False
        """True while one begins anew, and makes anew what nobody needs any more."""

    def keep(self, name: str, descriptor: int) -> None:
        made_anew = ("page-map", "package", "staging-0") if self.inherits else ()
        assert name not in self.held or name in made_anew, f"{name} is held already"
        super().keep(name, descriptor)

    def release(self, name: str) -> None:
        if name in self.held:
            self.order.append(name)
        super().release(name)


@pytest.fixture
def holder() -> Iterator[WatchfulHolder]:
    holder = WatchfulHolder()
    yield holder
    assert holder.held == {}, "an ended migration leaves nothing"


async def test_a_vmm_of_which_nothing_was_noted_hands_over_again(
    holder: WatchfulHolder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    before = os.pread(holder.held[JOURNAL], os.fstat(holder.held[JOURNAL]).st_size, 0)
    engine.attach()
    os.pwrite(holder.held[JOURNAL], before, 0)  # as if killed before it was written

    succeed(engine, holder)
    assert not engine.migration.has_vmm
    assert set(holder.held) == {JOURNAL}, "its connection would never tell it that we have gone"


@pytest.mark.parametrize("lost", ["page-map", "vmm-userfaultfd"])
async def test_a_vmm_that_was_noted_and_not_kept_hands_over_again(
    holder: WatchfulHolder, make_engine: MakeEngine, lost: str
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    engine.attach()
    for name in list(holder.held)[list(holder.held).index(lost) :]:
        holder.release(name)

    succeed(engine, holder)
    assert engine.migration.state is State.NONE
    assert not engine.migration.has_vmm
    assert set(holder.held) == {JOURNAL}


async def test_what_is_held_already_is_not_held_anew(
    holder: WatchfulHolder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    engine.attach()
    await engine.source.advise()
    holder.inherits = True
    succeed(engine, holder)  # begins anew, with the same VMM
    holder.inherits = False
    assert engine.migration.has_vmm
    source = come_back(engine)
    await source.advise()
    await source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    succeed(engine, holder)  # goes on
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    await send_the_rest(engine, source, here)


async def test_a_connection_that_is_of_no_use_is_closed_so_that_the_source_comes_back(
    holder: WatchfulHolder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            holder.keep("connection", ours.fileno())  # as if killed at the end of the stream
        succeed(engine, holder)
        theirs.settimeout(10)
        assert await asyncio.to_thread(theirs.recv, 1) == b""
    source = come_back(engine)
    here = await ask_what_is_here(source)
    await go_on(source)
    await send_the_rest(engine, source, here)


async def test_a_migration_that_had_ended_needs_no_vmm_any_more(
    holder: WatchfulHolder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await runs(engine)
    await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    engine.migration.let_go()  # before the source has closed
    engine.source.messages.clear()

    def restore_vmm(inherited: InheritedVmm) -> Vmm:
        raise VmmFailure("it has exited")

    estate = Estate(holder, holder.copies())
    engine.migration = IncomingMigration("vm0", Settings(), engine._trace, estate)
    engine.migration.restore(restore_vmm)
    assert engine.migration.state is State.END
    assert await engine.source.wait_for_shut() == Shut(0)
    engine.source.close()
    await engine.finish()


async def test_the_journal_is_taken_back_first(
    holder: WatchfulHolder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    engine.attach()
    engine.migration.cancel("the test is over")
    await engine.finish()
    assert holder.order[0] == JOURNAL
