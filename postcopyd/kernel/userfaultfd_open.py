"""The two ways to get a userfaultfd: the system call, and /dev/userfaultfd (since Linux 6.1).

userfaultfd(2) tells which rights each of them takes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform

from postcopyd.kernel.system_calls import failure, system_call

_SYSTEM_CALL = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1
_DEVICE = "/dev/userfaultfd"
_DEVICE_IOC_NEW = 0xAA00


class UserfaultfdUnavailable(OSError):
    """No userfaultfd can be had; the text names the ways that were tried and what to do.

    Its errno is that of the system call.
    """

    def __init__(self, code: int, detail: str, remedy: str) -> None:
        super().__init__(code, f"{detail}. {remedy}")
        self.detail = detail
        """What was tried, and what the kernel said."""
        self.remedy = remedy


def open_userfaultfd(user_mode_only: bool) -> int:
    """Return a new descriptor, close-on-exec and non-blocking: by system call, else by device.

    :raise UserfaultfdUnavailable: if neither way is open to us.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (_USER_MODE_ONLY if user_mode_only else 0)
    try:
        return _open_by_system_call(flags)
    except OSError as error:
        by_system_call = error
    try:
        return _open_by_device(flags)
    except OSError as error:
        code = by_system_call.errno or errno.EPERM
        raise UserfaultfdUnavailable(
            code,
            f"no userfaultfd: userfaultfd(2): {os.strerror(code)}; {_DEVICE}: {error.strerror}",
            _what_to_do(code, user_mode_only),
        ) from by_system_call


def _open_by_system_call(flags: int) -> int:
    number = _SYSTEM_CALL.get(platform.machine())
    if number is None:
        raise failure(f"userfaultfd(2) on {platform.machine()}", errno.ENOSYS)
    return system_call("userfaultfd(2)", number, flags)


def _open_by_device(flags: int) -> int:
    device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _DEVICE_IOC_NEW, flags)
    finally:
        os.close(device)


def _what_to_do(code: int, user_mode_only: bool) -> str:
    """Return the remedy for a system call that has failed with `code`."""
    if code == errno.ENOSYS:
        return "This kernel is built without CONFIG_USERFAULTFD: use one that has it"
    if code in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files (RLIMIT_NOFILE)"
    if user_mode_only:
        return (
            "A seccomp filter forbids it, or the kernel is older than 5.11: "
            "allow userfaultfd in the filter of the container or service"
        )
    return (
        f"Run as root, give this user access to {_DEVICE}, or set "
        "sysctl vm.unprivileged_userfaultfd=1"
    )
