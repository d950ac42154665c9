"""What a native VMM is told and asked, and what becomes of a VMM that breaks its promises."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from postcopyd.incoming.vmm import DeviceLoad, VmmFailure
from postcopyd.vmm.handoff import HandoffRefused
from postcopyd.vmm.native import NativeFacts, NativeVmm
from postcopyd.vmm.peer import peer_of
from tests.vmm.handoffs import LIMIT, Handoffs, Offer, RawPeer, open_descriptors

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass
class Pair:
    """Both ends of a handoff that was accepted."""

    vmm: NativeVmm
    peer: RawPeer


@pytest.fixture
async def pair(handoffs: Handoffs, offer: Offer) -> AsyncIterator[Pair]:
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        vmm = await handoffs.native_vmm()
        assert (await peer.line() or {})["event"] == "registered"
        yield Pair(vmm, peer)


LOAD = DeviceLoad(b"", b"state", (), asyncio.Event(), print, print)

# Each thing that is asked: how, the event that the VMM sees, its answer.
QUESTIONS: dict[str, tuple[Callable[[NativeVmm], Awaitable[None]], str]] = {
    "advise": (lambda vmm: vmm.advise(within=LIMIT), "advised"),
    "discard": (lambda vmm: vmm.discard(within=LIMIT), "discarded"),
    "run": (lambda vmm: vmm.run(LOAD), "loaded"),
}


async def ask(pair: Pair, question: str) -> asyncio.Future[None]:
    """Ask and return when the VMM has seen it."""
    asking = asyncio.ensure_future(QUESTIONS[question][0](pair.vmm))
    while (await pair.peer.line() or {})["event"] != question:
        pass
    return asking


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_question_is_done_when_its_answer_comes(pair: Pair, question: str) -> None:
    asking = await ask(pair, question)
    assert not asking.done()
    pair.peer.say(QUESTIONS[question][1])
    await asyncio.wait_for(asking, LIMIT)


async def test_the_balloon_is_inhibited_before_memory_is_emptied(pair: Pair) -> None:
    asking = asyncio.ensure_future(pair.vmm.advise())
    assert await pair.peer.line() == {"event": "inhibit-balloon"}
    assert await pair.peer.line() == {"event": "advise"}
    pair.peer.say("advised")
    await asyncio.wait_for(asking, LIMIT)


@pytest.mark.parametrize("question", QUESTIONS)
async def test_what_was_answered_is_not_asked_again(pair: Pair, question: str) -> None:
    asking = await ask(pair, question)
    pair.peer.say(QUESTIONS[question][1])
    await asyncio.wait_for(asking, LIMIT)
    await asyncio.wait_for(QUESTIONS[question][0](pair.vmm), LIMIT)


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
async def test_the_device_state_comes_in_a_sealed_memory_file(pair: Pair, size: int) -> None:
    device_state = os.urandom(size)
    asking = asyncio.ensure_future(
        pair.vmm.run(DeviceLoad(b"", device_state, (), asyncio.Event(), print, print))
    )
    assert await pair.peer.line() == {"event": "run", "length": size}
    (descriptor,) = pair.peer.descriptors
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & ALL_SEALS == ALL_SEALS
    assert os.fstat(descriptor).st_size == size
    assert os.pread(descriptor, size, 0) == device_state
    pair.peer.say("loaded")
    await asyncio.wait_for(asking, LIMIT)


async def test_one_whose_last_word_is_that_it_runs_has_run(pair: Pair) -> None:
    asking = await ask(pair, "run")
    pair.peer.say("loaded")
    pair.vmm._exited()  # which is seen first
    await asyncio.wait_for(pair.vmm.gone(), LIMIT)
    await asyncio.wait_for(asking, LIMIT)
    assert pair.vmm.has_run


async def test_one_has_run_as_soon_as_it_has_said_so(pair: Pair) -> None:
    asking = await ask(pair, "run")
    assert not pair.vmm.has_run
    pair.peer.say("loaded")
    assert pair.vmm.has_run
    await asyncio.wait_for(asking, LIMIT)


@pytest.fixture
def inherit() -> Iterator[Callable[[NativeFacts], tuple[NativeVmm, socket.socket]]]:
    """Make a VMM of what a predecessor has left of it, and its end of the connection."""
    with ExitStack() as made:

        def make(facts: NativeFacts) -> tuple[NativeVmm, socket.socket]:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            made.enter_context(theirs)
            ours.setblocking(False)
            resources = ExitStack()
            resources.callback(ours.close)
            memory: Any = None
            vmm = NativeVmm(ours, peer_of(ours), None, memory, resources, facts)
            made.callback(vmm.close)
            return vmm, theirs

        yield make


Inherit = Callable[[NativeFacts], tuple[NativeVmm, socket.socket]]


@pytest.mark.parametrize("asked", [True, False], ids=["it is asked", "it is only looked at"])
async def test_one_that_has_told_a_predecessor_that_it_runs_has_run_though_it_has_gone(
    inherit: Inherit, asked: bool
) -> None:
    vmm, theirs = inherit(NativeFacts(advised=True, discarded=True))
    theirs.send(b'{"event":"loaded"}\n')
    theirs.close()
    if asked:
        vmm.registered("vm0", ())
        await asyncio.wait_for(vmm.run(LOAD), LIMIT)
    assert vmm.has_run
    await asyncio.wait_for(vmm.gone(), LIMIT)


async def test_one_that_has_gone_before_it_has_said_that_it_runs_has_not(inherit: Inherit) -> None:
    vmm, theirs = inherit(NativeFacts(advised=True, discarded=True))
    theirs.send(b'{"event":"discarded"}\n')
    theirs.close()
    vmm.registered("vm0", ())
    with pytest.raises(VmmFailure):
        await asyncio.wait_for(vmm.run(LOAD), LIMIT)
    assert not vmm.has_run


async def test_one_that_was_not_asked_to_run_by_anybody_is_asked_whatever_it_has_said(
    inherit: Inherit,
) -> None:
    vmm, theirs = inherit(NativeFacts(advised=True))
    theirs.send(b'{"event":"loaded"}\n')
    assert not vmm.has_run


async def test_running_leaves_no_descriptor_open(pair: Pair) -> None:
    before = open_descriptors()
    asking = await ask(pair, "run")
    pair.peer.say("loaded")
    await asyncio.wait_for(asking, LIMIT)
    os.close(pair.peer.descriptors.pop())
    assert open_descriptors() == before


async def test_listening_and_completion_are_told(pair: Pair) -> None:
    pair.vmm.listening()
    await pair.vmm.complete(0)
    await pair.vmm.complete(0)
    await pair.vmm.failed("too late to fail")
    pair.vmm.close()
    lines = [await pair.peer.line() for _ in range(4)]
    assert lines == [
        {"event": "listening"},
        {"event": "allow-balloon"},
        {"event": "complete"},
        None,
    ]


async def test_a_failure_is_told_with_its_reason(pair: Pair) -> None:
    await pair.vmm.failed("the source has gone")
    pair.vmm.close()
    assert await pair.peer.line() == {"event": "failed", "reason": "the source has gone"}
    assert await pair.peer.line() is None


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_vmm_may_refuse(pair: Pair, question: str) -> None:
    asking = await ask(pair, question)
    pair.peer.say("refused", reason="no memory left")
    with pytest.raises(VmmFailure, match=rf"it refused '{question}': no memory left"):
        await asyncio.wait_for(asking, LIMIT)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b'{"event":"advised"}{"event":"advised"}\n', "wrong answer"),
        (b'{"event":"complete"}\n', "wrong answer"),
        (b"yes\n", "wrong answer"),
        (b" " * 65537, "wrong answer.*more than 65536 bytes"),
    ],
)
async def test_an_answer_that_is_none(
    pair: Pair, question: str, answer: bytes, expected: str
) -> None:
    asking = await ask(pair, question)
    pair.peer.send(answer)
    with pytest.raises(VmmFailure, match=expected):
        await asyncio.wait_for(asking, LIMIT)


@pytest.mark.parametrize("question", QUESTIONS)
async def test_an_answer_to_another_question(pair: Pair, question: str) -> None:
    asking = await ask(pair, question)
    other = "loaded" if question == "advise" else "advised"
    pair.peer.say(other)
    with pytest.raises(VmmFailure, match=f"answered '{other}' to '{question}'"):
        await asyncio.wait_for(asking, LIMIT)


async def test_a_vmm_that_broke_the_protocol_is_told_why_it_failed(pair: Pair) -> None:
    asking = await ask(pair, "discard")
    pair.peer.say("loaded")
    with pytest.raises(VmmFailure) as failure:
        await asyncio.wait_for(asking, LIMIT)
    await pair.vmm.failed(str(failure.value))
    assert await pair.peer.line() == {"event": "failed", "reason": str(failure.value)}


async def test_failing_after_closing_tells_nobody(pair: Pair) -> None:
    pair.vmm.close()
    await pair.vmm.failed("too late")
    assert await pair.peer.line() is None


async def test_an_answer_that_nobody_asked_for_fails_the_next_question(pair: Pair) -> None:
    pair.peer.say("loaded")
    for _ in range(3):  # turns of the event loop: it is read before anything is asked
        await asyncio.sleep(0)
    with pytest.raises(VmmFailure, match="said 'loaded' without being asked"):
        await asyncio.wait_for(pair.vmm.discard(), LIMIT)


async def test_an_answer_given_twice_fails_the_next_question(pair: Pair) -> None:
    asking = await ask(pair, "discard")
    pair.peer.send(b'{"event":"discarded"}\n' * 2)
    await asyncio.wait_for(asking, LIMIT)
    with pytest.raises(VmmFailure, match="said 'discarded' without being asked"):
        await asyncio.wait_for(pair.vmm.run(LOAD), LIMIT)


async def test_a_vmm_that_is_asked_early_is_told_first_that_it_is_registered(
    handoffs: Handoffs, offer: Offer
) -> None:
    asking: list[asyncio.Future[None]] = []

    async def ask_at_once(vmm: NativeVmm) -> None:
        asking.append(asyncio.ensure_future(vmm.advise()))
        asking.append(asyncio.ensure_future(vmm.discard()))
        for _ in range(3):  # turns of the event loop in which they could be sent
            await asyncio.sleep(0)

    handoffs.before_registration = ask_at_once
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        assert (await peer.line() or {})["event"] == "registered"
    await asyncio.gather(*asking, return_exceptions=True)


async def test_who_asks_early_learns_that_the_vmm_was_refused(
    handoffs: Handoffs, offer: Offer
) -> None:
    asking: list[asyncio.Future[None]] = []

    async def ask_at_once(vmm: NativeVmm) -> None:
        asking.append(asyncio.ensure_future(vmm.advise()))
        await asyncio.sleep(0)

    handoffs.before_registration = ask_at_once
    handoffs.refusal_by_callback = HandoffRefused("migration 'vm0' has a VMM")
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        assert (await peer.line() or {})["event"] == "failed"
    with pytest.raises(VmmFailure):
        await asyncio.wait_for(asking[0], LIMIT)


async def test_no_answer_in_time(pair: Pair) -> None:
    with pytest.raises(VmmFailure, match=r"not answered 'discard' within 0\.05 s"):
        await pair.vmm.discard(within=0.05)


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_vmm_that_closes_its_socket_is_gone(pair: Pair, question: str) -> None:
    gone = asyncio.create_task(pair.vmm.gone())
    asking = await ask(pair, question)
    pair.peer.socket.close()
    with pytest.raises(VmmFailure, match="closed its socket"):
        await asyncio.wait_for(asking, LIMIT)
    await asyncio.wait_for(gone, LIMIT)
    with pytest.raises(VmmFailure, match="closed its socket"):
        await pair.vmm.discard()


async def test_closing_twice_releases_everything_once(handoffs: Handoffs, offer: Offer) -> None:
    before = open_descriptors()
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        vmm = await handoffs.native_vmm()
        vmm.close()
        vmm.close()
        assert vmm.memory.userfaultfd.closed
    for descriptor in peer.descriptors:
        os.close(descriptor)
    assert open_descriptors() == before


@pytest.mark.parametrize("question", QUESTIONS)
async def test_closing_ends_what_waits_for_an_answer(pair: Pair, question: str) -> None:
    asking = await ask(pair, question)
    pair.vmm.close()
    with pytest.raises(VmmFailure, match="closed by postcopyd"):
        await asyncio.wait_for(asking, LIMIT)


async def test_a_vmm_that_does_not_read_fails_and_never_blocks(pair: Pair) -> None:
    for _ in range(10_000):
        pair.vmm.listening()
    with pytest.raises(VmmFailure, match="does not read"):
        await pair.vmm.discard()
