"""Heirs of what came to no good end: begun anew, or with everything here and nobody to load it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from postcopyd.incoming.staging import BlockStage
from postcopyd.incoming.states import State
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import Engine, InProcessVmm, Source
from tests.incoming.guest import LIMIT, PAGE, Guest
from tests.incoming.heirs import Holder, succeed
from tests.incoming.replacing import refuse_to_load
from tests.incoming.test_recovery import (
    CONTENT,
    PAGES,
    ask_what_is_here,
    come_back,
    go_on,
    seen,
)
from tests.incoming.test_restoring import KINDS, holder, is_listening

__all__ = ["holder"]  # a fixture

MakeEngine = Callable[..., Engine]


@pytest.fixture
async def another_vmm() -> AsyncIterator[InProcessVmm]:
    guest = Guest(register=False, pages=PAGES)
    yield InProcessVmm(guest)
    guest.close()


@KINDS
async def test_what_came_in_a_try_that_was_given_up_does_not_count_in_the_next_one(
    holder: Holder, make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES, shared=shared)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", CONTENT, range(0, 8 * PAGE, PAGE))
    await seen(engine.source)
    succeed(engine, holder)
    assert engine.migration.state is State.NONE
    second = Source(engine.connect_again(), engine.source.blocks)
    await second.advise()
    await second.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    await second.wait_for_pong(4)

    succeed(engine, holder)
    source = come_back(engine)
    assert await ask_what_is_here(source) == set()
    await go_on(source)
    await source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT


async def everything_is_here(engine: Engine) -> None:
    """All pages have come, and the VMM has not loaded its devices."""
    engine.vmm.may_load.clear()
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.end()
    await engine.source.wait_for_pong(4)
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().bytes_received < engine.source.sent:
            await asyncio.sleep(0)


@pytest.mark.parametrize("when", ["before", "at once"])
async def test_when_everything_has_come_another_vmm_gets_it_also_from_an_heir(
    holder: Holder, make_engine: MakeEngine, another_vmm: InProcessVmm, when: str
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await everything_is_here(engine)
    if when == "before":
        await refuse_to_load(engine)
    succeed(engine, holder, vmm_gone=when == "at once")
    assert engine.migration.state is State.PAUSED
    assert engine.migration.waits_for_vmm
    assert engine.migration.report().received == PAGES * PAGE

    engine.migration.attach_vmm(another_vmm)
    await engine.reach(State.END)
    assert "run" in another_vmm.told
    assert await another_vmm.guest.content() == CONTENT
    assert await engine.source.wait_for_shut() == Shut(0)


class Killed(BaseException):
    """The process is killed here."""


async def test_a_page_that_was_being_staged_counts_as_not_come(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await is_listening(engine)
    for last in ("received", "zero", "staged"):
        kill_in_the_middle_of_marking(
            engine.migration._recipient.filling.holdings.stages[0], behind=last
        )
    succeed(engine, holder)
    source = come_back(engine)
    assert await ask_what_is_here(source) == set()
    await go_on(source)
    await engine.reach(State.RUNNING)
    await source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT


def kill_in_the_middle_of_marking(stage: BlockStage, behind: str) -> None:
    """Stage a page, and die when that bit of it has been set for the first time."""
    maps = stage._maps

    class Bits:
        def __init__(self, name: str) -> None:
            self._name = name

        def __setitem__(self, pages: slice, value: int) -> None:
            getattr(maps, self._name)[pages] = value
            if self._name == behind:
                raise Killed

    class Maps:
        def __getattr__(self, name: str) -> Any:
            return Bits(name)

    stage._maps = Maps()  # type: ignore[assignment]
    try:
        with pytest.raises(Killed):
            stage.write(3 * PAGE, memoryview(CONTENT[3 * PAGE : 4 * PAGE]))
    finally:
        stage._maps = maps
