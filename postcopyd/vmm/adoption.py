"""Adoption: a userfaultfd of a process that knows nothing of us and hands nothing over.

Its main thread is stopped for a moment and opens the userfaultfd itself
(`postcopyd.kernel.injection`); we take a copy. Its own copy stays open: if we die, a thread that
waits for a page must go on waiting, and never read zeros.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Callable, Sequence
from typing import TypeVar

from postcopyd.kernel.injection import Injector, inject
from postcopyd.kernel.open_files import is_same
from postcopyd.kernel.processes import pidfd_getfd, pidfd_open
from postcopyd.kernel.system_calls import failure
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd, is_userfaultfd
from postcopyd.vmm.adoption_refusals import AdoptionRefused, check, why

__all__ = ["AdoptedProcess", "AdoptionRefused", "adopt"]

_DEVICE = "/dev/userfaultfd"
_DEVICE_IOC_NEW = 0xAA00
_AT_FDCWD = -100 & 0xFFFFFFFFFFFFFFFF
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

T = TypeVar("T")


class AdoptedProcess:
    """A process that has opened a userfaultfd for us. For one thread at a time."""

    def __init__(self, pid: int, pidfd: int, userfaultfd: Userfaultfd, descriptor: int) -> None:
        """Take over `pidfd` and `userfaultfd`. Use `adopt`."""
        self.pid = pid
        self.pidfd = pidfd
        """Ours; readable when it has exited; -1 when closed."""
        self.userfaultfd = userfaultfd
        """Ours; the handshake is done."""
        self.descriptor = descriptor
        """The number of its own copy, in the process."""

    def advise(self, ranges: Sequence[tuple[int, int]], advice: int) -> None:
        """Have it call madvise(2) for each range, in one stop. Blocks.

        A range that is watched with EVENT_REMOVE takes somebody else who reads the events.

        :param ranges: address and length, bytes, whole pages.
        :param advice: such as `mmap.MADV_DONTNEED`.
        :raise ProcessLookupError: if it has exited.
        :raise OSError: if it cannot be stopped, or refuses; naming the range at which it ended.
        """

        def work(injector: Injector) -> None:
            for address, length in ranges:
                result = injector.call("madvise", address, length, advice)
                if result < 0:
                    raise failure(
                        f"madvise of {address:#x}+{length:#x} in process {self.pid}", -result
                    )

        if ranges:
            _inject(self.pid, self.pidfd, work)

    def release(self) -> None:
        """Have it close its copy, unless it has exited or cannot be stopped. Blocks.

        Only when nothing is registered any more: what waits would go on with zeros. Harmless if it
        has closed it already: a predecessor of this process may have asked for that long ago.
        """

        def work(injector: Injector) -> None:
            if self._has_its_copy():
                injector.call("close", self.descriptor)

        with contextlib.suppress(OSError):
            _inject(self.pid, self.pidfd, work)

    def _has_its_copy(self) -> bool:
        """Tell whether the number is not that of something else by now."""
        there = pidfd_getfd(self.pidfd, self.descriptor)
        try:
            return is_same(there, self.userfaultfd.fileno())
        finally:
            os.close(there)

    def close(self) -> None:
        """Close our descriptors; what it has stays open. Idempotent."""
        self.userfaultfd.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def adopt(pid: int, wanted: Feature) -> AdoptedProcess:
    """Have a process open a userfaultfd and take a copy of it; the process goes on. Blocks.

    A child of ours must not be waited for at the time by a thread of ours (wait(2) of another
    thread would take the stop for an exit).

    :param wanted: the features to enable, as far as the kernel offers them.
    :raise AdoptionRefused: if it cannot be adopted; it is as it was before.
    """
    check(pid)
    with contextlib.ExitStack() as undo:
        try:
            pidfd = pidfd_open(pid)
        except OSError as error:
            raise AdoptionRefused(why(pid, error)) from error
        undo.callback(os.close, pidfd)

        def work(injector: Injector) -> AdoptedProcess:
            descriptor = _open_userfaultfd(pid, injector)
            try:
                userfaultfd = _take_copy(pidfd, descriptor, wanted)
            except OSError:
                injector.call("close", descriptor)
                raise
            return AdoptedProcess(pid, pidfd, userfaultfd, descriptor)

        try:
            adopted = _inject(pid, pidfd, work)
        except OSError as error:
            raise AdoptionRefused(why(pid, error)) from error
        undo.pop_all()
        return adopted


def _inject(pid: int, pidfd: int, work: Callable[[Injector], T]) -> T:
    """Run `work` in the process behind `pidfd`, not in one that has got its number since."""

    def checked(injector: Injector) -> T:
        if _exited(pidfd):
            raise failure(f"process {pid}", errno.ESRCH)
        return work(injector)

    if pidfd < 0 or _exited(pidfd):
        raise failure(f"process {pid}", errno.ESRCH)
    return inject(pid, checked)


def _exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _open_userfaultfd(pid: int, injector: Injector) -> int:
    """Have the process open one, in the two ways of `postcopyd.kernel.userfaultfd_open`."""
    descriptor = injector.call("userfaultfd", _FLAGS)
    if descriptor >= 0:
        return descriptor
    by_system_call = descriptor
    descriptor = _open_by_device(injector)
    if descriptor >= 0:
        return descriptor
    raise AdoptionRefused(
        f"process {pid} cannot open a userfaultfd: userfaultfd(2): {os.strerror(-by_system_call)}; "
        f"{_DEVICE}: {os.strerror(-descriptor)}. {_remedy(-by_system_call)}"
    )


def _open_by_device(injector: Injector) -> int:
    device = injector.call(
        "openat", _AT_FDCWD, _DEVICE.encode() + b"\0", os.O_RDWR | os.O_CLOEXEC, 0
    )
    if device < 0:
        return device
    descriptor = injector.call("ioctl", device, _DEVICE_IOC_NEW, _FLAGS)
    injector.call("close", device)
    return descriptor


def _remedy(code: int) -> str:
    if code == errno.ENOSYS:
        return (
            "The kernel is built without CONFIG_USERFAULTFD, or a seccomp filter forbids it: "
            "allow userfaultfd in the filter of the process"
        )
    if code in (errno.EMFILE, errno.ENFILE):
        return "Raise its limit of open files (RLIMIT_NOFILE)"
    return (
        f"Give the user of the process access to {_DEVICE}, or set "
        "sysctl vm.unprivileged_userfaultfd=1; if a seccomp filter forbids it, "
        "allow userfaultfd there"
    )


def _take_copy(pidfd: int, descriptor: int, wanted: Feature) -> Userfaultfd:
    copy = pidfd_getfd(pidfd, descriptor)
    try:
        if not is_userfaultfd(copy):
            raise failure("what it has opened is no userfaultfd", errno.EBADF)
        userfaultfd = Userfaultfd(copy)
        userfaultfd.handshake(wanted & Userfaultfd.offered())
    except OSError:
        os.close(copy)
        raise
    return userfaultfd
