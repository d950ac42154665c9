"""The listening sockets of the daemon: opened here, or systemd's own (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import ipaddress
import os
import socket
import stat
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final, Literal

from postcopyd.wire.address import Address

_UNIX_PATH_LIMIT: Final = 107
"""Bytes that fit sun_path in front of its NUL (unix(7))."""

_FIRST_HANDED_OVER: Final = 3  # SD_LISTEN_FDS_START
_BACKLOG: Final = 128

PlainTcp = Literal["loopback", "always", "never"]
"""Where plain TCP is taken: at addresses of this host's loopback, everywhere, nowhere."""


def listen_address(text: str) -> Address:
    """Return the address that `text` is, if the daemon can listen there.

    A host is an IP address or ``localhost`` (which is 127.0.0.1): no name service is asked, which
    could keep the daemon waiting.

    :raise ValueError: with the reason.
    """
    address = Address.parse(text)
    if address.kind == "unix":
        if not address.path.startswith("/"):
            raise ValueError(f"{text!r}: the path must be absolute")
        return address
    host = "127.0.0.1" if address.host == "localhost" else address.host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            f"{text!r}: {host!r} is a name; to listen takes an IP address of this host, "
            "127.0.0.1 or 0.0.0.0"
        ) from None
    return Address("tcp", host=host, port=address.port)


def check_listen(text: str) -> None:
    """Check an address to listen on.

    :raise ValueError: with the reason.
    """
    listen_address(text)


def takes_plain_tcp(address: Address, plain_tcp: PlainTcp) -> bool:
    """Tell whether sources at a TCP address of `listen_address` may come without TLS."""
    if plain_tcp == "loopback":
        return ipaddress.ip_address(address.host).is_loopback
    return plain_tcp == "always"


def check_path(path: str) -> None:
    """Check the path of a Unix socket.

    :raise ValueError: with the reason.
    """
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not an absolute path")
    if len(path.encode(errors="surrogateescape")) > _UNIX_PATH_LIMIT or "\0" in path:
        raise ValueError(f"{path!r} is no path of a socket: at most {_UNIX_PATH_LIMIT} bytes fit")


def open_stream_listener(address: Address, mode: int, group: str) -> socket.socket:
    """Listen for sources at an address of `listen_address`; non-blocking.

    :param mode: of a Unix socket's file, as `group`.
    :raise OSError: if that cannot be; the text names the address.
    """
    if address.kind == "unix":
        return open_unix_listener(address.path, mode, group)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"cannot listen on {address}: {os.strerror(error.errno or 0)}"
        ) from error
    return listener


def address_of(listener: socket.socket) -> Address:
    """Return where `listener` really listens: a port 0 has become a number."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Address("unix", path=name)
    return Address("tcp", host=name[0], port=name[1])


def open_unix_listener(path: str, mode: int, group: str) -> socket.socket:
    """Listen on a Unix socket; non-blocking. What a daemon that was killed left there is replaced.

    :param mode: permissions of its file.
    :param group: that its file is given; empty for our own.
    :raise OSError: if that cannot be; the text names the path and says what to do.
    """
    try:
        group_number = grp.getgrnam(group).gr_gid if group else -1
    except KeyError:
        raise OSError(errno.EINVAL, f"cannot listen on {path}: no group {group!r}") from None
    _remove_if_dead(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Whoever connects between bind and chmod would do so with the wrong permissions.
        mask = os.umask(0o777)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        os.chown(path, -1, group_number)
        Path(path).chmod(mode)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"cannot listen on {path}: {os.strerror(error.errno or 0)}"
        ) from error
    return listener


def remove_file_of(listener: socket.socket) -> None:
    """Remove the file of a Unix socket that was opened here; call it before closing."""
    if listener.family == socket.AF_UNIX:
        remove_file(listener.getsockname())


def remove_file(path: str) -> None:
    """Remove the file of a socket. One that is not there is no matter."""
    with contextlib.suppress(OSError):
        Path(path).unlink()


def _remove_if_dead(path: str) -> None:
    """Make room at `path`: remove a socket of our own user on which nobody listens.

    :raise OSError: if anything else is there.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    reason = "there is something else already: remove it, or choose another path"
    if stat.S_ISSOCK(status.st_mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            answer = probe.connect_ex(path)
        if answer in (0, errno.EAGAIN):
            reason = "a process listens there already: stop it, or choose another path"
        elif answer == errno.ECONNREFUSED and status.st_uid == os.geteuid():
            Path(path).unlink()
            return
    raise OSError(errno.EADDRINUSE, f"cannot listen on {path}: {reason}")


def take_over(
    environment: MutableMapping[str, str],
) -> tuple[dict[str, socket.socket], dict[str, int]]:
    """Take over what systemd hands to this process (sd_listen_fds(3)).

    The variables that tell of it are removed, so that no child process takes it for its own.

    :return: the listening Unix sockets of the socket unit, non-blocking, by their paths; and the
        descriptors that a predecessor has stored, by the names that it gave them, which have a '/'.
    :raise OSError: if one of the former is not a listening Unix stream socket.
    """
    process = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if process != str(os.getpid()) or not count.isdecimal():
        return {}, {}
    names += [""] * (int(count) - len(names))
    listeners: dict[str, socket.socket] = {}
    stored: dict[str, int] = {}
    try:
        for number, name in zip(range(int(count)), names, strict=False):
            descriptor = _FIRST_HANDED_OVER + number
            fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            if "/" in name:
                stored[name] = descriptor
                continue
            listener = _listener(descriptor)
            listeners[listener.getsockname()] = listener
    except OSError:
        for listener in listeners.values():
            listener.close()
        raise
    return listeners, stored


def _listener(descriptor: int) -> socket.socket:
    listener = socket.socket(fileno=descriptor)
    if (
        listener.family != socket.AF_UNIX
        or listener.type != socket.SOCK_STREAM
        or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        listener.detach()
        raise OSError(
            errno.EINVAL,
            f"descriptor {descriptor} from systemd is not a listening Unix stream socket: "
            "the socket unit may have ListenStream= with the control and the handoff path",
        )
    listener.setblocking(False)
    return listener
