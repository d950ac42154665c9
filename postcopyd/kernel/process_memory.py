"""Memory of another process, by process_vm_readv(2): no more is needed than the right to trace it.

/proc/PID/mem belongs to the process's user, so CAP_SYS_PTRACE alone does not open it.
"""

from __future__ import annotations

import ctypes
import errno

from postcopyd.kernel.system_calls import failure, last_errno, libc


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read(pid: int, address: int, length: int) -> bytes:
    """Return `length` bytes, or fewer if not all of them can be read.

    :raise OSError: if none can.
    """
    buffer = ctypes.create_string_buffer(length)
    count = _transfer("process_vm_readv", pid, buffer, address)
    if count < 0:
        raise failure(f"memory of process {pid} at {address:#x}", last_errno())
    return buffer.raw[:count]


def write(pid: int, address: int, data: bytes) -> None:
    """Put `data` there. Only what the process itself may write can be written.

    :raise OSError: if not all of it can be written; some of it may have been.
    """
    count = _transfer(
        "process_vm_writev", pid, ctypes.create_string_buffer(data, len(data)), address
    )
    if count != len(data):
        code = last_errno() if count < 0 else errno.EFAULT
        raise failure(f"memory of process {pid} at {address:#x}", code)


def _transfer(name: str, pid: int, buffer: ctypes.Array[ctypes.c_char], address: int) -> int:
    ours = _Piece(ctypes.addressof(buffer), len(buffer))
    theirs = _Piece(address, len(buffer))
    count: int = getattr(libc, name)(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    return count
