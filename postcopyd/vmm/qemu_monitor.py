"""A QEMU's monitor: QMP over its Unix socket, every answer waited for with a bound."""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError, Runstate

_UCRED: Final = struct.Struct("iII")

# What goes wrong is told by `MonitorFailure`; the library would log it as well.
logging.getLogger("qemu.qmp").propagate = False
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class MonitorFailure(Exception):
    """The monitor cannot be used, or QEMU has refused a command; the text says which and why."""


class QemuMonitor:
    """One QMP session. QEMU serves one client on each of its monitors."""

    def __init__(
        self, path: str, connection: socket.socket, client: QMPClient, resumed: EventListener
    ) -> None:
        """Take over a session that has begun; `connect` begins one."""
        self.path = path
        self._connection = connection
        self._client = client
        self._resumed = resumed

    @classmethod
    async def connect(cls, path: str, within: float, process: int = 0) -> QemuMonitor:
        """Begin a session.

        :param path: of the Unix socket.
        :param within: seconds until the session has begun.
        :param process: whose `peer_process` it must be; 0 for anybody's.
        :raise MonitorFailure: if there is nobody, somebody else, somebody who does not speak QMP,
            or if it has not begun by then.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client, resumed = QMPClient(), EventListener("RESUME")
        client.register_listener(resumed)
        try:
            connection.setblocking(False)
            await _begin(client, path, connection, within, process)
        except BaseException:
            connection.close()
            raise
        return cls(path, connection, client, resumed)

    @property
    def peer_process(self) -> int:
        """The process that made the socket, as this one sees it; 0 if it does not."""
        return _maker_of(self._connection)

    @property
    def has_resumed(self) -> bool:
        """True when QEMU has said, in this session, that its guest runs: it says so just before."""
        return not self._resumed.empty()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, within: float | None
    ) -> Any:
        """Run a command and return what QEMU answers.

        :param within: seconds for the answer; None for as long as it takes.
        :raise MonitorFailure: if QEMU refuses, does not answer in time, or has gone.
        """
        try:
            async with asyncio.timeout(within):
                return await self._client.execute(command, arguments and dict(arguments))
        except ExecuteError as error:
            raise MonitorFailure(f"QEMU refuses {command}: {error}") from error
        except TimeoutError:
            raise MonitorFailure(f"QEMU has not answered {command} within {within:g} s") from None
        except (QMPError, EOFError, OSError) as error:
            raise MonitorFailure(
                f"QEMU's monitor at {self.path} broke off at {command}: {_text_of(error)}"
            ) from error

    async def human(self, line: str, *, within: float | None) -> str:
        """Run a command of the human monitor and return what it prints. As `execute`."""
        arguments = {"command-line": line}
        return str(await self.execute("human-monitor-command", arguments, within=within))

    async def give(self, descriptor: int, name: str, *, within: float | None) -> None:
        """Give QEMU a copy of a descriptor, under a name by which commands can use it.

        As `execute`.
        """
        # Ancillary data goes with the byte beside it, and QEMU takes it with the next command.
        # Nothing of ours is on its way now: QEMU has answered everything.
        rights = array.array("i", [descriptor])
        try:
            self._connection.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError as error:
            raise MonitorFailure(f"QEMU's monitor at {self.path}: {_text_of(error)}") from error
        await self.execute("getfd", {"fdname": name}, within=within)

    async def close(self) -> None:
        """End the session. Idempotent."""
        try:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await self._client.disconnect()
        finally:
            self._connection.close()


class _NobodyAccepts(Exception):
    """As many wait to be accepted as may."""


def _maker_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])


def _check_connected(connection: socket.socket) -> None:
    """Find out that there is no room (EAGAIN), which the event loop takes for a connection coming.

    :raise _NobodyAccepts: if it is that.
    """
    try:
        connection.getpeername()
    except OSError as error:
        raise _NobodyAccepts from error


async def _begin(
    client: QMPClient, path: str, connection: socket.socket, within: float, process: int
) -> None:
    # Descriptors are passed over the connection itself, everything else over the library's copy.
    copy = connection.dup()
    try:
        async with asyncio.timeout(within):
            await asyncio.get_running_loop().sock_connect(connection, path)
            _check_connected(connection)
            if process not in (0, _maker_of(connection)):
                # Nothing is said to it: it has one client only, who may want it.
                raise MonitorFailure(f"{path} is the monitor of another process now")
            await client.connect(copy)
    except (TimeoutError, _NobodyAccepts):
        raise MonitorFailure(
            f"{path}: no greeting within {within:g} s. Another client may hold this monitor: give "
            "QEMU one of our own (-qmp unix:PATH,server=on,wait=off)"
        ) from None
    except ConnectError as error:
        raise MonitorFailure(f"{path}: it does not speak QMP: {_text_of(error.exc)}") from error
    except OSError as error:
        raise MonitorFailure(f"{path}: {_text_of(error)}") from error
    finally:
        if client.runstate is not Runstate.RUNNING:
            copy.close()


def _text_of(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return "it has hung up"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
