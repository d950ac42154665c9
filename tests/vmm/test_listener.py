"""The listener: whom it hands on, whom it refuses, and that it never stands still."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from pathlib import Path

import uvloop

from postcopyd.vmm.handoff import HandoffRefused
from tests.vmm.handoffs import (
    LIMIT,
    PAGE,
    Handoffs,
    Offer,
    RawPeer,
    listening,
    open_descriptors,
    why_refused,
)


async def test_a_vmm_is_offered_with_its_name_and_the_address_it_wants(
    handoffs: Handoffs, offer: Offer
) -> None:
    offer.message["listen"] = "tcp:127.0.0.1:0"
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        name, vmm, wanted_listen = await handoffs.offered()
    assert (name, wanted_listen) == ("vm0", "tcp:127.0.0.1:0")
    assert not vmm.memory.registered
    assert (vmm.process_id, vmm.description) == (
        os.getpid(),
        f"pid {os.getpid()}, uid {os.geteuid()}",
    )
    assert [(block.name, block.length) for block in vmm.memory.blocks] == [
        ("pc.ram", 16 * PAGE),
        ("pc.bios", 4 * PAGE),
    ]


async def test_a_refusal_by_the_callback_reaches_the_vmm(handoffs: Handoffs, offer: Offer) -> None:
    handoffs.refusal_by_callback = HandoffRefused("migration 'vm0' has a VMM")
    reason = await why_refused(handoffs, offer.text, offer.descriptors)
    assert reason == "migration 'vm0' has a VMM"


async def test_a_callback_that_breaks_refuses_this_vmm_and_no_other(
    handoffs: Handoffs, offer: Offer
) -> None:
    broken: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    handoffs.refusal_by_callback = RuntimeError("no such thing")
    reason = await why_refused(handoffs, offer.text, offer.descriptors)
    assert reason == "postcopyd failed: no such thing"
    assert [context["exception"] for context in broken] == [handoffs.refusal_by_callback]
    handoffs.refusal_by_callback = None
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        await handoffs.native_vmm()


async def test_many_silent_peers_do_not_keep_others_out_for_longer_than_the_deadline(
    tmp_path: Path, offer: Offer
) -> None:
    async with listening(tmp_path / "handoff.sock", timeout=0.5) as handoffs:
        with contextlib.ExitStack() as silent:
            for _ in range(100):
                silent.enter_context(RawPeer(handoffs.path))
            with RawPeer(handoffs.path) as peer:
                offer.send(peer)
                before = len(open_descriptors())
                # Each one that is looked at takes a connection and a pidfd.
                for _ in range(100):
                    await asyncio.sleep(0)
                    assert len(open_descriptors()) - before <= 2 * 64
                await handoffs.native_vmm()


async def test_running_out_of_descriptors_is_told_and_passes(
    handoffs: Handoffs, offer: Offer
) -> None:
    loop = asyncio.get_running_loop()
    told: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RawPeer(handoffs.path) as peer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for _ in range(20):
                await asyncio.sleep(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(told) == 1, "it must not be tried at every turn of the event loop"
        offer.send(peer)
        await handoffs.native_vmm()


async def test_descriptors_that_do_not_fit_under_our_limit_are_refused(
    handoffs: Handoffs, offer: Offer
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RawPeer(handoffs.path) as peer:
        await watched(handoffs)
        offer.send(peer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            reason = await handoffs.refusal()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "LimitNOFILE" in reason
        assert await peer.line() == {"event": "failed", "reason": reason}
        assert await peer.line() is None


async def watched(handoffs: Handoffs) -> None:
    """Return when the connection that waits is accepted and its process is watched."""
    before = len(open_descriptors())
    async with asyncio.timeout(LIMIT):
        while len(open_descriptors()) < before + 2:
            await asyncio.sleep(0)


async def test_closing_tells_those_who_wait_and_keeps_no_descriptor(tmp_path: Path) -> None:
    before = open_descriptors()
    async with listening(tmp_path / "handoff.sock") as handoffs:
        with RawPeer(handoffs.path) as peer:
            await watched(handoffs)
            await handoffs.listener.close()
            assert await peer.line() == {
                "event": "failed",
                "reason": "postcopyd is being stopped",
            }
            assert await peer.line() is None
    assert open_descriptors() == before


async def test_closing_leaves_vmms_that_were_taken_over_alone(
    handoffs: Handoffs, offer: Offer
) -> None:
    with RawPeer(handoffs.path) as peer:
        offer.send(peer)
        vmm = await handoffs.native_vmm()
        await handoffs.listener.close()
        await handoffs.listener.close()
        assert (await peer.line() or {})["event"] == "registered"
        vmm.listening()
        assert await peer.line() == {"event": "listening"}


def test_it_works_in_uvloop(tmp_path: Path, offer: Offer) -> None:
    async def scenario() -> None:
        async with listening(tmp_path / "handoff.sock") as handoffs:
            with RawPeer(handoffs.path) as peer:
                offer.send(peer)
                vmm = await handoffs.native_vmm()
                gone = asyncio.create_task(vmm.gone())
                advised = asyncio.create_task(vmm.advise())
                while (await peer.line() or {})["event"] != "advise":
                    pass
                peer.say("advised")
                await asyncio.wait_for(advised, LIMIT)
            await asyncio.wait_for(gone, LIMIT)

    uvloop.run(scenario())
