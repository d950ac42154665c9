"""The worker's end of the channel to the supervisor."""

from __future__ import annotations

import asyncio
import os

import pytest

from postcopyd.daemon import channel, supervisor_link
from postcopyd.daemon.channel import Channel
from postcopyd.daemon.supervisor_link import Orders, SupervisorLink
from tests.support import LIMIT


def _no_orders() -> Orders:
    def never(*_: object) -> None:
        raise AssertionError

    return Orders(never, never, never, never, never, never)


async def test_what_is_left_is_settled_when_the_supervisor_says_so() -> None:
    ours, theirs = Channel.pair()
    link, supervisor = SupervisorLink(Channel(ours), makes_room=False), Channel(theirs)
    link.start(_no_orders())
    settling = asyncio.create_task(link.settled())
    async with asyncio.timeout(LIMIT):
        while channel.Settle() not in [message for message, _ in supervisor.received()]:
            assert not settling.done()
            await asyncio.sleep(0)
        supervisor.send(channel.Settled())
        await settling
    link.close()
    supervisor.close()


async def test_a_supervisor_that_does_not_read_for_a_while_hears_everything_in_order() -> None:
    ours, theirs = Channel.pair()
    link, supervisor = SupervisorLink(Channel(ours), makes_room=True), Channel(theirs)
    link.start(_no_orders())
    keeper = link.keeper("vm0")
    for number in range(1000):
        file = os.memfd_create(f"file-{number}")
        keeper.keep(f"file-{number}", file)
        os.close(file)
    keeper.release("journal")
    heard: list[channel.Message] = []
    async with asyncio.timeout(LIMIT):
        while channel.Released("vm0", "journal") not in heard:
            for message, descriptor in supervisor.received():
                heard.append(message)
                if isinstance(message, channel.Held):
                    assert descriptor is not None
                    assert message.name in os.readlink(f"/proc/self/fd/{descriptor}")
                    os.close(descriptor)
            await asyncio.sleep(0)
    kept = [message.name for message in heard if isinstance(message, channel.Held)]
    assert kept == [f"file-{number}" for number in range(1000)]
    link.close()
    supervisor.close()


async def test_a_service_manager_that_takes_nothing_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = Channel.pair()
    link = SupervisorLink(Channel(ours), makes_room=False)
    monkeypatch.setattr(supervisor_link, "_PATIENCE", 0.05)
    async with asyncio.timeout(LIMIT):
        await link.settled()
    link.close()
    theirs.close()


async def test_a_name_that_is_granted_to_who_has_just_gone_is_given_up() -> None:
    ours, theirs = Channel.pair()
    link, supervisor = SupervisorLink(Channel(ours), makes_room=False), Channel(theirs)
    link.start(_no_orders())
    claiming = asyncio.create_task(link.claim("vm0"))
    async with asyncio.timeout(LIMIT):
        said: list[channel.Message] = []
        while channel.Claim("vm0") not in said:
            await asyncio.sleep(0)
            said += [message for message, _ in supervisor.received()]
        # What is granted is here when the client's going is noticed, in the same turn.
        supervisor.send(channel.Claimed("vm0", None))
        asyncio.get_running_loop().call_soon(claiming.cancel)
        while channel.Forgotten("vm0") not in said:
            await asyncio.sleep(0)
            said += [message for message, _ in supervisor.received()]
        with pytest.raises(asyncio.CancelledError):
            await claiming
    link.close()
    supervisor.close()
