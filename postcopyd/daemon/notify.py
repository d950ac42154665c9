"""Tells the service manager how the daemon is: the protocol of sd_notify(3)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import MutableMapping


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
        self._status = ""
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def ready(self, status: str) -> None:
        """Tell that everything is up, and keep the watchdog content from here on.

        Call it in the running event loop: the watchdog is to see that the loop goes round.
        """
        self._status = status
        self._send("READY=1", f"STATUS={status}")
        if self._watchdog_interval is not None:
            self._feed_watchdog(asyncio.get_running_loop(), self._watchdog_interval)

    def status(self, status: str) -> None:
        """Tell in one line what the daemon does now."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """Tell that the daemon is on its way down."""
        self._status = status
        self._send("STOPPING=1", f"STATUS={status}")

    def close(self) -> None:
        """Tell nothing more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _feed_watchdog(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._send("WATCHDOG=1")
        self._timer = loop.call_later(interval, self._feed_watchdog, loop, interval)

    def _send(self, *assignments: str) -> None:
        if self._socket is not None and self._address is not None:
            # A manager that does not listen must not hold the daemon up, let alone end it.
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(assignments).encode(), self._address)


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
