"""Giving up rights, for a process that a test has started for that."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from postcopyd.kernel.system_calls import failure, last_errno, libc
from postcopyd.kernel.userfaultfd_open import _SYSTEM_CALL

NOBODY = 65534
CAP_SYS_PTRACE = 19
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
# Where in struct seccomp_data.
_NUMBER = 0
_SECOND_ARGUMENT = 24


def _prctl(option: int, *arguments: int) -> None:
    rest = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(ctypes.c_int(option), *rest) < 0:
        raise failure(f"prctl {option}", last_errno())


def drop_rights() -> None:
    """Become a user without any right, as if it had been so from the start."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # Else /proc/self stays root's.
    _prctl(_PR_SET_DUMPABLE, 1)


def keep_only(capability: int) -> None:
    """Become a user with one capability, as a systemd unit with AmbientCapabilities= has it."""
    _prctl(_PR_SET_KEEPCAPS, 1)
    drop_rights()
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    low, high = 1 << capability, 0
    # Effective, permitted, inheritable: of the first 32 capabilities, then of the others.
    data = struct.pack("6I", low, low, 0, high, high, high)
    if libc.capset(header, data) < 0:
        raise failure("capset", last_errno())


def forbid_userfaultfd(code: int) -> None:
    """Have the kernel answer userfaultfd(2) with an errno (seccomp), as containers do."""
    _filter((_NUMBER, _SYSTEM_CALL[platform.machine()]), code)


def answer_ioctl(request: int, code: int) -> None:
    """Have the kernel answer an ioctl with an errno; 0 is a success that does nothing."""
    _filter((_SECOND_ARGUMENT, request), code)


def _filter(match: tuple[int, int], code: int) -> None:
    """Answer the system calls of which a word of struct seccomp_data has a value."""
    place, value = match
    # struct sock_filter: load the word; if it is the value, answer, else allow.
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, place),
            (0x15, 0, 1, value),
            (0x06, 0, 0, 0x00050000 | code),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    header_buffer = ctypes.create_string_buffer(header, len(header))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header_buffer))
