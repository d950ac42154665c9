"""A pre-copy that converges: it ends without a switchover, its device state without a package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import FedBlock
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import DEVICE_STATE, LAST_BYTES, Engine, image
from tests.incoming.guest import PAGE

MakeEngine = Callable[..., Engine]


async def converge(engine: Engine, content: bytes, *, rest: bytes = LAST_BYTES) -> None:
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", content, range(0, len(content), PAGE))
    await engine.source.send(
        engine.source.writer.ram_end(), engine.source.writer.ram_footer(), DEVICE_STATE, rest
    )


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memory file"])
async def test_the_guest_gets_all_memory_and_the_rest_of_the_stream(
    make_engine: MakeEngine, shared: bool
) -> None:
    engine = make_engine(pages=512, shared=shared)
    content = image(512)
    more = bytes(range(256)) * 4096
    await converge(engine, content, rest=more + LAST_BYTES)
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.vmm.told == ["advise", "listening", "run converged", "complete"]
    assert engine.vmm.rest == DEVICE_STATE + more + LAST_BYTES
    assert engine.migration.state is State.END
    assert await engine.guest.content() == content
    assert engine.migration.report().counters.requests == 0


async def test_memory_that_is_touched_while_the_devices_load_is_served_from_here(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=64)
    content = image(64)
    await converge(engine, content, rest=b"")
    await engine.reach(State.CONVERGED)
    for page in (63, 4, 0):  # page 4 is zero
        touched = await asyncio.to_thread(engine.guest.touch(page).result)
        assert touched == content[page * PAGE : (page + 1) * PAGE]
    await engine.source.send(LAST_BYTES)
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == content


async def test_pages_that_never_came_are_zero(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=8)
    await converge(engine, image(8)[: 3 * PAGE])
    assert await engine.source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == image(8)[: 3 * PAGE] + bytes(5 * PAGE)


async def test_unwatched_blocks_come_with_it(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=4)
    engine.vmm.fed_blocks = (FedBlock("pc.rom", 2 * PAGE, 2 * PAGE),)
    engine.source.add_block("pc.rom", 2 * PAGE)
    rom = image(2, seed=9)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", rom, [0, PAGE])
    await engine.source.send(
        engine.source.writer.ram_end(), engine.source.writer.ram_footer(), DEVICE_STATE, LAST_BYTES
    )
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.vmm.contents == {"pc.rom": rom}


async def test_a_vmm_that_does_not_load_it_fails_and_the_source_goes_on(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=4)
    engine.vmm.refuses = "run converged"
    await converge(engine, image(4), rest=b"")
    assert await engine.source.wait_for_shut() == Shut(1)
    await engine.finish()
    assert engine.migration.failure == "the VMM failed: run converged was refused"
    assert engine.vmm.told[-1] == "failed"


async def test_a_source_that_breaks_in_the_middle_of_it_is_still_the_vm(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=4)
    await converge(engine, image(4), rest=b"")
    await engine.reach(State.CONVERGED)
    engine.source.close()
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.vmm.told[-1] == "failed"
