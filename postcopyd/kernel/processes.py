"""pidfd_open(2) and what goes with it: other processes, by a descriptor and not by a number.

The numbers are the same on every architecture.
"""

from __future__ import annotations

from postcopyd.kernel.system_calls import system_call

_PIDFD_SEND_SIGNAL = 424
_PIDFD_OPEN = 434
_PIDFD_GETFD = 438


def pidfd_open(pid: int) -> int:
    """Return a close-on-exec descriptor of a process, readable once it has exited.

    :raise ProcessLookupError: if there is no such process.
    :raise OSError: if it is a thread of a process (EINVAL, ENOENT), or descriptors are used up.
    """
    return system_call(f"watching process {pid}", _PIDFD_OPEN, pid, 0)


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """Return a close-on-exec copy of a descriptor that the process behind `pidfd` has.

    :raise ProcessLookupError: if it has exited.
    :raise PermissionError: if we may not trace it (ptrace(2), PTRACE_MODE_ATTACH_REALCREDS).
    :raise OSError: if it has no such descriptor (EBADF).
    """
    return system_call(
        f"taking a copy of its descriptor {descriptor}", _PIDFD_GETFD, pidfd, descriptor, 0
    )


def pidfd_send_signal(pidfd: int, signal: int) -> None:
    """Send a signal; 0 only tries whether that would be allowed.

    :raise ProcessLookupError: if it has exited.
    :raise PermissionError: if we may not.
    """
    system_call(f"sending signal {signal}", _PIDFD_SEND_SIGNAL, pidfd, signal, 0, 0)
