"""Tells the service manager how the daemon is: the protocol of sd_notify(3)."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final

_FOR_NOW: Final = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
"""What the kernel says where a datagram or its descriptor may go later: see unix(7)."""
_SEND_AGAIN_AFTER: Final = 0.05  # seconds


class ServiceManager:
    """Who started the daemon and wants to be told. Without one every call does nothing."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Read, and remove, NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.

        They are removed so that no child process speaks in the daemon's name.
        """
        self._address = _socket_address(environment.pop("NOTIFY_SOCKET", ""))
        self._watchdog_interval = _watchdog_interval(
            environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        )
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._status = ""
        self._status_is_old = False
        """Whether it has to be told when nothing waits any more."""
        self._waiting: deque[tuple[bytes, int | None] | Callable[[], None]] = deque()
        """What could not be sent yet, with the descriptors that go with it, and who is
        to be called when what is before it has been."""
        self._nothing_waits = asyncio.Event()
        self._nothing_waits.set()
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            with contextlib.suppress(OSError):
                self._socket.connect(self._address)

    def ready(self, status: str) -> None:
        """Tell that everything is up, and keep the watchdog content from here on.

        Call it in the running event loop: the watchdog is to see that the loop goes round.
        """
        self._status = status
        self._send_for_sure("READY=1", f"STATUS={status}")
        if self._watchdog_interval is not None:
            self._feed_watchdog(asyncio.get_running_loop(), self._watchdog_interval)

    def status(self, status: str) -> None:
        """Tell in one line what the daemon does now; of many only the last one counts."""
        if status != self._status:
            self._status = status
            if self._waiting:
                self._status_is_old = True
            else:
                self._send_for_sure(f"STATUS={status}")

    def reloading(self) -> None:
        """Tell that the configuration is being read anew; `reloaded` follows."""
        self._send_for_sure("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """Tell that everything is up again."""
        self._send_for_sure("READY=1", f"STATUS={self._status}")

    def stopping(self, status: str) -> None:
        """Tell that the daemon is on its way down."""
        self._status = status
        self._send_for_sure("STOPPING=1", f"STATUS={status}")

    @property
    def present(self) -> bool:
        """True if there is one."""
        return self._socket is not None

    def store(self, name: str, descriptor: int, instead_of: Sequence[str] = ()) -> None:
        """Have a descriptor kept, and handed over at the next start (FDSTORE=1).

        :param descriptor: taken over.
        :param instead_of: names that are dropped before, as `unstore` does.
        """
        for other in instead_of:
            self.unstore(other)
        # systemd drops what polls as hung up, such as the pidfd of a VMM that has exited.
        self._send_for_sure("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptor=descriptor)

    def unstore(self, name: str) -> None:
        """Have what is kept by that name dropped."""
        self._send_for_sure("FDSTOREREMOVE=1", f"FDNAME={name}")

    def when_told(self, call: Callable[[], None]) -> None:
        """Call when everything so far is with the service manager; at once if it is."""
        if self._waiting:
            self._waiting.append(call)
        else:
            call()

    async def told(self) -> None:
        """Return when all that must be told has been; who ends before loses what it was to keep."""
        await self._nothing_waits.wait()

    def close(self) -> None:
        """Tell nothing more. Idempotent."""
        for timer in (self._timer, self._again):
            if timer is not None:
                timer.cancel()
        self._timer = self._again = None
        if self._socket is not None:
            if self._waiting:
                asyncio.get_running_loop().remove_writer(self._socket)
            self._socket.close()
            self._socket = None
        while self._waiting:
            waiting = self._waiting.popleft()
            if not callable(waiting) and waiting[1] is not None:
                os.close(waiting[1])

    def _feed_watchdog(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._send("WATCHDOG=1")
        self._timer = loop.call_later(interval, self._feed_watchdog, loop, interval)

    def _send(self, *assignments: str) -> None:
        # A manager that does not listen must not hold the daemon up, let alone end it.
        if self._socket is not None and not self._waiting:
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(assignments).encode())

    def _send_for_sure(self, *assignments: str, descriptor: int | None = None) -> None:
        """Send, later if the manager has much to read now, and in order.

        :param descriptor: goes with it, taken over.
        """
        if self._socket is None:
            if descriptor is not None:
                os.close(descriptor)
            return
        self._waiting.append(("\n".join(assignments).encode(), descriptor))
        if len(self._waiting) == 1:
            self._nothing_waits.clear()
            self._send_waiting()

    def _send_waiting(self) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        while self._waiting or self._status_is_old:
            if not self._waiting:
                self._status_is_old = False
                self._waiting.append((f"STATUS={self._status}".encode(), None))
            waiting = self._waiting[0]
            if callable(waiting):
                self._waiting.popleft()
                waiting()
                continue
            datagram, descriptor = waiting
            rights = []
            if descriptor is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            try:
                self._socket.sendmsg([datagram], rights)
            except BlockingIOError:
                loop.add_writer(self._socket, self._send_waiting)
                return
            except OSError as error:
                if error.errno in _FOR_NOW:
                    loop.remove_writer(self._socket)
                    self._again = loop.call_later(_SEND_AGAIN_AFTER, self._send_waiting)
                    return
                # There is no manager any more.
            self._waiting.popleft()
            if descriptor is not None:
                os.close(descriptor)
        loop.remove_writer(self._socket)
        self._nothing_waits.set()


def _socket_address(name: str) -> str | None:
    """Return the address that NOTIFY_SOCKET names: `@` begins one of the abstract namespace."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_interval(microseconds: str, process: str) -> float | None:
    """Return how often to send WATCHDOG=1, in seconds: twice as often as is asked for."""
    if not microseconds.isdecimal() or process not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 2_000_000 or None
