"""RAM blocks that are not watched: they are collected, and given to the VMM with its devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import FedBlock
from postcopyd.wire.return_path import PageRequest, Shut
from tests.incoming.engine import Engine, image
from tests.incoming.guest import PAGE

MakeEngine = Callable[..., Engine]
ROM = image(8, seed=3)


def engine_with_rom(make_engine: MakeEngine, maximum: int = 8 * PAGE) -> Engine:
    engine = make_engine(pages=4)
    engine.vmm.fed_blocks = (FedBlock("pc.rom", 8 * PAGE, maximum),)
    return engine


async def test_what_is_missing_at_the_switchover_is_asked_for_before_the_vmm_loads(
    make_engine: MakeEngine,
) -> None:
    engine = engine_with_rom(make_engine)
    engine.source.add_block("pc.rom", 8 * PAGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", image(8, seed=4), range(0, 8 * PAGE, PAGE))
    await engine.source.precopy("pc.rom", ROM, range(2 * PAGE, 8 * PAGE, PAGE))
    # Page 4 of the ROM is zero: it overwrites nothing, and is not what came before it.
    await engine.source.switch_over({"pc.ram": [(0, 4 * PAGE)], "pc.rom": [(0, 3 * PAGE)]})
    assert await engine.source.wait_for_request() == PageRequest("pc.rom", 0, 3 * PAGE)
    await engine.source.postcopy("pc.rom", ROM, [2 * PAGE, 0])
    assert engine.vmm.contents == {}
    await engine.source.postcopy("pc.rom", ROM, [PAGE])
    await engine.reach(State.RUNNING)
    assert engine.vmm.contents == {"pc.rom": ROM}
    report = engine.migration.report()
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert report.blocks[0].name == "pc.ram"


async def test_what_the_source_never_sends_is_zero(make_engine: MakeEngine) -> None:
    engine = engine_with_rom(make_engine)
    engine.source.add_block("pc.rom", 8 * PAGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", ROM, [0])
    await engine.source.switch_over({"pc.ram": [(0, 4 * PAGE)]})
    await engine.source.postcopy("pc.ram", image(4), range(0, 4 * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)
    assert engine.vmm.contents == {"pc.rom": ROM[:PAGE] + bytes(7 * PAGE)}


@pytest.mark.parametrize("length", [4 * PAGE, 16 * PAGE])
async def test_a_resizable_block_takes_the_length_of_the_source(
    make_engine: MakeEngine, length: int
) -> None:
    engine = engine_with_rom(make_engine, maximum=16 * PAGE)
    engine.source.add_block("pc.rom", length)
    rom = image(length // PAGE, seed=3)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", rom, range(0, length, PAGE))
    await engine.source.switch_over({"pc.ram": [(0, 4 * PAGE)]})
    await engine.reach(State.RUNNING)
    assert engine.vmm.contents == {"pc.rom": rom}


@pytest.mark.parametrize(
    ("name", "length", "maximum", "reason"),
    [
        ("pc.rom", 4, 8, "'pc.rom' has 0x4000 bytes at the source and 0x8000 in the VMM"),
        ("pc.rom", 32, 16, "and 0x8000 in the VMM, 0x10000 at most"),
        ("pc.bios", 8, 8, "a RAM block 'pc.bios', the VMM has not (it has: pc.ram, pc.rom)"),
    ],
)
async def test_a_block_that_differs_is_named_before_the_package(
    make_engine: MakeEngine, name: str, length: int, maximum: int, reason: str
) -> None:
    engine = engine_with_rom(make_engine, maximum * PAGE)
    engine.source.add_block(name, length * PAGE)
    engine.attach()
    await engine.source.advise()
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.migration.failure is not None and reason in engine.migration.failure


async def test_a_block_that_the_source_has_not_is_named(make_engine: MakeEngine) -> None:
    engine = engine_with_rom(make_engine)
    engine.attach()
    await engine.source.advise()
    await engine.finish()
    assert engine.migration.failure == "the VMM has a RAM block 'pc.rom', the source has not"
