"""Pages of ROMs on the preempt channel: a VMM loads no devices without them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import FedBlock
from postcopyd.wire import stream_writer
from postcopyd.wire.return_path import PageRequest, ReceivedBitmap, Shut
from tests.incoming.engine import SECTION, Engine, image
from tests.incoming.guest import LIMIT, PAGE
from tests.incoming.heirs import Holder, succeed
from tests.incoming.test_recovery import CONTENT, PAGES, come_back, go_on
from tests.incoming.test_restoring import holder

__all__ = ["holder"]  # a fixture

MakeEngine = Callable[..., Engine]
ROM = image(8, seed=3)


async def all_but_a_page_of_a_rom(engine: Engine) -> None:
    """The main stream is at its end; the last page of a ROM has not come on the other channel."""
    engine.vmm.fed_blocks = (FedBlock("pc.rom", 8 * PAGE, 8 * PAGE),)
    engine.source.add_block("pc.rom", 8 * PAGE)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", ROM, range(0, 6 * PAGE, PAGE))
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.LISTENING)
    assert await engine.source.wait_for_request() == PageRequest("pc.rom", 6 * PAGE, 2 * PAGE)
    channel = engine.connect_again()
    writer = stream_writer.StreamWriter(SECTION)
    page = writer.page("pc.rom", 6 * PAGE) + ROM[6 * PAGE : 7 * PAGE]
    await asyncio.get_running_loop().sock_sendall(channel, page)
    await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.end()
    async with asyncio.timeout(LIMIT):
        while engine.migration.report().bytes_received < engine.source.sent + len(page):
            await asyncio.sleep(0)
    assert engine.migration.state is State.LISTENING


async def come_back_with_the_rest(engine: Engine) -> None:
    source = come_back(engine)
    for block in ("pc.ram", "pc.rom"):
        await source.send(stream_writer.received_bitmap_request(block))
        await source.wait_for(
            lambda message, block=block: (  # type: ignore[misc]
                isinstance(message, ReceivedBitmap) and message.block == block
            )
        )
    await go_on(source)
    await source.postcopy("pc.rom", ROM, [7 * PAGE])
    await source.end()
    assert await source.wait_for_shut() == Shut(0)
    assert await engine.guest.content() == CONTENT
    assert engine.vmm.load is not None
    fed = {block.name: block for block in engine.vmm.load.blocks}
    assert bytes(fed["pc.rom"].content) == ROM


async def test_one_that_breaks_with_such_a_page_is_resumed(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    await all_but_a_page_of_a_rom(engine)
    engine._again[-1].close()
    await engine.reach(State.PAUSED)
    await come_back_with_the_rest(engine)


async def test_an_heir_waits_for_the_source_that_has_such_a_page(
    holder: Holder, make_engine: MakeEngine
) -> None:
    engine = make_engine(keeper=holder, pages=PAGES)
    await all_but_a_page_of_a_rom(engine)
    succeed(engine, holder)
    assert engine.migration.state is State.PAUSED
    engine.vmm.fed_blocks = (FedBlock("pc.rom", 8 * PAGE, 8 * PAGE),)
    await come_back_with_the_rest(engine)
