"""What a source has said before it went away, or before a mistake, counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import FedBlock
from postcopyd.wire import stream_writer
from postcopyd.wire.stream_format import EOS
from tests.incoming.engine import Engine, image
from tests.incoming.guest import PAGE
from tests.incoming.test_bad_input import LENGTH, PACKAGE_ENDS, PAGES, UP_TO_BLOCKS, WHOLE

pytestmark = pytest.mark.usefixtures("every_connection")

MakeEngine = Callable[..., Engine]
END = stream_writer.page_word(0, EOS)


async def test_a_package_that_lies_in_the_socket_of_a_source_that_has_gone_is_not_lost(
    make_engine: MakeEngine,
) -> None:
    """Its PINGs cannot be answered any more; but it cannot take its guest back either."""
    engine = make_engine(pages=PAGES)
    await engine.source.send(WHOLE)
    engine.source.close()
    engine.attach()
    await engine.reach(State.PAUSED)
    assert engine.migration.package is not None
    assert engine.migration.report().received == 2 * PAGE
    assert len(engine.failures) == 1


async def test_a_source_that_has_gone_before_its_package_ends_the_migration(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    await engine.source.send(UP_TO_BLOCKS, stream_writer.ping(1))
    engine.source.close()
    engine.attach()
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert len(engine.failures) == 1


async def test_a_source_that_hears_nothing_any_more_but_goes_on_is_a_broken_stream(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE[:PACKAGE_ENDS])
    await engine.reach(State.RUNNING)
    engine.source.connection.shutdown(0)  # SHUT_RD
    await engine.source.send(stream_writer.ping(4))
    await engine.reach(State.PAUSED)
    assert engine.migration.failure is not None
    assert "Broken pipe" in engine.migration.failure


async def test_a_mistake_on_the_preempt_channel_found_at_the_streams_end_pauses(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, LENGTH)]})
    channel = engine.connect_again()
    await engine.reach(State.RUNNING)
    record = stream_writer.StreamWriter(0).page("pc.ram", 0) + b"\xab" * PAGE
    await asyncio.get_running_loop().sock_sendall(channel, record)
    await engine.told(events.PreemptAttached)
    engine.source.connection.setblocking(True)
    engine.source.connection.sendall(
        engine.source.writer.ram_end() + engine.source.writer.ram_footer() + b"\0"
    )
    channel.send(stream_writer.page_word(0, 0x800))
    # What the loop would do if it looked at the main stream first.
    assert engine.migration._standing.link is not None
    engine.migration._standing.link.main._readable()
    await engine.reach(State.PAUSED)
    assert engine.migration.failure is not None
    assert "0x800" in engine.migration.failure
    assert len(engine.failures) == 1


@pytest.mark.parametrize("end_of_channel", ["before", "behind"])
async def test_what_a_source_with_a_preempt_channel_has_not_sent_of_a_rom_is_zeros_at_the_end(
    make_engine: MakeEngine, end_of_channel: str
) -> None:
    engine = make_engine(pages=PAGES)
    engine.vmm.fed_blocks = (FedBlock("pc.rom", 2 * PAGE, 2 * PAGE),)
    engine.source.add_block("pc.rom", 2 * PAGE)
    content = image(2)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.rom", content, [0])
    await engine.source.switch_over({"pc.ram": [(0, LENGTH)]})
    await engine.reach(State.LISTENING)
    channel = engine.connect_again()
    loop = asyncio.get_running_loop()
    if end_of_channel == "before":
        await loop.sock_sendall(channel, END)
        await engine.told(events.PreemptAttached)
        await engine.source.end()
    else:
        await loop.sock_sendall(channel, stream_writer.StreamWriter(0).zero_page("pc.ram", 0))
        await engine.told(events.PreemptAttached)
        await engine.source.end()
        await engine.source.wait_for_pong(4)
        await loop.sock_sendall(channel, END)
    await engine.source.wait_for_shut()
    assert engine.vmm.contents == {"pc.rom": content[:PAGE] + bytes(PAGE)}
