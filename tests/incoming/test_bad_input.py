"""What hostile or broken peers do: each ends its own migration with one clear reason."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.kernel.userfaultfd import Operation, RegisterMode
from postcopyd.wire import stream_writer
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import DEVICE_STATE, SECTION, Engine, Source, image
from tests.incoming.guest import PAGE, Guest

MakeEngine = Callable[..., Engine]
CONFIGURATION = stream_writer.configuration("pc-q35-7.2")
RETURN_PATH = stream_writer.open_return_path()
ADVISE = stream_writer.advise(PAGE, PAGE)
PAGES = 8
LENGTH = PAGES * PAGE


def ram_start(*blocks: BlockEntry) -> bytes:
    blocks = blocks or (BlockEntry("pc.ram", LENGTH, PAGE),)
    return stream_writer.StreamWriter(SECTION).ram_start(blocks)


UP_TO_ADVISE = CONFIGURATION + RETURN_PATH + ADVISE
UP_TO_BLOCKS = UP_TO_ADVISE + ram_start()


def part(*records: bytes) -> bytes:
    writer = stream_writer.StreamWriter(SECTION)
    return writer.ram_part() + b"".join(records) + writer.ram_footer()


def page(offset: int, flags: int = 8, name: bytes = b"\x06pc.ram") -> bytes:
    return stream_writer.page_word(offset, flags) + name + b"\xab" * PAGE


def command(number: int, payload: bytes = b"", length: int | None = None) -> bytes:
    counted = len(payload) if length is None else length
    return struct.pack(">BHH", 8, number, counted) + payload


PACKAGED = command(7, length=4)

BEFORE_THE_PACKAGE = {
    "no configuration": (CONFIGURATION[:8] + RETURN_PATH, "configuration"),
    "a machine name of 4 GiB": (CONFIGURATION[:9] + b"\xff" * 4, "4294967295"),
    "an unknown section": (CONFIGURATION + b"\x55", "0x55"),
    "an unknown command": (CONFIGURATION + command(77), "77"),
    "command 0": (CONFIGURATION + command(0), "0"),
    "a command of a wrong length": (CONFIGURATION + command(2, b"\0\0"), "PING"),
    "a ping without a return path": (CONFIGURATION + stream_writer.ping(1), "return path"),
    "an advise without a return path": (CONFIGURATION + ADVISE, "return path"),
    "two advises": (UP_TO_ADVISE + ADVISE, "ADVISE came twice"),
    "an advise of dirty bitmaps only": (CONFIGURATION + RETURN_PATH + command(3), "ADVISE"),
    "other page sizes": (
        CONFIGURATION + RETURN_PATH + stream_writer.advise(0x201000, PAGE),
        "0x201000",
    ),
    "an unknown block": (UP_TO_ADVISE + ram_start(BlockEntry("other", LENGTH, PAGE)), "'other'"),
    "a block of another size": (
        UP_TO_ADVISE + ram_start(BlockEntry("pc.ram", 2 * LENGTH, PAGE)),
        "0x10000 bytes at the source and 0x8000 in the VMM",
    ),
    "a page of an unknown block": (
        UP_TO_BLOCKS + part(page(0, name=b"\x05other")),
        "'other'",
    ),
    "a page behind the end of its block": (UP_TO_BLOCKS + part(page(LENGTH)), "0x8000"),
    "a page with no block named": (UP_TO_BLOCKS + part(page(0, 0x28, b"")), "block"),
    "an unknown flag": (UP_TO_BLOCKS + part(stream_writer.page_word(0, 0x800)), "0x800"),
    "two flags at once": (UP_TO_BLOCKS + part(page(0, 0xA)), "0x00a"),
    "a compressed page": (UP_TO_BLOCKS + part(page(0, 0x100)), "compress"),
    "zero pages filled with ones": (
        UP_TO_BLOCKS + part(stream_writer.page_word(0, 2) + b"\x06pc.ram\x01"),
        "fill",
    ),
    "a part of an unknown section": (
        UP_TO_BLOCKS + struct.pack(">BI", 2, SECTION + 1),
        str(SECTION + 1),
    ),
    "a wrong footer": (
        UP_TO_BLOCKS + part()[:-4] + struct.pack(">I", 99),
        "7e 00 00 00 63",
    ),
    "a discard before advise": (
        CONFIGURATION + RETURN_PATH + stream_writer.discard("pc.ram", [(0, PAGE)]),
        "iscard",
    ),
    "a discard that is not aligned": (
        UP_TO_BLOCKS + stream_writer.discard("pc.ram", [(100, PAGE)]),
        "0x64",
    ),
    "a discard behind the end of its block": (
        UP_TO_BLOCKS + stream_writer.discard("pc.ram", [(0, LENGTH), (PAGE, LENGTH)]),
        "pc.ram",
    ),
    "a discard that wraps around": (
        UP_TO_BLOCKS + stream_writer.discard("pc.ram", [(PAGE, (1 << 64) - PAGE)]),
        "pc.ram",
    ),
    "a listen outside a package": (UP_TO_BLOCKS + command(4), "LISTEN"),
    "a run outside a package": (UP_TO_BLOCKS + command(5), "RUN"),
    "a package of 4 GiB": (UP_TO_BLOCKS + command(7, b"\xff" * 4), "4294967295"),
    "an empty package": (UP_TO_BLOCKS + command(7, bytes(4)), "package"),
    "a package with another in it": (
        UP_TO_BLOCKS + stream_writer.package(stream_writer.package(DEVICE_STATE)),
        "package",
    ),
    "a package before the block list": (
        UP_TO_ADVISE + stream_writer.package(DEVICE_STATE),
        "block",
    ),
    "an enable-colo": (UP_TO_BLOCKS + command(8), "COLO"),
    "a resume outside recovery": (UP_TO_BLOCKS + command(9), "esume"),
    "the end of the stream too early": (UP_TO_BLOCKS + b"\0", "stream"),
    "a source without post-copy": (
        CONFIGURATION + ram_start(),
        "postcopy-ram",
    ),
    "x-ignore-shared": (
        stream_writer.configuration("pc", capabilities=["x-ignore-shared"]) + RETURN_PATH,
        "x-ignore-shared",
    ),
}


@pytest.mark.parametrize(
    ("stream", "named"), BEFORE_THE_PACKAGE.values(), ids=BEFORE_THE_PACKAGE.keys()
)
async def test_a_bad_stream_fails_before_the_package_with_one_reason_that_names_it(
    make_engine: MakeEngine, stream: bytes, named: str
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(stream)
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert engine.migration.failure is not None
    assert named in engine.migration.failure
    assert len(engine.failures) == 1
    failure = engine.failures[0]
    assert isinstance(failure, events.Failed)
    # A source that has sent a package cannot take the guest back, whatever is in it.
    assert failure.guest_lost == (PACKAGED in stream)
    assert engine.vmm.told[-1] == "failed"
    assert engine.vmm.closed


NO_STREAM = {
    "a wrong magic": (b"GEVM" + CONFIGURATION[4:], "47 45 56 4d"),
    "a wrong version": (CONFIGURATION[:4] + struct.pack(">I", 2) + CONFIGURATION[8:], "version"),
    "a multifd hello": (bytes.fromhex("11223344") + bytes(60), "multifd"),
    "a TLS handshake": (b"\x16\x03\x01" + bytes(60), "no TLS is spoken here"),
    "a page": (bytes(8), "preempt channel"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "47 45 54 20"),
}


@pytest.mark.parametrize(("said", "named"), NO_STREAM.values(), ids=NO_STREAM.keys())
async def test_who_is_no_source_is_refused_and_the_migration_waits_for_its_source(
    make_engine: MakeEngine, said: bytes, named: str
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(said)
    refused = await engine.told(events.ConnectionRefused)
    assert refused.reason.startswith("migration 'vm0' has not begun: at byte")
    assert named in refused.reason
    await engine.source.wait_for_close()
    assert engine.migration.state is State.NONE
    assert not engine.failures
    await the_source_comes(engine)


@pytest.mark.parametrize("length", [1, 4, 7])
async def test_who_leaves_before_he_has_said_what_he_is_changes_nothing(
    make_engine: MakeEngine, length: int
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(CONFIGURATION[:length])
    engine.source.close()
    await engine.told(events.StreamDropped)
    assert engine.migration.state is State.NONE
    await the_source_comes(engine)


async def the_source_comes(engine: Engine) -> None:
    source = Source(engine.connect_again(), engine.source.blocks)
    await source.send(WHOLE)
    await engine.reach(State.RUNNING)


async def test_a_source_is_told_that_it_goes_on(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(UP_TO_BLOCKS, command(77))
    assert await engine.source.wait_for_shut() == Shut(1)


WHOLE = (
    UP_TO_BLOCKS
    + part(page(0), page(PAGE, 0x28, b""))
    + stream_writer.discard("pc.ram", [(0, LENGTH)])
    + stream_writer.ping(2)
    + stream_writer.package(DEVICE_STATE)
    + stream_writer.ping(4)
    + part(page(0), page(PAGE, 0x28, b""))
)
PACKAGE_ENDS = WHOLE.index(stream_writer.ping(4))


@pytest.mark.parametrize(
    "cut", [8, 9, 20, 30, 60, 100, 4200, 8300, PACKAGE_ENDS - 20, PACKAGE_ENDS - 1]
)
async def test_bytes_that_stop_before_the_package_is_whole_end_it_cleanly(
    make_engine: MakeEngine, cut: int
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE[:cut])
    engine.source.close()
    await engine.finish()
    assert engine.migration.state is State.FAILED
    assert len(engine.failures) == 1
    assert engine.failures[0].reason  # type: ignore[union-attr]


@pytest.mark.parametrize("cut", [0, 3, 9, 20, 100, 4200, 8233])
async def test_bytes_that_stop_after_the_package_pause_it_and_everything_is_kept(
    make_engine: MakeEngine, cut: int
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE[: PACKAGE_ENDS + cut])
    await engine.reach(State.RUNNING)
    engine.source.close()
    await engine.reach(State.PAUSED)
    assert len(engine.failures) == 1
    assert not engine.vmm.closed
    assert engine.migration.package is not None
    with pytest.raises(Refused, match="cancelling loses the guest"):
        engine.migration.cancel("a mistake")
    assert engine.migration.state is State.PAUSED


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        (b"\x55", "0x55"),
        (stream_writer.discard("pc.ram", [(0, PAGE)]), "iscard"),
        (stream_writer.package(DEVICE_STATE), "ackage"),
        (ADVISE, "ADVISE"),
        (part(page(LENGTH)), "0x8000"),
        (RETURN_PATH, "OpenReturnPath"),
    ],
    ids=["section", "discard", "package", "advise", "page", "return path"],
)
async def test_a_bad_message_after_the_package_pauses_with_the_reason(
    make_engine: MakeEngine, stream: bytes, named: str
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE)
    await engine.reach(State.RUNNING)
    await engine.source.send(stream)
    await engine.reach(State.PAUSED)
    assert engine.migration.failure is not None
    assert named.lower() in engine.migration.failure.lower()


async def test_what_is_here_goes_on_working_while_it_is_paused(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE)
    await engine.reach(State.RUNNING)
    engine.source.close()
    await engine.reach(State.PAUSED)
    assert await asyncio.to_thread(engine.guest.touch(1).result) == b"\xab" * PAGE
    touch = engine.guest.touch(5)
    while engine.migration.report().outstanding == 0:
        await asyncio.to_thread(os.sched_yield)
    assert touch.waits
    engine.migration.cancel("given up", force=True)
    await engine.finish()
    assert engine.migration.state is State.FAILED
    # Nobody but the guest itself lets its threads go.
    engine.guest.userfaultfd.unregister(engine.guest.address, engine.guest.length)
    await asyncio.to_thread(touch.result)


@pytest.mark.parametrize("said", [b"", b"QEV", CONFIGURATION[:7]])
async def test_who_falls_silent_before_he_is_known_for_a_source_has_to_go_and_the_source_may_come(
    make_engine: MakeEngine, said: bytes
) -> None:
    engine = make_engine(Settings(first_byte_timeout=0.05, idle_timeout=0.05), pages=PAGES)
    engine.attach()
    await engine.source.send(said)
    refused = await engine.told(events.ConnectionRefused)
    assert refused.reason.endswith(
        "waits for a source that speaks: this one has sent nothing for 0.05 s"
    )
    engine.source.close()
    engine.source = Source(engine.connect_again(), engine.source.blocks)
    await engine.source.send(WHOLE)
    await engine.reach(State.RUNNING)


async def test_a_source_that_falls_silent_before_the_package_is_given_up(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(Settings(first_byte_timeout=0.05, idle_timeout=0.05), pages=PAGES)
    engine.attach()
    await engine.source.send(CONFIGURATION)
    await engine.finish()
    assert engine.migration.failure is not None
    assert "has sent nothing" in engine.migration.failure


async def test_a_source_that_goes_away_without_a_byte_leaves_the_migration_waiting(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    engine.source.close()
    while not any(isinstance(event, events.StreamDropped) for event in engine.events):
        await asyncio.to_thread(os.sched_yield)
    assert engine.migration.state is State.NONE


async def test_a_stream_whose_vmm_never_comes_is_given_up(make_engine: MakeEngine) -> None:
    engine = make_engine(Settings(vmm_timeout=0.05), pages=PAGES)
    engine.attach_stream()
    await engine.source.send(UP_TO_ADVISE)
    await engine.finish()
    assert engine.migration.failure is not None
    assert "no VMM has handed over its memory within 0.05 s" in engine.migration.failure


async def test_a_second_vmm_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    with pytest.raises(Refused, match="already has a VMM"):
        engine.migration.attach_vmm(engine.vmm)


@pytest.mark.parametrize("step", ["advise", "discard", "run"])
async def test_a_vmm_that_refuses_a_step_fails_or_pauses_with_its_word(
    make_engine: MakeEngine, step: str
) -> None:
    engine = make_engine(pages=PAGES)
    engine.vmm.refuses = step
    engine.attach()
    await engine.source.send(WHOLE)
    if step == "run":
        await engine.reach(State.PAUSED)
    else:
        await engine.finish()
        assert engine.migration.state is State.FAILED
    assert engine.migration.failure == f"the VMM failed: {step} was refused"


@pytest.mark.parametrize("sent", [0, len(CONFIGURATION), len(UP_TO_BLOCKS), len(WHOLE)])
async def test_a_vmm_that_dies_ends_its_migration_at_any_moment(
    make_engine: MakeEngine, sent: int
) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE[:sent])
    if sent == len(WHOLE):
        await engine.reach(State.RUNNING)
    engine.vmm.dead.set()
    await engine.finish()
    assert engine.migration.failure == "the VMM has gone (the test)"
    assert len(engine.failures) == 1


async def test_cancelling_before_the_package_tells_both_sides(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.reach(State.ADVISE)
    engine.migration.cancel("an operator said so")
    await engine.finish()
    assert engine.migration.failure == "an operator said so"
    assert engine.vmm.told[-1] == "failed"
    assert await engine.source.wait_for_shut() == Shut(1)
    with pytest.raises(Refused, match="has ended"):
        engine.migration.cancel("again")


async def test_a_fault_outside_every_block_pauses_and_is_named(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(WHOLE)
    await engine.reach(State.RUNNING)
    # The VMM registers more memory on the same userfaultfd than it told of.
    other = Guest(pages=1, register=False)
    engine.guest.userfaultfd.register(
        other.address, other.length, RegisterMode.MISSING, Operation.COPY
    )
    touch = other.touch(0)
    await engine.reach(State.PAUSED)
    assert engine.migration.failure == f"a fault at {other.address:#x}, outside every block"
    engine.guest.userfaultfd.unregister(other.address, other.length)
    await asyncio.to_thread(touch.result)
    other.close()


async def test_an_image_larger_than_the_machine_is_staged_without_touching_it(
    make_engine: MakeEngine,
) -> None:
    """A pre-copy of zeros only costs no memory, however large the block is."""
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.source.precopy("pc.ram", bytes(LENGTH), range(0, LENGTH, PAGE))
    await engine.source.switch_over({})
    await engine.reach(State.RUNNING)
    await engine.source.end()
    await engine.source.wait_for_shut()
    assert await asyncio.to_thread(engine.guest.touch(3).result) == image(5)[4 * PAGE :]


async def test_a_cancel_that_the_package_overtakes_is_refused_and_the_guest_lives_on(
    make_engine: MakeEngine,
) -> None:
    """The package lies in the socket already when the cancel comes: which one is first is chance,
    but a guest that has arrived is never given up for a cancel that was meant to be harmless."""
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.send(UP_TO_BLOCKS)
    await engine.source.send(stream_writer.discard("pc.ram", [(0, LENGTH)]), stream_writer.ping(2))
    await engine.source.wait_for_pong(2)
    engine.source.connection.setblocking(True)
    engine.source.connection.sendall(stream_writer.package(DEVICE_STATE) + stream_writer.ping(4))
    engine.source.connection.setblocking(False)
    cancelled = engine.migration.cancel("harmless")
    # What the loop would do if it looked at the stream first.
    assert engine.migration._standing.link is not None
    engine.migration._standing.link.main._readable()
    assert engine.migration.state is State.LISTENING
    with pytest.raises(Refused, match="cancelling loses the guest"):
        await cancelled
    await engine.reach(State.RUNNING)
    assert engine.failures == []
