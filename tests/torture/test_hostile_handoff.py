"""Hostile VMMs at the handoff socket: wrong messages, and descriptors of every wrong kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Feature, Operation, RegisterMode, Userfaultfd
from tests.fuzz.mutating import changed_json, changed_order
from tests.torture.bystander import bystander
from tests.torture.sampling import Sampling, Tally
from tests.torture.test_hostile_engine import no_mistake_of_ours
from tests.vmm.handoffs import FEATURES, LIMIT, PAGE, Handoffs, Offer, RawPeer, listening

_ADDRESS = 0x600000000000
"""Stands for the address of the memory while the message is changed: what is mapped near it is this
process's own, which is not to be registered."""
_LENGTH = 4 * PAGE
"""Of each block, in bytes."""


class Descriptors:
    """One of each wrong kind."""

    def __init__(self) -> None:
        self._owned: list[int] = []
        self._userfaultfds = [Userfaultfd.open() for _ in range(4)]
        for userfaultfd, features in zip(
            self._userfaultfds,
            (FEATURES, FEATURES | Feature.EVENT_FORK, FEATURES | Feature.SIGBUS),
            strict=False,
        ):
            userfaultfd.handshake(features)  # the last one stays without
        self._sockets = socket.socketpair()
        self._pipe = os.pipe()
        self._file = memory_file.create("a right size", 16 * PAGE)
        self._sealed = memory_file.create("sealed", 16 * PAGE)
        memory_file.seal(self._sealed)
        self._short = memory_file.create("short", PAGE)
        self._null = os.open("/dev/null", os.O_RDWR)
        self._directory = os.open("/", os.O_RDONLY)
        self._pidfd = os.pidfd_open(os.getpid())
        self._owned += [
            *(self._file, self._sealed, self._short, self._null, self._directory, self._pidfd),
            *self._pipe,
        ]
        self.all = [
            *self._owned,
            *(one.fileno() for one in self._userfaultfds),
            *(one.fileno() for one in self._sockets),
        ]

    def forget(self, mappings: list[Mapping]) -> None:
        """Watch none of these any more: who says that he has registered what he has not stays so.

        Otherwise nobody else could watch it, and who unmaps it would wait to be read of.
        """
        for mapping in mappings:
            for userfaultfd in self._userfaultfds:
                with contextlib.suppress(OSError):  # it is another's, or has done no handshake
                    userfaultfd.unregister(mapping.address, _LENGTH)

    def close(self) -> None:
        for userfaultfd in self._userfaultfds:
            userfaultfd.close()
        for one in self._sockets:
            one.close()
        for descriptor in self._owned:
            os.close(descriptor)


@contextlib.contextmanager
def fenced_offer() -> Iterator[Offer]:
    """A right handoff behind whose memory nothing else can be registered.

    The VMM is this process: what is registered by a length too great would be Python's own memory,
    and its next unmapping would wait for ever for somebody to read of it.
    """
    with Offer() as offer, Userfaultfd.open() as fence:
        fence.handshake(Feature(0))
        for place, mapping in enumerate(offer.mappings):
            mapping.close()
            offer.mappings[place] = fenced = Mapping.anonymous(2 * _LENGTH)
            fence.register(fenced.address + _LENGTH, _LENGTH, RegisterMode.MISSING, Operation(0))
        yield offer


@pytest.fixture
def wrong() -> Iterator[Descriptors]:
    descriptors = Descriptors()
    yield descriptors
    descriptors.close()


def nearly_right(offer: Offer, wrong: Descriptors, numbers: Random) -> tuple[bytes, list[int]]:
    """Return a message and descriptors of which something is wrong."""
    message = json.loads(offer.text)
    for block in message["blocks"]:
        del block["length"]
        block |= {"address": _ADDRESS, "length": _LENGTH}
    if numbers.random() < 0.3:  # Firecracker's
        message = [
            {"base_host_virt_addr": _ADDRESS, "size": _LENGTH, "offset": 0, "page_size": PAGE}
        ]
    elif numbers.random() < 0.5:
        message["blocks"][0]["memory_file"] = 1
    descriptors = list(offer.descriptors)
    text = json.dumps(message).encode()
    if numbers.random() < 0.6:
        text = changed_json(numbers, message)
    for mapping in offer.mappings:
        text = text.replace(str(_ADDRESS).encode(), str(mapping.address).encode(), 1)
    while numbers.random() < 0.5:
        changed_order(numbers, descriptors, [*wrong.all, *offer.descriptors])
        descriptors = descriptors or [numbers.choice(wrong.all)]
    return text + b"\n", descriptors[:253]


async def offer_once(handoffs: Handoffs, text: bytes, descriptors: list[int]) -> str:
    """Send it and close; return what came of it."""
    with RawPeer(handoffs.path) as peer, contextlib.suppress(OSError, AssertionError):
        peer.send(text[:100_000], descriptors)
    taken = asyncio.ensure_future(handoffs.offered())
    refused = asyncio.ensure_future(handoffs.refusal())
    done, _ = await asyncio.wait(
        (taken, refused), timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED
    )
    for waiting in (taken, refused):
        waiting.cancel()
    assert len(done) == 1, "one clear answer"
    if refused in done:
        assert refused.result() and len(refused.result()) < 3000
        return "refused"
    _, vmm, _ = taken.result()
    vmm.close()
    handoffs._taken.clear()
    return "taken"


@pytest.mark.timeout(900)
async def test_a_hostile_vmm_is_refused_with_one_reason_and_leaves_nothing_behind(
    sampling: Sampling, tally: Callable[[str], Tally], tmp_path: Path, wrong: Descriptors
) -> None:
    outcomes = tally("hostile handoffs").outcomes
    numbers = sampling.numbers("hostile handoffs")
    # At its end `listening` looks for what was left open.
    with no_mistake_of_ours(), fenced_offer() as offer:
        async with listening(tmp_path / "handoff.sock") as handoffs, bystander() as others:
            for _ in range(sampling.count(300, 5000)):
                text, descriptors = nearly_right(offer, wrong, numbers)
                outcomes[await offer_once(handoffs, text, descriptors)] += 1
                wrong.forget(offer.mappings)
        outcomes["right migrations meanwhile"] += others.completed
    assert {"refused", "taken"} <= set(outcomes)
