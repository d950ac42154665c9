"""A handoff that is wrong in one thing is refused for that one thing, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopyd.kernel import memory_file, open_files
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Feature, Operation, RegisterMode, Userfaultfd
from postcopyd.vmm import handoff
from postcopyd.vmm.client import Block
from postcopyd.wire.handoff import VERSION, BlockDescription, Handoff
from tests.vmm.handoffs import (
    FEATURES,
    LIMIT,
    PAGE,
    Handoffs,
    Offer,
    RawPeer,
    listening,
    open_descriptors,
    why_refused,
)

HUGE = 2 << 20


async def refused(handoffs: Handoffs, offer: Offer) -> str:
    return await why_refused(handoffs, offer.text, offer.descriptors)


async def test_the_offer_itself_is_accepted(handoffs: Handoffs, offer: Offer) -> None:
    """Else the tests below could pass for another reason than the one they mean."""
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        assert await peer.line() == {
            "event": "registered",
            "name": "vm0",
            "listen": ["tcp:127.0.0.1:40123"],
        }


# -- descriptors ---------------------------------------------------------------------------------


async def test_no_descriptor(handoffs: Handoffs, offer: Offer) -> None:
    assert "no descriptor" in await why_refused(handoffs, offer.text, [])


async def test_two_userfaultfds(handoffs: Handoffs, offer: Offer) -> None:
    offer.descriptors *= 2
    assert "descriptor 1 is a second userfaultfd" in await refused(handoffs, offer)


async def test_a_descriptor_that_no_block_names(handoffs: Handoffs, offer: Offer) -> None:
    with open("/dev/null") as null:
        offer.descriptors.append(null.fileno())
        reason = await refused(handoffs, offer)
    assert "descriptor 1 (/dev/null) is the memory file of no block" in reason


async def test_more_descriptors_than_one_message_carries(handoffs: Handoffs, offer: Offer) -> None:
    with RawPeer(handoffs.path) as peer:
        before = open_descriptors()
        for _ in range(2):
            peer.send(b" ", offer.descriptors * 127)
        assert "more than 253 descriptors" in await handoffs.refusal()
        assert await peer.line() is not None
        assert await peer.line() is None
        assert open_descriptors() == before


async def test_a_file_instead_of_the_userfaultfd(handoffs: Handoffs, offer: Offer) -> None:
    with open("/dev/null") as null:
        reason = await why_refused(handoffs, offer.text, [null.fileno()])
    assert reason == "descriptor 0 is /dev/null, it must be the userfaultfd"


async def test_a_userfaultfd_without_handshake(handoffs: Handoffs, offer: Offer) -> None:
    fresh = Userfaultfd.open()
    try:
        reason = await why_refused(handoffs, offer.text, [fresh.fileno()])
    finally:
        fresh.close()
    assert "without its handshake" in reason


@pytest.mark.parametrize("feature", [Feature.EVENT_FORK, Feature.EVENT_REMAP, Feature.SIGBUS])
async def test_a_feature_that_breaks_post_copy(handoffs: Handoffs, feature: Feature) -> None:
    with Offer(FEATURES | feature) as offer:
        reason = await refused(handoffs, offer)
    assert feature.name is not None
    assert f"the feature {feature.name} enabled" in reason


async def test_a_blocking_userfaultfd_is_made_non_blocking(
    handoffs: Handoffs, offer: Offer
) -> None:
    os.set_blocking(offer.descriptors[0], True)
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        vmm = await handoffs.native_vmm()
        assert not os.get_blocking(vmm.memory.userfaultfd.fileno())


# -- blocks --------------------------------------------------------------------------------------

BLOCK_MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "length of zero": (lambda ram: {"length": 0}, "length 0x0 "),
    "length that is no whole pages": (lambda ram: {"length": PAGE + 1}, "length 0x1001"),
    "address inside a page": (lambda ram: {"address": ram["address"] + 8}, "address 0x"),
    "address of zero": (lambda ram: {"address": 0}, "address 0x0 "),
    "page size of zero": (lambda ram: {"page_size": 0}, "page size 0 "),
    "page size that is no power of two": (lambda ram: {"page_size": 12288}, "page size 12288"),
    "page size below the host's": (lambda ram: {"page_size": 2048}, "page size 2048"),
    "page size above that of the mapping": (
        lambda ram: {
            "page_size": 2 * PAGE,
            "address": ram["address"] + ram["address"] % (2 * PAGE),
            "length": 8 * PAGE,
        },
        "mapped with pages of 4096 bytes, not of 8192",
    ),
    "empty name": (lambda ram: {"name": ""}, "the name of block 0 is empty"),
    "name of 256 bytes": (lambda ram: {"name": "é" * 128}, "the name of block 0 has 256 bytes"),
    "name with a NUL": (lambda ram: {"name": "pc\0ram"}, "the name of block 0 has a NUL"),
    "name that is taken": (lambda ram: {"name": "pc.bios"}, "two blocks have the name 'pc.bios'"),
    "memory file that did not come": (lambda ram: {"memory_file": 1}, "memory_file is 1, but only"),
    "userfaultfd as memory file": (lambda ram: {"memory_file": 0}, "memory_file is 0, but"),
}


@pytest.mark.parametrize("mistake", BLOCK_MISTAKES)
async def test_a_block_with(handoffs: Handoffs, offer: Offer, mistake: str) -> None:
    change, expected = BLOCK_MISTAKES[mistake]
    offer.ram.update(change(offer.ram))
    assert expected in await refused(handoffs, offer)


async def test_no_blocks(handoffs: Handoffs, offer: Offer) -> None:
    offer.message["blocks"] = []
    assert await refused(handoffs, offer) == "there are no blocks"


async def test_blocks_that_overlap(handoffs: Handoffs, offer: Offer) -> None:
    second = offer.message["blocks"][1]
    second["address"] = offer.ram["address"] + 15 * PAGE
    assert await refused(handoffs, offer) == "blocks 'pc.ram' and 'pc.bios' overlap"


async def test_blocks_that_touch_are_accepted(handoffs: Handoffs, offer: Offer) -> None:
    second = offer.message["blocks"][1]
    offer.ram["length"] = 8 * PAGE
    second["address"] = offer.ram["address"] + 8 * PAGE
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        assert (await handoffs.native_vmm()).memory.blocks[1].length == 4 * PAGE


async def test_a_block_that_is_not_mapped(handoffs: Handoffs, offer: Offer) -> None:
    offer.mappings[0].close()
    assert "block 'pc.ram': 0x" in (reason := await refused(handoffs, offer))
    assert "is not mapped" in reason


@pytest.mark.parametrize(("first_unmapped", "tried"), [(0, 0), (8, 15)])
async def test_a_block_of_which_one_half_is_not_mapped(
    handoffs: Handoffs, offer: Offer, first_unmapped: int, tried: int
) -> None:
    """The kernel registers such a range without a word."""
    address = offer.ram["address"]
    unmapped = ctypes.c_void_p(address + first_unmapped * PAGE)
    assert ctypes.CDLL(None).munmap(unmapped, ctypes.c_size_t(8 * PAGE)) == 0
    page = address + tried * PAGE
    assert f"block 'pc.ram': {page:#x} to {page + PAGE:#x} is not mapped" in await refused(
        handoffs, offer
    )


async def test_a_block_that_another_userfaultfd_watches(handoffs: Handoffs, offer: Offer) -> None:
    other = Userfaultfd.open()
    try:
        other.handshake(Feature(0))
        other.register(
            offer.ram["address"], offer.ram["length"], RegisterMode.MISSING, Operation.COPY
        )
        assert "is registered elsewhere" in await refused(handoffs, offer)
    finally:
        other.close()


async def test_a_huge_page_block_that_says_it_has_small_pages(
    handoffs: Handoffs, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(1)
    with (
        Offer(FEATURES | Feature.MISSING_HUGETLBFS) as offer,
        closing(Block.anonymous("huge", HUGE, HUGE)) as block,
    ):
        offer.ram.update(address=block.address, length=HUGE)
        assert "is not mapped with pages of 4096 bytes" in await refused(handoffs, offer)
        offer.ram.update(page_size=HUGE)
        with RawPeer(handoffs.path) as peer:
            offer.send(peer)
            assert (await handoffs.native_vmm()).memory.blocks[0].page_size == HUGE


async def test_the_trial_leaves_nothing_registered(handoffs: Handoffs, offer: Offer) -> None:
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        await handoffs.native_vmm()
        # Registered memory would make this thread wait, and the test with it.
        offer.mappings[0].view[0] = 1
        assert offer.mappings[0].view[0] == 1


# -- memory files --------------------------------------------------------------------------------


@pytest.fixture
def file_offer() -> Iterator[Offer]:
    """An offer whose first block lies, from its second page on, in a memory file of 17 pages."""
    with Offer(FEATURES | Feature.MISSING_SHMEM) as offer:
        descriptor = memory_file.create("guest", 17 * PAGE)
        mapping = Mapping.of_file(descriptor, 16 * PAGE, PAGE)
        offer.mappings.append(mapping)
        offer.ram.update(address=mapping.address, memory_file=1, file_offset=PAGE)
        offer.descriptors.append(descriptor)
        yield offer
        os.close(descriptor)


async def test_a_memory_file_that_is_right(handoffs: Handoffs, file_offer: Offer) -> None:
    with RawPeer(handoffs.path) as peer:
        file_offer.send(peer)
        block = (await handoffs.native_vmm()).memory.blocks[0]
        assert block.memory_file is not None
        assert os.path.sameopenfile(block.memory_file, file_offer.descriptors[1])
        assert block.file_offset == PAGE


async def test_a_memory_file_that_comes_twice_is_taken_once(
    handoffs: Handoffs, file_offer: Offer
) -> None:
    """A service manager keeps no open file by two names, and this one lets nobody open it again."""
    os.fchmod(file_offer.descriptors[1], 0)
    os.ftruncate(file_offer.descriptors[1], 21 * PAGE)
    file_offer.message["blocks"][1].update(memory_file=2, file_offset=17 * PAGE)
    file_offer.descriptors.append(file_offer.descriptors[1])
    with RawPeer(handoffs.path) as peer:
        file_offer.send(peer)
        vmm = await handoffs.native_vmm()
        one, other = (block.memory_file for block in vmm.memory.blocks)
        assert one == other
        assert list(vmm.descriptors).count("memory-file-0") == 1
        assert "memory-file-1" not in vmm.descriptors


async def test_a_memory_file_that_was_opened_very_often(
    handoffs: Handoffs, file_offer: Offer
) -> None:
    """Each is compared with the others, and the other guests of the worker wait meanwhile."""
    again = [memory_file.open_again(file_offer.descriptors[1]) for _ in range(8)]
    file_offer.descriptors += again
    assert "is handed over as more than 8 open files" in await refused(handoffs, file_offer)
    for descriptor in again:
        os.close(descriptor)


def test_memory_files_are_compared_once_however_many_blocks_name_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A VMM may name its last one in every block: other guests wait meanwhile."""
    compared: list[tuple[int, int]] = []
    really_is_same = open_files.is_same

    def is_same(one: int, other: int) -> bool:
        compared.append((one, other))
        return really_is_same(one, other)

    monkeypatch.setattr(open_files, "is_same", is_same)
    with contextlib.ExitStack() as stack:
        descriptors = [0]
        for _ in range(8):
            file = memory_file.create("ram", PAGE)
            descriptors += [file, memory_file.open_again(file)]
        for descriptor in descriptors[1:]:
            stack.callback(os.close, descriptor)
        # Each is the memory file of one block, and the last one that of a thousand more.
        numbers = [*range(1, len(descriptors)), *[len(descriptors) - 1] * 1000]
        offer = Handoff(
            version=VERSION,
            name="vm0",
            blocks=tuple(
                BlockDescription(
                    name=f"block{place}",
                    address=(place + 1) * PAGE,
                    length=PAGE,
                    page_size=PAGE,
                    memory_file=number,
                )
                for place, number in enumerate(numbers)
            ),
        )
        blocks = handoff._native_blocks(offer, descriptors)
    assert [block.memory_file for block in blocks] == [descriptors[number] for number in numbers]
    # Two open files of one file, eight times; two files need not be compared at all.
    assert len(compared) == 8


async def test_a_memory_file_that_is_too_small(handoffs: Handoffs, file_offer: Offer) -> None:
    file_offer.ram.update(file_offset=2 * PAGE)
    reason = await refused(handoffs, file_offer)
    assert reason == ("block 'pc.ram' ends at byte 73728 of its memory file, which has only 69632")


async def test_an_offset_in_a_memory_file_that_is_no_whole_pages(
    handoffs: Handoffs, file_offer: Offer
) -> None:
    file_offer.ram.update(file_offset=512)
    assert "file_offset 0x200" in await refused(handoffs, file_offer)


async def test_a_memory_file_that_is_none(
    handoffs: Handoffs, file_offer: Offer, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(17 * PAGE))
    with path.open("r+b") as file:
        file_offer.descriptors[1] = file.fileno()
        reason = await refused(handoffs, file_offer)
    assert reason == f"block 'pc.ram': its memory file is {path}, it must be one of memfd_create"


async def test_a_memory_file_of_huge_pages_for_a_block_of_small_ones(
    handoffs: Handoffs, file_offer: Offer
) -> None:
    file_offer.ram.update(file_offset=0)
    descriptor = memory_file.create("huge", HUGE, HUGE)
    try:
        reason = await why_refused(
            handoffs, file_offer.text, [file_offer.descriptors[0], descriptor]
        )
    finally:
        os.close(descriptor)
    assert reason == "block 'pc.ram': its memory file has pages of 2097152 bytes, not 4096"


async def test_two_blocks_in_one_piece_of_a_memory_file(
    handoffs: Handoffs, file_offer: Offer
) -> None:
    second = file_offer.message["blocks"][1]
    second.update(memory_file=2, file_offset=4 * PAGE)
    file_offer.descriptors.append(file_offer.descriptors[1])
    assert await refused(handoffs, file_offer) == (
        "blocks 'pc.ram' and 'pc.bios' share a piece of one memory file"
    )


# -- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "v" * 256])
async def test_a_migration_name_of_a_wrong_length(
    handoffs: Handoffs, offer: Offer, name: str
) -> None:
    offer.message["name"] = name
    assert "the name of the migration" in await refused(handoffs, offer)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"hello\n", "not a valid message"),
        (b"{}\n", "postcopyd"),
        (b"\0\n", "not a valid message"),
        (b"GET / HTTP/1.1\r\n\r\n", "not a valid message"),
    ],
)
async def test_what_is_no_handoff(
    handoffs: Handoffs, offer: Offer, data: bytes, expected: str
) -> None:
    assert expected in await why_refused(handoffs, data, offer.descriptors)


async def test_the_reason_is_short_however_long_what_was_wrong_is(
    handoffs: Handoffs, offer: Offer
) -> None:
    offer.ram["no such field" * 1000] = 1
    assert len(await refused(handoffs, offer)) < 1100
    offer.message["blocks"][0] = offer.message["blocks"][1] | {"name": "x" * 10_000}
    assert len(await refused(handoffs, offer)) < 1100


@pytest.mark.parametrize("more", [b"{", b'{"event":"advised"}\n'])
async def test_more_than_the_handoff(handoffs: Handoffs, offer: Offer, more: bytes) -> None:
    await why_refused(handoffs, offer.text + more, offer.descriptors)


@pytest.mark.parametrize("filler", [b" ", b"["])
async def test_a_message_without_end(handoffs: Handoffs, offer: Offer, filler: bytes) -> None:
    with RawPeer(handoffs.path) as peer:
        before = open_descriptors()
        peer.send(filler, offer.descriptors)
        with contextlib.suppress(BrokenPipeError):
            async with asyncio.timeout(LIMIT):
                await asyncio.get_running_loop().sock_sendall(peer.socket, filler * (2 << 20))
        assert "more than 1048576 bytes" in await handoffs.refusal()
        while await peer.line() is not None:
            pass
        assert open_descriptors() == before


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(end=st.integers(0, 200))
async def test_bytes_that_stop_anywhere(handoffs: Handoffs, offer: Offer, end: int) -> None:
    data = offer.text[: min(end, len(offer.text) - 1)]
    with RawPeer(handoffs.path) as peer:
        before = open_descriptors()
        if data:
            peer.send(data, offer.descriptors)
        peer.socket.shutdown(socket.SHUT_WR)
        reason = await handoffs.refusal()
        assert f"after {len(data)} bytes" in reason if data else "before it sent" in reason
        assert await peer.line() == {"event": "failed", "reason": reason}
        assert await peer.line() is None
        assert open_descriptors() == before


async def test_a_peer_that_vanishes_at_once(handoffs: Handoffs) -> None:
    with RawPeer(handoffs.path):
        pass
    assert "closed the connection" in await handoffs.refusal()


@pytest.mark.parametrize("sent", [b"", b"{", b"["])
async def test_a_peer_that_sends_no_whole_message_in_time(
    tmp_path: Path, offer: Offer, sent: bytes
) -> None:
    async with listening(tmp_path / "handoff.sock", timeout=0.05) as handoffs:
        with RawPeer(handoffs.path) as peer:
            before = open_descriptors()
            if sent:
                peer.send(sent, offer.descriptors)
            reason = await handoffs.refusal()
            while await peer.line() is not None:
                pass
            assert open_descriptors() == before
    assert reason == f"no whole message came within 0.05 s, only {len(sent)} bytes"


async def test_a_user_who_is_not_allowed(tmp_path: Path, offer: Offer) -> None:
    async with listening(tmp_path / "handoff.sock", users=[os.geteuid() + 1]) as handoffs:
        reason = await why_refused(handoffs, offer.text, offer.descriptors)
    assert "is not allowed" in reason
    assert str(os.geteuid()) in reason


async def test_who_was_refused_is_told_to_the_daemon(handoffs: Handoffs, offer: Offer) -> None:
    with RawPeer(handoffs.path) as peer:
        peer.send(offer.text)
        refused_peer, _ = await handoffs.refused_peer()
    assert (refused_peer.pid, refused_peer.uid) == (os.getpid(), os.geteuid())
