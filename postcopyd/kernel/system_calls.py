"""The C library, and the one way in which this room turns an errno into an exception.

Calls through `libc` release the interpreter lock: a thread that waits for a page inside one does
not stop the thread that brings it.
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def failure(attempt: str, code: int, hint: str = "") -> OSError:
    """Return the exception for `code`: what was attempted, what the kernel said, what to do."""
    text = f"{attempt}: {os.strerror(code)}"
    return OSError(code, f"{text}; {hint}" if hint else text)


def last_errno() -> int:
    """Return the errno that the last failed call through `libc` has left."""
    return ctypes.get_errno()


def system_call(attempt: str, number: int, *arguments: int) -> int:
    """Do a system call that has no wrapper in the C library; return its result.

    :param attempt: what the call is for, as the beginning of an error message.
    :raise OSError: if the kernel refuses.
    """
    result: int = libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)
    )
    if result < 0:
        raise failure(attempt, last_errno())
    return result
