"""Firecracker hands its memory over exactly as it does, and is refused for what it does wrong."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from postcopyd.incoming.vmm import DeviceLoad, VmmFailure
from postcopyd.kernel import memory_file
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from tests.support import GuestRead, wait_readable
from tests.vmm import firecracker_stand_in
from tests.vmm.content import content_of
from tests.vmm.firecracker_stand_in import FirecrackerStandIn, Generation
from tests.vmm.handoffs import LIMIT, PAGE, Handoffs, open_descriptors
from tests.vmm.page_source import PageSource

LENGTHS = (96 * PAGE, 32 * PAGE)
HUGE = 2 << 20


@pytest.fixture
def stand_in() -> Iterator[FirecrackerStandIn]:
    with FirecrackerStandIn(LENGTHS) as vmm:
        yield vmm


@contextmanager
def running(
    handoffs: Handoffs,
    generation: Generation = Generation.V1_12,
    lengths: tuple[int, ...] = LENGTHS,
    page_size: int = PAGE,
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """Run a whole VMM in a process of its own; kill it at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=firecracker_stand_in.run,
        args=(handoffs.path, theirs, lengths, generation, page_size),
    )
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(LIMIT)
        process.close()
        ours.close()


async def said(pipe: Connection) -> object:
    """Return what comes through `pipe`, while the event loop goes on."""
    assert await asyncio.to_thread(pipe.poll, LIMIT)
    return pipe.recv()


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("pieces", [1, 2, 50])
async def test_every_generation_is_taken_in_any_pieces(
    handoffs: Handoffs, generation: Generation, pieces: int
) -> None:
    with FirecrackerStandIn(LENGTHS, generation) as stand_in:
        with stand_in.hand_over(handoffs.path, pieces):
            name, vmm, wanted_listen = await handoffs.offered()
        assert (name, wanted_listen) == (None, None)
        assert vmm.memory.registered
        assert [
            (block.name, block.address, block.length, block.page_size, block.file_offset)
            for block in vmm.memory.blocks
        ] == [
            ("region0", stand_in.regions[0].address, LENGTHS[0], PAGE, 0),
            ("region1", stand_in.regions[1].address, LENGTHS[1], PAGE, LENGTHS[0]),
        ]
        assert [block.memory_file for block in vmm.memory.blocks] == [None, None]


@pytest.mark.parametrize("generation", Generation)
async def test_a_whole_vmm_runs_on_memory_that_is_served(
    handoffs: Handoffs, generation: Generation
) -> None:
    with running(handoffs, generation) as (process, pipe):
        vmm = await handoffs.firecracker_vmm()
        assert vmm.process_id == process.pid
        source = PageSource(vmm)
        source.listen()
        await vmm.advise()
        await vmm.discard()
        vmm.listening()
        await vmm.run(DeviceLoad(b"", b"", (), asyncio.Event(), print, print))
        assert await said(pipe) == []
        assert source.faults >= sum(LENGTHS) // PAGE
        await vmm.complete(0)
        source.stop()


@pytest.mark.parametrize("generation", [Generation.V1_7, Generation.V1_12])
async def test_huge_pages_are_served_whole(
    handoffs: Handoffs, generation: Generation, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(4)
    with running(handoffs, generation, (4 * HUGE,), HUGE) as (_, pipe):
        vmm = await handoffs.firecracker_vmm()
        assert vmm.memory.blocks[0].page_size == HUGE
        source = PageSource(vmm)
        source.listen()
        assert await said(pipe) == []
        source.stop()


async def test_a_vmm_that_cannot_be_watched_is_refused(
    handoffs: Handoffs, stand_in: FirecrackerStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postcopyd.vmm.handoff.peer_pidfd", lambda connection, peer: None)
    assert "its end would go unnoticed" in await refusal_of(handoffs, stand_in)


async def test_a_thread_that_waits_since_before_the_handoff_gets_its_page(
    handoffs: Handoffs, stand_in: FirecrackerStandIn
) -> None:
    """Checking the regions must not let it go on with zeros."""
    vcpu = GuestRead(stand_in.regions[0].address, PAGE)
    wait_readable(stand_in.userfaultfd.fileno())
    stand_in.hand_over(handoffs.path).close()
    source = PageSource(await handoffs.firecracker_vmm())
    source.listen()
    seen = await asyncio.to_thread(vcpu.data)
    source.stop()
    assert seen == content_of("region0", 0)


async def test_a_snapshot_without_balloon_enables_no_feature(handoffs: Handoffs) -> None:
    with FirecrackerStandIn(LENGTHS, Generation.V1_1, Feature(0)) as stand_in:
        stand_in.hand_over(handoffs.path).close()
        assert (await handoffs.firecracker_vmm()).memory.registered


async def test_descriptors_that_forks_send_along_are_closed(
    handoffs: Handoffs, stand_in: FirecrackerStandIn
) -> None:
    guest = memory_file.create("guest_mem", sum(LENGTHS))
    reader, writer = os.pipe()
    stand_in.descriptors += [guest, writer]
    stand_in.hand_over(handoffs.path).close()
    await handoffs.firecracker_vmm()
    os.close(writer)
    assert os.read(reader, 1) == b"", "the writing end of the pipe is still open"
    os.close(reader)
    os.close(guest)


async def test_a_vmm_that_is_killed_is_gone_but_one_that_closes_its_socket_is_not(
    handoffs: Handoffs,
) -> None:
    with running(handoffs) as (process, _):
        vmm = await handoffs.firecracker_vmm()
        gone = asyncio.create_task(vmm.gone())
        # The socket was closed long before; a turn of the event loop would have told.
        await asyncio.sleep(0)
        assert not gone.done()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.wait_for(gone, LIMIT)


async def test_a_device_state_is_refused_because_nobody_would_load_it(
    handoffs: Handoffs, stand_in: FirecrackerStandIn
) -> None:
    stand_in.hand_over(handoffs.path).close()
    vmm = await handoffs.firecracker_vmm()
    with pytest.raises(VmmFailure, match="Firecracker restores its own device state"):
        await vmm.run(DeviceLoad(b"", b"state", (), asyncio.Event(), print, print))


async def test_closing_twice_closes_once(handoffs: Handoffs, stand_in: FirecrackerStandIn) -> None:
    before = open_descriptors()
    stand_in.hand_over(handoffs.path).close()
    vmm = await handoffs.firecracker_vmm()
    await vmm.failed("the source has gone")
    vmm.close()
    vmm.close()
    assert vmm.memory.userfaultfd.closed
    assert open_descriptors() == before


# -- refusals ------------------------------------------------------------------------------------


async def refusal_of(handoffs: Handoffs, stand_in: FirecrackerStandIn) -> str:
    """Hand over what must be refused; nothing may be answered, nothing may stay open."""
    with stand_in.hand_over(handoffs.path) as connection:
        before = open_descriptors()
        reason = await handoffs.refusal()
        connection.settimeout(LIMIT)
        assert await asyncio.to_thread(connection.recv, 1) == b""
        assert open_descriptors() == before
    return reason


Change = Callable[[FirecrackerStandIn], None]
MISTAKES: dict[str, tuple[Change, str]] = {
    "no descriptor": (lambda vmm: vmm.descriptors.clear(), "no descriptor came"),
    "two userfaultfds": (
        lambda vmm: vmm.descriptors.append(vmm.descriptors[0]),
        "descriptor 1 is a second userfaultfd",
    ),
    "something else than a userfaultfd first": (
        lambda vmm: vmm.descriptors.insert(0, 2),
        "it must be the userfaultfd",
    ),
    "no regions": (lambda vmm: vmm.message.clear(), "length"),
    "guest_memfd": (
        lambda vmm: vmm.message[0].update(is_guest_memfd=True),
        "region 0: is_guest_memfd is true",
    ),
    "another page size": (
        lambda vmm: vmm.message[0].update(page_size=16384),
        "region 0: page size 16384",
    ),
    "regions that overlap": (
        lambda vmm: vmm.message[1].update(
            base_host_virt_addr=vmm.regions[0].address + 8 * PAGE, size=PAGE
        ),
        "blocks 'region0' and 'region1' overlap",
    ),
    "a region of zero bytes": (
        lambda vmm: vmm.message[1].update(size=0),
        "block 'region1': length 0x0",
    ),
    "a region that is not mapped": (
        lambda vmm: vmm.message[1].update(base_host_virt_addr=PAGE, size=PAGE),
        "block 'region1': 0x1000 to 0x2000 is not mapped",
    ),
    "a region that is no whole huge pages": (
        lambda vmm: vmm.message[0].update(page_size=HUGE),
        "is not a multiple of the page size 2097152",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_handoff_is_refused_for(
    handoffs: Handoffs, stand_in: FirecrackerStandIn, mistake: str
) -> None:
    change, expected = MISTAKES[mistake]
    change(stand_in)
    assert expected in await refusal_of(handoffs, stand_in)


async def test_a_userfaultfd_of_another_process_that_has_gone(handoffs: Handoffs) -> None:
    """The memory that it watched is no more: nothing can be registered."""
    with running(handoffs) as (process, _):
        vmm = await handoffs.firecracker_vmm()
        orphan = Userfaultfd(os.dup(vmm.memory.userfaultfd.fileno()))
        process.kill()
        process.join(LIMIT)
    try:
        with FirecrackerStandIn(LENGTHS) as stand_in:
            stand_in.descriptors = [orphan.fileno()]
            assert "is not mapped" in await refusal_of(handoffs, stand_in)
    finally:
        orphan.close()


@pytest.mark.parametrize("text", [b"", b"[", b'[{"base_host_virt_addr":'])
async def test_a_vmm_that_hangs_up_early(
    handoffs: Handoffs, stand_in: FirecrackerStandIn, text: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(handoffs.path))
        if text:
            socket.send_fds(connection, [text], stand_in.descriptors)
    assert (f"after {len(text)} bytes" if text else "before it sent") in await handoffs.refusal()
