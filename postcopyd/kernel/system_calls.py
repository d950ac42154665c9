"""The C library, and the one way in which this room turns an errno into an exception.

Calls through `libc` release the interpreter lock: a thread that waits for a page inside one does
not stop the thread that brings it.
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

_INT = ctypes.c_int
_SIZE = ctypes.c_size_t
_OFFSET = ctypes.c_int64
_ADDRESS = ctypes.c_void_p

# What is called through `libc`: result, arguments.
_PROTOTYPES = {
    "fallocate": (_INT, (_INT, _INT, _OFFSET, _OFFSET)),
    "fstatfs": (_INT, (_INT, _ADDRESS)),
    "madvise": (_INT, (_ADDRESS, _SIZE, _INT)),
    "memcpy": (_ADDRESS, (_ADDRESS, _ADDRESS, _SIZE)),
    "memset": (_ADDRESS, (_ADDRESS, _INT, _SIZE)),
    "mlock": (_INT, (_ADDRESS, _SIZE)),
    "mlockall": (_INT, (_INT,)),
    "mmap": (_ADDRESS, (_ADDRESS, _SIZE, _INT, _INT, _INT, _OFFSET)),
    "munlock": (_INT, (_ADDRESS, _SIZE)),
    "munlockall": (_INT, ()),
    "munmap": (_INT, (_ADDRESS, _SIZE)),
    "process_vm_readv": (ctypes.c_ssize_t, (_INT, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _SIZE)),
    "process_vm_writev": (ctypes.c_ssize_t, (_INT, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _SIZE)),
    "ptrace": (ctypes.c_long, (_INT, _INT, _ADDRESS, _ADDRESS)),
    "write": (ctypes.c_ssize_t, (_INT, _ADDRESS, _SIZE)),
}
for _name, (_result, _arguments) in _PROTOTYPES.items():
    _function = libc[_name]
    _function.restype = _result
    _function.argtypes = _arguments
    setattr(libc, _name, _function)
libc.syscall.restype = ctypes.c_long  # its arguments vary


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
