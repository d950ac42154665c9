"""userfaultfd(2): one descriptor, its handshake, its ioctls and its events.

Numbers and layouts are those of linux/userfaultfd.h; behaviour is that of the userfaultfd(2) and
ioctl_userfaultfd(2) manual pages, and of fs/userfaultfd.c and mm/userfaultfd.c of Linux 6.18 where
they are silent.

The rule of this file: on the hot path (placing) what the kernel answers is a value, everywhere
else it is an exception.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopyd.kernel.system_calls import failure
from postcopyd.kernel.userfaultfd_abi import (
    CHANGING,
    EVENT_FORK,
    EVENT_PAGEFAULT,
    EVENT_REMAP,
    EVENT_REMOVE,
    EVENT_UNMAP,
    GONE,
    MODE_ALLOW_HOLES,
    MODE_DONT_WAKE,
    MODE_WRITE_PROTECT,
    NO_MEMORY,
    PAGEFAULT_MINOR,
    PAGEFAULT_WRITE,
    PAGEFAULT_WRITE_PROTECT,
    PRESENT,
    Feature,
    Operation,
    RegisterMode,
)
from postcopyd.kernel.userfaultfd_open import UserfaultfdUnavailable, open_userfaultfd

__all__ = [
    "CHANGING",
    "EVENT_FORK",
    "EVENT_PAGEFAULT",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "EVENT_UNMAP",
    "GONE",
    "MODE_ALLOW_HOLES",
    "MODE_DONT_WAKE",
    "MODE_WRITE_PROTECT",
    "NO_MEMORY",
    "PAGEFAULT_MINOR",
    "PAGEFAULT_WRITE",
    "PAGEFAULT_WRITE_PROTECT",
    "PRESENT",
    "Feature",
    "Operation",
    "RegisterMode",
    "Userfaultfd",
    "UserfaultfdUnavailable",
    "UserfaultfdUnsupported",
    "features_of",
    "is_userfaultfd",
]

_API = 0xAA
_IOC_API = 0xC018AA3F
_IOC_REGISTER = 0xC020AA00
_IOC_UNREGISTER = 0x8010AA01
_IOC_WAKE = 0x8010AA02
_IOC_COPY = 0xC028AA03
_IOC_ZEROPAGE = 0xC020AA04
_IOC_MOVE = 0xC028AA05
_IOC_WRITEPROTECT = 0xC018AA06
_IOC_CONTINUE = 0xC020AA07
_IOC_POISON = 0xC020AA08

_VALUES = frozenset({PRESENT, CHANGING, *GONE, *NO_MEMORY})

_MESSAGE_SIZE = 32
_MESSAGES_A_READ = 64

# Bound once: they are called for every page.
_ioctl = fcntl.ioctl
_unpack_message = struct.Struct("B7xQQQ").unpack_from
_iterate_messages = struct.Struct("B7xQQQ").iter_unpack


class UserfaultfdUnsupported(OSError):
    """The kernel does not offer what was asked for; the text names it."""


class Userfaultfd:
    """A userfaultfd that this object owns. For one thread.

    Placing (`copy`, `zeropage`, `continue_range`, `poison`, `move`) returns values, not
    exceptions: a result above 0 is the number of bytes placed (less than asked: go on behind
    them), one below 0 is a negative errno out of `PRESENT`, `CHANGING`, `GONE` and `NO_MEMORY`.
    Every other errno is a mistake of the caller's (EINVAL, EFAULT, EBADF) and raises OSError.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over `descriptor`, opened here or handed over."""
        self._descriptor = descriptor
        # struct uffdio_copy and uffdio_move; struct uffdio_zeropage, _continue and _poison. The
        # last field is the kernel's answer. Signed, because the answer is, and no user address
        # has the highest bit.
        self._five_fields = memoryview(bytearray(40)).cast("q")
        self._four_fields = memoryview(bytearray(32)).cast("q")
        self._messages = memoryview(bytearray(_MESSAGE_SIZE * _MESSAGES_A_READ))
        self._read_into = [self._messages]

    # -- opening and closing -----------------------------------------------------------------

    @classmethod
    def open(cls, *, user_mode_only: bool = False) -> Userfaultfd:
        """Open a new one, close-on-exec and non-blocking: by system call, else by /dev/userfaultfd.

        :param user_mode_only: needs no right, but an access by the kernel on the process's behalf
            (a read(2) into missing memory, KVM) fails instead of waiting. Since Linux 5.11.
        :raise UserfaultfdUnavailable: if neither way is open to us.
        """
        return cls(open_userfaultfd(user_mode_only))

    @staticmethod
    def offered() -> Feature:
        """Return what the kernel offers, asked through a descriptor of its own.

        :raise UserfaultfdUnavailable: if none can be opened.
        """
        try:
            probe = Userfaultfd.open()
        except UserfaultfdUnavailable:
            probe = Userfaultfd.open(user_mode_only=True)
        with probe:
            return probe._agree(Feature(0))

    def handshake(self, wanted: Feature) -> Feature:
        """Ask for `wanted`, after asking whether the kernel has it; return all that it offers.

        The kernel refuses a handshake with a feature that it does not have as a whole, without a
        word on which one, and it allows one handshake only. Hence the question before.

        :raise UserfaultfdUnsupported: naming the features that are missing.
        :raise OSError: if the handshake has been done before (EINVAL), or if `wanted` takes a
            right: EVENT_FORK needs CAP_SYS_PTRACE (EPERM).
        """
        missing = Feature(int(wanted) & ~int(self.offered()))  # `~` loses bits without a name
        if missing:
            raise UserfaultfdUnsupported(
                errno.EOPNOTSUPP,
                f"this kernel's userfaultfd has no {missing.name or hex(missing)}: "
                f"Linux {missing.since} or newer is needed",
            )
        return self._agree(wanted)

    def _agree(self, features: Feature) -> Feature:
        buffer = bytearray(struct.pack("QQQ", _API, features, 0))
        try:
            _ioctl(self._descriptor, _IOC_API, buffer)
        except OSError as error:
            raise _failed(f"UFFDIO_API with features {features!r}", error) from error
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
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- ranges ------------------------------------------------------------------------------

    def register(
        self, address: int, length: int, mode: RegisterMode, needed: Operation
    ) -> Operation:
        """Watch a range; return the operations that it allows.

        The kernel is content with a range of which only a part is mapped.

        :param needed: operations without which the range is of no use; it stays registered all
            the same.
        :raise UserfaultfdUnsupported: if one of `needed` is not among those allowed.
        :raise OSError: if the range is not made of whole pages, not mapped, or of memory that
            cannot be watched (EINVAL), if another userfaultfd watches it (EBUSY), if the process
            has exited (ENOMEM), or if it is a memory file that we may not write (EPERM).
        """
        buffer = bytearray(struct.pack("QQQQ", address, length, mode, 0))
        try:
            _ioctl(self._descriptor, _IOC_REGISTER, buffer)
        except OSError as error:
            attempt = f"UFFDIO_REGISTER of {address:#x}+{length:#x} for {mode!r}"
            raise _failed(attempt, error) from error
        allowed = Operation(struct.unpack("QQQQ", buffer)[3])
        missing = needed & ~allowed
        if missing:
            raise UserfaultfdUnsupported(
                errno.EOPNOTSUPP,
                f"memory at {address:#x} registered for {mode!r} does not allow {missing.name}",
            )
        return allowed

    def unregister(self, address: int, length: int) -> None:
        """Watch a range no more; who waits there goes on, with zeros where a page is missing.

        The kernel wakes before it locks the mapping (userfaultfd_unregister() of Linux 6.18), so a
        thread whose fault is on its way at that moment begins to wait behind its back, for ever.
        Waking once more finds it.

        :raise OSError: if the range is not mapped (EINVAL), or the process has exited (ENOMEM).
        """
        try:
            _ioctl(self._descriptor, _IOC_UNREGISTER, struct.pack("QQ", address, length))
        except OSError as error:
            raise _failed(f"UFFDIO_UNREGISTER of {address:#x}+{length:#x}", error) from error
        self.wake(address, length)

    def wake(self, address: int, length: int) -> None:
        """Let who waits in a range try again; who finds no page then faults anew.

        :raise OSError: if the range is not made of whole pages (EINVAL).
        """
        try:
            _ioctl(self._descriptor, _IOC_WAKE, struct.pack("QQ", address, length))
        except OSError as error:
            raise _failed(f"UFFDIO_WAKE of {address:#x}+{length:#x}", error) from error

    def writeprotect(self, address: int, length: int, protect: bool) -> None:
        """Write-protect a range that is registered for it, or lift that and wake.

        :raise OSError: if it is not registered so (ENOENT), the layout is changing (EAGAIN), or
            the process has exited (ESRCH).
        """
        buffer = bytearray(struct.pack("QQQ", address, length, 1 if protect else 0))
        try:
            _ioctl(self._descriptor, _IOC_WRITEPROTECT, buffer)
        except OSError as error:
            raise _failed(f"UFFDIO_WRITEPROTECT of {address:#x}+{length:#x}", error) from error

    # -- placing -----------------------------------------------------------------------------

    def copy(self, destination: int, source: int, length: int, mode: int = 0) -> int:
        """Place `length` bytes from `source`, an address here, at `destination`, an address there.

        The source need not be aligned.
        """
        fields = self._five_fields
        fields[0] = destination
        fields[1] = source
        fields[2] = length
        fields[3] = mode
        fields[4] = 0
        try:
            _ioctl(self._descriptor, _IOC_COPY, fields)
        except OSError as error:
            return _outcome(error, fields[4])
        return length

    def zeropage(self, destination: int, length: int, mode: int = 0) -> int:
        """Place zeros. Not for huge pages: that is a mistake (EINVAL)."""
        fields = self._four_fields
        fields[0] = destination
        fields[1] = length
        fields[2] = mode
        fields[3] = 0
        try:
            _ioctl(self._descriptor, _IOC_ZEROPAGE, fields)
        except OSError as error:
            return _outcome(error, fields[3])
        return length

    def continue_range(self, destination: int, length: int, mode: int = 0) -> int:
        """Map what is in the memory file already; what is not is a mistake (EFAULT)."""
        return self._place(_IOC_CONTINUE, destination, length, mode)

    def poison(self, destination: int, length: int, mode: int = 0) -> int:
        """Make every later access a memory error (SIGBUS), as if the hardware had lost the page."""
        return self._place(_IOC_POISON, destination, length, mode)

    def _place(self, number: int, destination: int, length: int, mode: int) -> int:
        fields = self._four_fields
        fields[0] = destination
        fields[1] = length
        fields[2] = mode
        fields[3] = 0
        try:
            _ioctl(self._descriptor, number, fields)
        except OSError as error:
            return _outcome(error, fields[3])
        return length

    def move(self, destination: int, source: int, length: int, mode: int = 0) -> int:
        """Take pages out of `source` and place them: both are anonymous memory of the process.

        A page that is shared (after a fork) is busy, which is an error of its own: EBUSY.
        """
        fields = self._five_fields
        fields[0] = destination
        fields[1] = source
        fields[2] = length
        fields[3] = mode
        fields[4] = 0
        try:
            _ioctl(self._descriptor, _IOC_MOVE, fields)
        except OSError as error:
            return _outcome(error, fields[4])
        return length

    # -- events ------------------------------------------------------------------------------

    def read_into(self, memory: memoryview) -> None:
        """Have `read_events` read into `memory`, writable and at least 32 bytes, from now on.

        What the kernel has handed out is there then, also for who finds it after us.
        """
        length = min(len(memory) // _MESSAGE_SIZE, _MESSAGES_A_READ) * _MESSAGE_SIZE
        self._messages = memory[:length]
        self._read_into = [self._messages]

    def read_events(self) -> Iterable[tuple[int, int, int, int]]:
        """Read up to 64 events, without waiting; empty when there is none.

        Each is (event, a, b, c):

        ========= ===============================================
        PAGEFAULT flags, address, thread id (0 unless asked for)
        FORK      descriptor of the child's userfaultfd, 0, 0
        REMAP     old address, new address, length
        REMOVE    start, end, 0
        UNMAP     start, end, 0
        ========= ===============================================

        The kernel hands out faults before other events, whatever came first, and none twice. Go
        through what is returned before the next call: it reads into the same buffer.

        :raise OSError: if the handshake has not been done (EINVAL), or the descriptors of this
            process are used up when a FORK event is read (EMFILE).
        """
        try:
            length = os.readv(self._descriptor, self._read_into)
        except BlockingIOError:
            return ()
        if length == _MESSAGE_SIZE:
            return (_unpack_message(self._messages),)
        return _iterate_messages(self._messages[:length])


def removals_in(messages: memoryview) -> Iterator[tuple[int, int]]:
    """Give start and end of each removal in memory that `read_events` has read into.

    Also of those that a later read has not written over; messages of no known kind are left out.
    """
    whole = len(messages) // _MESSAGE_SIZE * _MESSAGE_SIZE
    for event, first, second, _ in _iterate_messages(messages[:whole]):
        if event in (EVENT_REMOVE, EVENT_UNMAP):
            yield first, second


def _outcome(error: OSError, result: int) -> int:
    """Return what a failed placing means: bytes placed before it failed, or a negative errno.

    The kernel answers a part that was placed with EAGAIN and the bytes in the result field. When
    nothing was, the field has been left alone or holds the negative errno, by the kernel's version.
    """
    if result > 0:
        return result
    code = -(error.errno or errno.EIO)
    if code in _VALUES:
        return code
    raise error


def _failed(attempt: str, error: OSError) -> OSError:
    return failure(attempt, error.errno or errno.EIO)


def is_userfaultfd(descriptor: int) -> bool:
    """Tell by its link in /proc whether a descriptor of this process is a userfaultfd.

    :raise FileNotFoundError: if it is not open.
    """
    return str(Path(f"/proc/self/fd/{descriptor}").readlink()) == "anon_inode:[userfaultfd]"


def features_of(descriptor: int, pid: int | None = None) -> Feature | None:
    """Return the features that a handshake has enabled; None if it is no userfaultfd.

    They are empty before the handshake. Read from the ``API:`` line of fdinfo, of which bit 31
    is the kernel's own note that the handshake has been done.

    :param pid: the process that has the descriptor; None for this one.
    :raise FileNotFoundError: if it is not open, or the process has exited.
    :raise PermissionError: if we may not look at that process.
    """
    text = Path(f"/proc/{pid or 'self'}/fdinfo/{descriptor}").read_text()
    match = re.search(r"^API:\s*aa:([0-9a-f]+):", text, re.MULTILINE)
    return Feature(int(match[1], 16) & 0x7FFFFFFF) if match else None
