"""userfaultfd(2): one descriptor, its handshake, its ioctls and its events.

Numbers and layouts are those of linux/userfaultfd.h; behaviour is that of the userfaultfd(2) and
ioctl_userfaultfd(2) manual pages, and of Linux 6.18 where they are silent.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import struct
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

_API = 0xAA
_IOC_API = 0xC018AA3F
_IOC_REGISTER = 0xC020AA00
_IOC_UNREGISTER = 0x8010AA01
_IOC_WAKE = 0x8010AA02
_IOC_COPY = 0xC028AA03
_IOC_ZEROPAGE = 0xC020AA04
_IOC_WRITEPROTECT = 0xC018AA06
_IOC_CONTINUE = 0xC020AA07
_IOC_POISON = 0xC020AA08
_DEV_IOC_NEW = 0xAA00

_SYSCALL = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

PAGEFAULT_WRITE = 1
PAGEFAULT_WRITE_PROTECT = 2
PAGEFAULT_MINOR = 4

COPY_DONT_WAKE = 1
COPY_WRITE_PROTECT = 2

PRESENT = -errno.EEXIST
CHANGING = -errno.EAGAIN
GONE = (-errno.ENOENT, -errno.ESRCH)
NO_MEMORY = (-errno.ENOMEM, -errno.ENOSPC)
_VALUES = frozenset({PRESENT, CHANGING, *GONE, *NO_MEMORY})


class Feature(IntFlag):
    """What a userfaultfd can do beyond missing anonymous pages (UFFD_FEATURE_*)."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class RegisterMode(IntFlag):
    """What a registered range reports."""

    MISSING = 1
    WRITE_PROTECT = 2
    MINOR = 4


class Operation(IntFlag):
    """Bits of the masks of ioctls that API and REGISTER give back."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F


class UserfaultfdUnavailable(OSError):
    """No userfaultfd can be had; the text names the ways that were tried and what to do."""


class UserfaultfdUnsupported(OSError):
    """The kernel does not offer what was asked for; the text names it."""


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _open_by_syscall(flags: int) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no userfaultfd number known for {platform.machine()}")
    descriptor: int = _libc.syscall(ctypes.c_long(number), ctypes.c_int(flags))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return descriptor


def _open_by_device(flags: int) -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _DEV_IOC_NEW, flags)
    finally:
        os.close(device)


class Userfaultfd:
    """A userfaultfd that this object owns.

    Placing returns values, not exceptions: a result above 0 is the number of bytes placed (less
    than asked: resume behind them), one below 0 is a negative errno out of `PRESENT`, `CHANGING`,
    `GONE` and `NO_MEMORY`. Every other errno is a mistake of ours and raises OSError.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over `descriptor`, opened here or handed over."""
        self._descriptor = descriptor
        self._copy_buffer = bytearray(40)
        self._range_buffer = bytearray(32)
        self._messages = bytearray(32 * 64)
        self._message_views = [self._messages]

    @classmethod
    def open(cls, *, user_mode_only: bool = False) -> Userfaultfd:
        """Open a new one, close-on-exec and non-blocking: by syscall, else by /dev/userfaultfd.

        :raise UserfaultfdUnavailable: if neither way is open to us.
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (_USER_MODE_ONLY if user_mode_only else 0)
        try:
            return cls(_open_by_syscall(flags))
        except OSError as error:
            by_syscall = error
        try:
            return cls(_open_by_device(flags))
        except OSError as by_device:
            raise UserfaultfdUnavailable(
                by_syscall.errno,
                f"no userfaultfd: userfaultfd(2): {by_syscall.strerror}; "
                f"/dev/userfaultfd: {by_device.strerror}. Run as root, give access to "
                f"/dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1",
            ) from by_device

    @staticmethod
    def offered() -> Feature:
        """Return what the kernel offers, asked through a descriptor of its own.

        :raise UserfaultfdUnavailable: if none can be opened.
        """
        try:
            probe = Userfaultfd.open()
        except UserfaultfdUnavailable:
            probe = Userfaultfd.open(user_mode_only=True)
        try:
            return probe._api(Feature(0))
        finally:
            probe.close()

    def handshake(self, wanted: Feature) -> Feature:
        """Ask for `wanted`, after asking whether the kernel has it; return all that it offers.

        :raise UserfaultfdUnsupported: naming the features that are missing.
        """
        missing = wanted & ~self.offered()
        if missing:
            raise UserfaultfdUnsupported(
                errno.EOPNOTSUPP, f"this kernel's userfaultfd has no {missing.name}"
            )
        return self._api(wanted)

    def _api(self, features: Feature) -> Feature:
        buffer = bytearray(struct.pack("QQQ", _API, features, 0))
        fcntl.ioctl(self._descriptor, _IOC_API, buffer)
        offered: int = struct.unpack("QQQ", buffer)[1]
        return Feature(offered)

    def fileno(self) -> int:
        """Return the descriptor, -1 when closed."""
        return self._descriptor

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._descriptor < 0

    def close(self) -> None:
        """Close it. Idempotent. If it is the last copy, waiting threads go on with zeros."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def register(
        self, address: int, length: int, mode: RegisterMode, needed: Operation
    ) -> Operation:
        """Watch a range; return the operations that it allows.

        :raise UserfaultfdUnsupported: if one of `needed` is not among them.
        :raise OSError: if the range cannot be registered.
        """
        buffer = bytearray(struct.pack("QQQQ", address, length, mode, 0))
        try:
            fcntl.ioctl(self._descriptor, _IOC_REGISTER, buffer)
        except OSError as error:
            raise OSError(
                error.errno,
                f"UFFDIO_REGISTER of {address:#x}+{length:#x}: {error.strerror}",
            ) from error
        allowed = Operation(struct.unpack("QQQQ", buffer)[3])
        missing = needed & ~allowed
        if missing:
            raise UserfaultfdUnsupported(
                errno.EOPNOTSUPP, f"memory at {address:#x} does not allow {missing.name}"
            )
        return allowed

    def unregister(self, address: int, length: int) -> None:
        """Watch a range no more; who waits there goes on, with zeros where a page is missing.

        :raise OSError: if the kernel refuses; ENOMEM when the process has gone.
        """
        fcntl.ioctl(self._descriptor, _IOC_UNREGISTER, struct.pack("QQ", address, length))

    def wake(self, address: int, length: int) -> None:
        """Let who waits in a range try again."""
        fcntl.ioctl(self._descriptor, _IOC_WAKE, struct.pack("QQ", address, length))

    def writeprotect(self, address: int, length: int, protect: bool) -> None:
        """Write-protect a range, or lift it and wake."""
        fcntl.ioctl(
            self._descriptor,
            _IOC_WRITEPROTECT,
            bytearray(struct.pack("QQQ", address, length, 1 if protect else 0)),
        )

    def copy(
        self,
        destination: int,
        source: int,
        length: int,
        mode: int = 0,
        _pack: object = None,
    ) -> int:
        """Place `length` bytes from `source` (an address here) at `destination` (there)."""
        buffer = self._copy_buffer
        _pack_copy(buffer, 0, destination, source, length, mode, 0)
        try:
            _ioctl(self._descriptor, _IOC_COPY, buffer)
        except OSError as error:
            return _outcome(error, _unpack_result(buffer, 32)[0])
        return length

    def zeropage(self, destination: int, length: int, mode: int = 0) -> int:
        """Place zeros. Not for huge pages."""
        return self._range_operation(_IOC_ZEROPAGE, destination, length, mode)

    def continue_range(self, destination: int, length: int, mode: int = 0) -> int:
        """Map what is in the page cache already."""
        return self._range_operation(_IOC_CONTINUE, destination, length, mode)

    def poison(self, destination: int, length: int, mode: int = 0) -> int:
        """Make every later access a memory error."""
        return self._range_operation(_IOC_POISON, destination, length, mode)

    def _range_operation(self, number: int, destination: int, length: int, mode: int) -> int:
        buffer = self._range_buffer
        _pack_range(buffer, 0, destination, length, mode, 0)
        try:
            _ioctl(self._descriptor, number, buffer)
        except OSError as error:
            return _outcome(error, _unpack_result(buffer, 24)[0])
        return length

    def read_events(self) -> Iterable[tuple[int, int, int, int]]:
        """Read up to 64 events, without waiting; empty when there is none."""
        try:
            length = os.readv(self._descriptor, self._message_views)
        except BlockingIOError:
            return ()
        if length == 32:
            return (_unpack_message(self._messages),)  # type: ignore[return-value]
        return _iter_messages(memoryview(self._messages)[:length])


_ioctl = fcntl.ioctl
_pack_copy = struct.Struct("QQQQq").pack_into
_pack_range = struct.Struct("QQQq").pack_into
_unpack_result = struct.Struct("q").unpack_from
_unpack_message = struct.Struct("B7xQQQ").unpack_from
_iter_messages = struct.Struct("B7xQQQ").iter_unpack


def _outcome(error: OSError, result: int) -> int:
    if result > 0:
        return result
    code = -(error.errno or errno.EIO)
    if code in _VALUES:
        return code
    raise error


def is_userfaultfd(descriptor: int) -> bool:
    """Tell by its link in /proc whether a descriptor is a userfaultfd."""
    return os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[userfaultfd]"


def features_of(descriptor: int, pid: int | None = None) -> Feature | None:
    """Return the features that a handshake has enabled; None if it is no userfaultfd."""
    text = Path(f"/proc/{pid or 'self'}/fdinfo/{descriptor}").read_text()
    match = re.search(r"^API:\s*aa:([0-9a-f]+):", text, re.MULTILINE)
    return Feature(int(match[1], 16) & 0x7FFFFFFF) if match else None
