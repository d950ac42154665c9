"""The migrations of a soak: what is to become of each, and whether it has."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Final

from postcopyd.cli.control_client import ControlError
from tests.certificates import SERVER, Authority, Issued, client_context
from tests.daemon.daemon_process import RunningDaemon
from tests.daemon.whole_migration import Guest, Image, running_guest
from tests.torture.broken_migrations import LOOPBACK, connect_from
from tests.torture.faulty_relay import FaultyRelay
from tests.torture.soak_abandoned import (
    MemoryFiles,
    missing_pages,
    remove_lists,
    standing_still,
)
from tests.torture.soak_network import Ports, be_a_stranger, named, network_faults
from tests.torture.soak_result import Result

_PATIENCE: Final = 150.0
"""Seconds that one migration may take, with everything that happens to it."""
_FATES: Final = {"moved": 14, "abandoned": 2, "cancelled": 1, "vmm killed": 1}
"""What is to become of migrations, and how often."""
_OVER_TLS: Final = 0.25
"""Of all migrations."""
_WITH_STRANGERS: Final = 0.3
"""Of those that are moved."""
_EVERYWHERE: Final = "0.0.0.0"
"""It counts as no address of the loopback alone, so a source has to speak TLS there."""
_ASK_THE_DESTINATION: Final = "everything was sent, the destination may have completed"
"""What a source says that has not heard the last word."""
_COMES_BACK_FOR: Final = "8"
"""Seconds: a source whose guest is lost comes back until its operator has it stop."""


class Migrations:
    """Makes migrations of one image to one daemon."""

    def __init__(
        self,
        daemon: RunningDaemon,
        image: Image,
        authority: Authority,
        numbers: random.Random,
        result: Result,
    ) -> None:
        self._daemon = daemon
        self._image = image
        self._authority = authority
        self._source: Issued = authority.issue("source")
        self._numbers = numbers
        self._ports = Ports()
        self._result = result

    async def one(self, name: str) -> None:
        """Make one, and judge it."""
        fate = self._numbers.choices(list(_FATES), list(_FATES.values()))[0]
        try:
            async with asyncio.timeout(_PATIENCE):
                outcome = await self._migrate(name, fate)
        except Exception as error:
            notes = "; ".join(getattr(error.__cause__ or error, "__notes__", ()))
            what = f"{type(error).__name__}: {error}"
            self._result.wrong.append(f"{name}, to be {fate}: {what} ({notes})")
        else:
            self._result.outcomes[outcome] += 1

    async def _migrate(self, name: str, fate: str) -> str:
        numbers = random.Random(self._numbers.random())
        kind = numbers.choice(["memory-file", "anonymous"])
        tls = numbers.random() < _OVER_TLS
        await self._create(name, f"tcp:{_EVERYWHERE if tls else LOOPBACK}:{self._ports.free()}")
        with running_guest(self._daemon, name, kind) as guest:
            try:
                one = _One(
                    *(self._daemon, self._image, name, kind, guest, numbers),
                    *(self._ports, self._result),
                )
                one.port = int((await one.says())["listen"][0].rpartition(":")[2])
                if tls:
                    one.options = self._tls_options()
                    one.without_certificate = client_context(self._authority, None)
                try:
                    outcome = await one.meet(fate)
                except BaseException as error:
                    error.add_note(one.standing())
                    raise
                if tls:
                    self._result.checks["went over TLS"] += 1
                return outcome
            finally:
                guest.process.kill()
                await asyncio.to_thread(guest.process.wait)
                shutil.rmtree(guest.directory)

    async def _create(self, name: str, listen: str) -> None:
        try:
            await ask(self._daemon, "create", name, listen)
        except ControlError as error:
            # Who was killed before it could answer may have done it.
            if error.code != "name-taken":
                raise

    def _tls_options(self) -> tuple[str, ...]:
        return (
            *("--tls-ca-certificates", str(self._authority.file)),
            *("--tls-certificate", str(self._source.certificate)),
            *("--tls-key", str(self._source.key), "--tls-hostname", SERVER),
        )


class _One:
    """One migration."""

    def __init__(
        self,
        daemon: RunningDaemon,
        image: Image,
        name: str,
        kind: str,
        guest: Guest,
        numbers: random.Random,
        ports: Ports,
        result: Result,
    ) -> None:
        self._daemon = daemon
        self._image = image
        self._name = name
        self._kind = kind
        self._guest = guest
        self._numbers = numbers
        self._ports = ports
        self._result = result
        self.port = 0
        self.options: tuple[str, ...] = ()
        """Of its source."""
        self._relay: FaultyRelay | None = None
        self._source: subprocess.Popen[str] | None = None
        self.without_certificate: ssl.SSLContext | None = None
        """With which a stranger speaks TLS; None where there is none."""

    def standing(self) -> str:
        """Tell how it stands, for who has to find out what is wrong."""
        happened = self._relay.happened if self._relay is not None else []
        source = self._source.poll() if self._source is not None else None
        return (
            f"{'TLS' if self.options else 'plain'}, {self._kind}, {happened}, "
            f"the source {'lives' if source is None else f'has ended with {source}'}, the guest "
            f"{'lives' if self._guest.process.poll() is None else 'has ended'}"
        )

    async def says(self) -> dict[str, Any]:
        """The next thing that its guest tells."""
        return await asyncio.to_thread(self._guest.says)

    async def meet(self, fate: str) -> str:
        """Have that become of it; return what has, if it is right."""
        match fate:
            case "cancelled":
                return await self._cancel()
            case "abandoned":
                return await self._abandon()
            case "vmm killed":
                return await self._lose_vmm()
            case _:
                return await self._move()

    async def _move(self) -> str:
        """Have the guest arrive, with faults on the way."""
        faults = network_faults(
            self._numbers, tls=bool(self.options), has_package=self._has_package
        )
        relay = FaultyRelay(
            faults, partial(connect_from, None, LOOPBACK), ends_with_destination=True
        )
        relay.lead_to(self.port)
        self._relay = relay
        strangers = asyncio.create_task(self._strangers())
        try:
            async with relay.listening(self._ports.listener()):
                with self._sending(relay) as source:
                    output, errors = await asyncio.to_thread(source.communicate, None, _PATIENCE)
                knows = source.returncode == 0
                assert knows or _ASK_THE_DESTINATION in errors, errors
                await self._check_arrival()
        finally:
            for fault in relay.happened:
                self._result.faults[named(fault)] += 1
            strangers.cancel()
            ended = (await asyncio.gather(strangers, return_exceptions=True))[0]
        if isinstance(ended, Exception):
            raise ended
        if not knows:
            return "moved, and only the destination knows"
        assert json.loads(output)["completed"]
        return "moved"

    async def _check_arrival(self) -> None:
        assert (said := await self.says()) == {"complete": True, "changed": 0}, said
        assert await asyncio.to_thread(self._guest.process.wait, _PATIENCE) == 0
        assert self._guest.memory() == self._image.memory, "its memory is wrong"

    def _has_package(self) -> bool:
        return (self._guest.directory / "device-state").exists()

    async def _strangers(self) -> None:
        """Have strangers come to it, before its source and after."""
        if self._numbers.random() > _WITH_STRANGERS:
            return
        for _ in range(self._numbers.choice((1, 1, 2, 4))):
            await asyncio.sleep(self._numbers.uniform(0.0, 0.5))
            try:
                who = await be_a_stranger(self._numbers, self.port, self.without_certificate)
            except ConnectionRefusedError:  # it is over
                return
            self._result.faults[f"stranger: {who}"] += 1

    async def _cancel(self) -> str:
        try:
            await self._ask("cancel")
        except ControlError as error:
            # Who was killed before it could answer may have done it: the guest knows.
            if error.code != "no-such-migration":
                raise
        assert "failed" in (said := await self.says()), said
        return "cancelled"

    async def _lose_vmm(self) -> str:
        """Kill the VMM while its guest arrives: nobody can have that any more."""
        async with self._plain_relay() as relay:
            with self._sending(relay, "--retry-for", _COMES_BACK_FOR) as source:
                while await self._state() not in ("running", "paused", "gone"):
                    await asyncio.sleep(0.01)
                ending = asyncio.create_task(self._ended())
                await asyncio.sleep(self._numbers.uniform(0.0, 0.5))
                self._guest.process.kill()
                _, errors = await asyncio.to_thread(source.communicate, None, _PATIENCE)
                state = await ending
        self._result.faults["vmm killed"] += 1
        if source.returncode == 0:
            assert state in ("end", "gone"), f"its source is content, but it is {state}"
            return "complete before its VMM was killed"
        assert source.returncode == 1, f"its source has ended with {source.returncode}: {errors}"
        if state == "end":
            assert _ASK_THE_DESTINATION in errors, errors
            return "complete before its VMM was killed"
        assert state in ("failed", "gone"), f"it is {state} without a VMM"
        return "failed with its VMM"

    async def _ended(self) -> str:
        """Its last state; `gone` if nobody knows it any more."""
        try:
            return str((await self._ask("wait", _PATIENCE))["state"])
        except ControlError as error:
            if error.code != "no-such-migration":
                raise
            return "gone"

    async def _abandon(self) -> str:
        """Take the source away in the middle, and give up what has not come."""
        async with self._plain_relay() as relay:
            with self._sending(relay):
                while (state := await self._state()) not in ("running", "paused", "gone"):
                    await asyncio.sleep(0.01)
        while state not in ("paused", "gone"):
            await asyncio.sleep(0.05)
            state = await self._state()
        try:
            if state == "paused":
                self._result.faults["source killed"] += 1
                if self._kind == "memory-file" and await self._abandon_and_compare():
                    return "abandoned"
                await self._give_up()
            status = await asyncio.to_thread(self._guest.process.wait, _PATIENCE)
            if status:
                assert status == -signal.SIGBUS, f"the guest has ended with {status}"
                return "abandoned"
        finally:
            remove_lists(self._daemon.directory / "records", self._name)
        await self._check_arrival()
        return "abandoned when nothing was missing"

    async def _abandon_and_compare(self) -> bool:
        """Abandon while the guest stands still, and compare what it has kept.

        :return: False if nothing was missing.
        """
        process = self._guest.process
        with contextlib.closing(MemoryFiles(process.pid)) as memory:
            with standing_still(process.pid):
                abandoning = asyncio.create_task(self._give_up())
                try:
                    missing = await missing_pages(self._daemon.directory / "records", self._name)
                except TimeoutError:
                    abandoning.cancel()
                    raise AssertionError("there is no list of what is missing") from None
            await abandoning
            if not missing:
                return False
            status = await asyncio.to_thread(process.wait, _PATIENCE)
            assert status == -signal.SIGBUS, f"the guest has ended with {status}"
            wrong = memory.wrong_pages(self._image, missing)
        assert not wrong, f"{len(wrong)} pages of what it kept are wrong: {wrong[:5]}"
        self._result.checks["memory of an abandoned guest compared"] += 1
        return True

    async def _give_up(self) -> None:
        """Have it abandoned; the guest, which dies of it, may be faster."""
        while await self._state() != "gone":
            try:
                await self._ask("abandon")
            except ControlError as error:
                if error.code not in ("cannot-abandon", "no-such-migration"):
                    raise
            await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def _plain_relay(self) -> AsyncIterator[FaultyRelay]:
        """A relay to which nothing happens."""
        relay = FaultyRelay((), partial(connect_from, None, LOOPBACK), ends_with_destination=True)
        relay.lead_to(self.port)
        async with relay.listening(self._ports.listener()):
            yield relay

    @contextlib.contextmanager
    def _sending(self, relay: FaultyRelay, *more: str) -> Iterator[subprocess.Popen[str]]:
        source = self._image.start_sending(
            f"tcp:{LOOPBACK}:{relay.port}",
            *("--max-bandwidth", "8M"),
            *self.options,
            *more,
        )
        self._source = source
        with source:
            try:
                yield source
            finally:
                source.kill()

    async def _state(self) -> str:
        try:
            return str((await self._ask("show"))["state"])
        except ControlError as error:
            if error.code != "no-such-migration":
                raise
            return "gone"

    async def _ask(self, what: str, *words: Any) -> Any:
        return await ask(self._daemon, what, self._name, *words)


async def ask(daemon: RunningDaemon, what: str, *words: Any) -> Any:
    """Ask the daemon, again as long as it, or the worker that is meant, is being killed."""
    while True:
        try:
            return await asyncio.to_thread(getattr(daemon.client, what), *words)
        except ControlError as error:
            if error.code not in ("unreachable", "unavailable"):
                raise
            await asyncio.sleep(0.1)
