"""Starts a command as confined as the unit file has it: ``python confined.py CALLS COMMAND...``.

No capability can be had, no privilege gained, no memory made executable, and no system call made
but those whose numbers CALLS lists, separated by commas: what systemd does for an empty
CapabilityBoundingSet=, NoNewPrivileges=, MemoryDenyWriteExecute= and SystemCallFilter=.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_PR_SET_MDWE = 65
_MDWE_REFUSE_EXEC_GAIN = 1
_SECCOMP_MODE_FILTER = 2
_LAST_CAPABILITY = 40

# linux/bpf_common.h, linux/seccomp.h
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF0000
_FAIL_WITH_EPERM = 0x00050000 | errno.EPERM

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def control(operation: int, *arguments: int) -> None:
    """prctl(2)."""
    if _prctl(operation, *arguments, *(0,) * (4 - len(arguments))) < 0:
        raise OSError(ctypes.get_errno(), f"prctl {operation}")


def program(calls: list[int]) -> bytes:
    """Return the filter: these numbers may be called, all others fail with EPERM."""

    def instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    parts = [instruction(_LOAD_WORD, 0, 0, 0)]
    for call in calls:
        parts.append(instruction(_JUMP_IF_EQUAL, 0, 1, call))
        parts.append(instruction(_RETURN, 0, 0, _ALLOW))
    parts.append(instruction(_RETURN, 0, 0, _FAIL_WITH_EPERM))
    return b"".join(parts)


def main() -> None:
    calls, *command = sys.argv[1:]
    for capability in range(_LAST_CAPABILITY + 1):
        control(_PR_CAPBSET_DROP, capability)
    control(_PR_SET_NO_NEW_PRIVS, 1)
    control(_PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN)
    instructions = program([int(call) for call in calls.split(",")])
    filter_ = _Program(len(instructions) // 8, instructions)
    control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
