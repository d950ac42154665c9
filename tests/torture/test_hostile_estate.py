"""What a predecessor has left, damaged: a successor goes on from it, or refuses it and holds it.

The guest's threads wait meanwhile, and never read zeros because of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import zlib
from collections.abc import Callable
from random import Random

import msgspec
import pytest

from postcopyd.incoming.estate import Estate
from postcopyd.incoming.inheriting import InheritedVmm
from postcopyd.incoming.journal import Journal, JournalUnreadable
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from tests.fuzz.mutating import changed_bytes, changed_json
from tests.incoming.engine import Engine, InProcessVmm, image
from tests.incoming.guest import LIMIT, PAGE, Guest
from tests.incoming.heirs import Holder, InheritedInProcessVmm
from tests.support import belongings
from tests.torture.sampling import Sampling, Tally
from tests.torture.test_hostile_engine import no_mistake_of_ours

_PAGES = 8
_ADDRESS = 0x600000000000
"""Stands for the guest's address while the record is changed: nothing is mapped near it, and what
is mapped near the guest is this process's own memory."""
_SLOT = 4 << 20


class Predecessor:
    """A guest that runs and waits for a page, and everything that its migration has left."""

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self.holder = Holder()

    async def live_and_die(self) -> None:
        self.engine = engine = Engine(
            Guest(pages=_PAGES, shared=self._shared, register=False, fenced=True),
            keeper=self.holder,
        )
        engine.attach()
        await engine.source.advise()
        content = image(_PAGES)
        await engine.source.precopy("pc.ram", content, [0, PAGE])
        await engine.source.switch_over({"pc.ram": [(2 * PAGE, (_PAGES - 2) * PAGE)]})
        await engine.reach(State.RUNNING)
        self.touch = engine.guest.touch(5)
        await engine.source.wait_for_request()
        journal = Journal(os.dup(self.holder.held["journal"]))
        record = journal.read()
        journal.close()
        engine.migration.let_go()
        self.record = msgspec.json.decode(msgspec.json.encode(record))
        self.record["vmm"]["blocks"][0]["address"] = _ADDRESS

    def journal(self, numbers: Random) -> int:
        """Return a journal with a record that is right but for a few things."""
        if numbers.random() < 0.2:
            content = changed_bytes(numbers, msgspec.json.encode(self.record))
        else:
            content = changed_json(numbers, self.record)
        address = str(self.engine.guest.address).encode()
        content = content.replace(str(_ADDRESS).encode(), address)[: _SLOT - 16]
        self.last = content
        descriptor = Journal.create()
        sequence = numbers.choice((1, 2, 3, 4, 5, 1 << 40, (1 << 64) - 1))
        checksum = zlib.crc32(content, zlib.crc32(sequence.to_bytes(8, "little")))
        head = sequence.to_bytes(8, "little") + len(content).to_bytes(4, "little")
        place = 8192 + sequence % 2 * _SLOT
        os.pwrite(descriptor, head + checksum.to_bytes(4, "little") + content, place)
        if numbers.random() < 0.1:
            os.pwrite(descriptor, numbers.randbytes(64), 4096 + 32 * numbers.randrange(100))
        if numbers.random() < 0.05:
            os.pwrite(descriptor, numbers.randbytes(8), numbers.randrange(24))
        return descriptor

    def estate(self, numbers: Random) -> dict[str, int]:
        """Return copies of what was left, with a damaged journal, and now and then a wrong file."""
        left = self.holder.copies()
        os.close(left["journal"])
        left["journal"] = self.journal(numbers)
        if numbers.random() < 0.2:
            name = numbers.choice(list(left))
            os.close(left.pop(name))
            self.last += name.encode()
            if numbers.random() < 0.7:
                left[name] = _wrong_descriptor(numbers)
        return left

    async def rest_in_peace(self) -> None:
        self.engine.source.close()
        self.engine.guest.userfaultfd.unregister(
            self.engine.guest.address, self.engine.guest.length
        )
        await asyncio.to_thread(self.touch.result)
        self.engine.guest.close()
        self.holder.forget()


def _wrong_descriptor(numbers: Random) -> int:
    match numbers.randrange(5):
        case 0:
            reading, writing = os.pipe()
            os.close(writing)
            return reading
        case 1:
            ours, theirs = socket.socketpair()
            theirs.close()
            return ours.detach()
        case 2:
            return os.memfd_create("empty")
        case 3:
            return os.open("/dev/null", os.O_RDWR)
        case _:
            descriptor = os.memfd_create("large")
            os.ftruncate(descriptor, 1 << 40)
            return descriptor


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
async def test_a_damaged_estate_is_gone_on_from_or_refused_and_held(
    sampling: Sampling, tally: Callable[[str], Tally], shared: bool
) -> None:
    outcomes = tally("hostile estates").outcomes
    numbers = sampling.numbers(f"hostile estates {shared}")
    predecessor = Predecessor(shared)
    await predecessor.live_and_die()
    before = belongings()
    with no_mistake_of_ours():
        for _ in range(sampling.count(100, 5000)):
            estate = Estate(None, predecessor.estate(numbers))
            outcome = await _succeed(predecessor, estate)
            outcomes[outcome] += 1
            if outcome != "refused":
                # What it was told to do it may have done: another guest.
                await predecessor.rest_in_peace()
                await predecessor.live_and_die()
            assert predecessor.touch.waits
    assert not belongings() - before
    await predecessor.rest_in_peace()


async def _succeed(predecessor: Predecessor, estate: Estate) -> str:
    def restore_vmm(inherited: InheritedVmm) -> InProcessVmm:
        if inherited.kind != InProcessVmm.kind:
            raise JournalUnreadable("another kind")
        return InheritedInProcessVmm(predecessor.engine.guest, inherited)

    try:
        migration = IncomingMigration("vm0", Settings(), lambda _: None, estate)
    except (JournalUnreadable, OSError) as error:
        estate.close()
        assert str(error)
        return "refused"
    try:
        migration.restore(restore_vmm)
    except (JournalUnreadable, OSError) as error:
        assert str(error)
        migration.let_go()
        return "refused"
    state = migration.state
    if state.ended:
        async with asyncio.timeout(LIMIT):
            await migration.wait()
    else:
        migration.let_go()
    return state.value
