"""ptrace(2): one thread of another process, seized, stopped, looked at, and let go.

Behaviour is that of the ptrace(2) manual page, and of kernel/ptrace.c and kernel/signal.c of
Linux 6.18 where it is silent. Whatever is traced is traced by one thread of ours, not by the
process: every function here must be called by the thread that has called `seize`. When that thread
ends, the kernel lets go of what it traces.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time

import msgspec

from postcopyd.kernel.system_calls import failure, last_errno, libc

_POKEDATA = 5
_CONT = 7
_DETACH = 17
_SYSCALL = 24
_GETREGSET = 0x4204
_SETREGSET = 0x4205
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_GETSIGMASK = 0x420A
_GET_RSEQ_CONFIGURATION = 0x420F

_O_TRACESYSGOOD = 1
_SYSTEM_CALL_STOP = signal.SIGTRAP | 0x80  # what TRACESYSGOOD makes of SIGTRAP
_EVENT_STOP = 128

_WALL = 0x40000000
_WNOTHREAD = 0x20000000
_STOPS = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL | _WNOTHREAD

NT_PRSTATUS = 1
"""The note of the general registers."""
NT_PRFPREG = 2
"""The note of the floating-point registers."""
NT_X86_XSTATE = 0x202
"""The note of all extended registers of x86, in the layout of XSAVE."""

# Nothing tells us of a stop: it is asked for, at first often.
_SHORTEST_PAUSE = 20e-6  # seconds
_LONGEST_PAUSE = 2e-3


class Stop(msgspec.Struct, frozen=True):
    """Why a traced thread has stopped. None of the two: it was interrupted, or its group stops."""

    signal: int
    """The signal that is about to be delivered; 0 if that is not why."""
    system_call: bool
    """It is about to begin a system call, or has just ended one."""


def seize(thread: int) -> None:
    """Trace a thread, which goes on.

    :raise ProcessLookupError: if there is no such thread.
    :raise PermissionError: if we may not, if it is traced already, has exited, or is the kernel's.
    """
    _ptrace(f"tracing process {thread}", _SEIZE, thread, 0, _O_TRACESYSGOOD)


def interrupt(thread: int) -> None:
    """Have it stop, without a signal."""
    _ptrace(f"interrupting process {thread}", _INTERRUPT, thread, 0, 0)


def resume(thread: int, signal_number: int = 0) -> None:
    """Let it go on until something stops it; deliver a signal to it first."""
    _ptrace(f"resuming process {thread}", _CONT, thread, 0, signal_number)


def resume_to_system_call(thread: int) -> None:
    """Let it go on until the begin or the end of a system call, or until something stops it."""
    _ptrace(f"resuming process {thread}", _SYSCALL, thread, 0, 0)


def detach(thread: int) -> None:
    """Trace it no more: it goes on, or stays stopped if its group is stopped.

    A system call that the stop has interrupted is restarted, as its registers say: detaching makes
    the kernel look for that (__ptrace_unlink() marks a signal as pending).
    """
    _ptrace(f"detaching from process {thread}", _DETACH, thread, 0, 0)


def wait_for_stop(thread: int, seconds: float) -> Stop:
    """Wait until it has stopped; its exit is left for its parent to see.

    :raise ProcessLookupError: if it has exited.
    :raise TimeoutError: if it has not stopped in that time: it goes on, or will stop later.
    """
    deadline = time.monotonic() + seconds
    pause = _SHORTEST_PAUSE
    while (status := os.waitid(os.P_PID, thread, _STOPS)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {thread} has not stopped in {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    if status.si_code != os.CLD_TRAPPED:
        raise ProcessLookupError(f"process {thread} {_ending(status)}")
    if status.si_status == _SYSTEM_CALL_STOP:
        return Stop(signal=0, system_call=True)
    if status.si_status >> 8 == _EVENT_STOP:
        return Stop(signal=0, system_call=False)
    return Stop(signal=status.si_status, system_call=False)


def _ending(status: os.waitid_result) -> str:
    if status.si_code == os.CLD_EXITED:
        return f"has exited with status {status.si_status}"
    names = {known.value: known.name for known in signal.Signals}  # not of all real-time signals
    return f"was ended by {names.get(status.si_status, f'signal {status.si_status}')}"


def registers(thread: int, note: int, limit: int) -> bytes:
    """Return the registers of a kind, in the layout that the thread's architecture has for it.

    :param note: which ones, such as `NT_PRSTATUS`.
    :param limit: most bytes.
    """
    buffer = ctypes.create_string_buffer(limit)
    length = _register_set(thread, _GETREGSET, note, buffer)
    return buffer.raw[:length]


def set_registers(thread: int, note: int, values: bytes) -> None:
    """Put registers of a kind in place, all at once."""
    buffer = ctypes.create_string_buffer(values, len(values))
    _register_set(thread, _SETREGSET, note, buffer)


def _register_set(thread: int, request: int, note: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    vector = ctypes.create_string_buffer(
        struct.pack("QQ", ctypes.addressof(buffer), len(buffer)), 16
    )
    _ptrace(f"registers of process {thread}", request, thread, note, ctypes.addressof(vector))
    length: int = struct.unpack("QQ", vector.raw)[1]
    return length


def grow_stack(thread: int, address: int) -> None:
    """Have a stack reach down to `address`, as if the thread itself had used it: 8 bytes become 0.

    process_vm_writev(2) lets no stack grow (mm/gup.c, since Linux 6.5).

    :raise OSError: if there is no stack that can.
    """
    _ptrace(f"stack of process {thread}", _POKEDATA, thread, address, 0)


def signal_mask(thread: int) -> int:
    """Return the signals that it blocks: bit 0 is signal 1.

    While it waits in a system call that has a mask of its own (ppoll, sigsuspend), it is the mask
    that it will have again afterwards.
    """
    buffer = ctypes.create_string_buffer(8)
    _ptrace(f"signal mask of process {thread}", _GETSIGMASK, thread, 8, ctypes.addressof(buffer))
    return int.from_bytes(buffer.raw, "little")


def restartable_sequence(thread: int) -> int:
    """Return the address of its struct rseq (linux/rseq.h), 0 if it has none.

    Asked for since Linux 5.13. An older kernel, or one without rseq(2), answers EIO: no address.
    """
    # struct ptrace_rseq_configuration: address, size, signature, flags, padding.
    buffer = ctypes.create_string_buffer(24)
    try:
        _ptrace(
            f"rseq of process {thread}",
            _GET_RSEQ_CONFIGURATION,
            thread,
            len(buffer),
            ctypes.addressof(buffer),
        )
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    return int.from_bytes(buffer.raw[:8], "little")


def _ptrace(attempt: str, request: int, thread: int, address: int, data: int) -> None:
    if libc.ptrace(request, thread, address, data) < 0:
        raise failure(attempt, last_errno())
