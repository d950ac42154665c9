"""System calls run inside a thread of another process, which is left exactly as it was.

A thread that is traced is stopped, its registers are made to run one system call that it finds in
its own code, and are put back. If we are killed in between, the kernel lets the thread go on with
the registers that it has; so before they are changed a signal frame is put on its stack, below all
that is in use there, and the system call returns into rt_sigreturn(2), which restores from the
frame whatever the thread had. The registers are changed after the frame is there, and put back
before the frame goes: there is no moment at which the thread cannot go on by itself.
"""

from __future__ import annotations

import contextlib
import errno
import platform
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from postcopyd.kernel import process_memory, ptrace
from postcopyd.kernel.procfs import MappedRange, mappings
from postcopyd.kernel.ptrace import NT_PRSTATUS, Stop
from postcopyd.kernel.registers import Architecture, Gadgets, ThreadState
from postcopyd.kernel.registers_aarch64 import AARCH64
from postcopyd.kernel.registers_x86_64 import X86_64
from postcopyd.kernel.system_calls import failure

_ARCHITECTURES: dict[str, Architecture] = {"x86_64": X86_64, "aarch64": AARCH64}

STOP_LIMIT = 5.0
"""Seconds in which a thread must have stopped. One that waits for a device does not."""
CALL_LIMIT = 120.0
"""Seconds in which an injected system call must have ended."""

_TRIES = 8  # to stop a thread, or to run a system call in it, before a signal comes
_MOST_REGISTERS = 1 << 16  # bytes of one kind
_DATA_SIZE = 256  # bytes on the stack for what a system call reads
_SCAN_STEP = 1 << 20
_CRITICAL_SECTION = 8  # where in struct rseq its rseq_cs is, of 8 bytes

T = TypeVar("T")

at_step: Callable[[str], None] | None = None
"""Told of each step that has been done. For tests, which end the process there."""


class NotInjectable(OSError):
    """No system call can be run in the process; the text says why."""


def inject(pid: int, work: Callable[[Injector], T]) -> T:
    """Stop the main thread of a process, have `work` run system calls in it, let it go on.

    Blocks, at most about as long as `STOP_LIMIT` and `CALL_LIMIT` say for each call. `work` runs in
    a thread of its own, which ends: so does the tracing then, whatever has happened.

    :raise ProcessLookupError: if the process has exited, or does so meanwhile.
    :raise PermissionError: if we may not trace it, or another process does.
    :raise NotInjectable: if it is of another architecture, or the code needed is not in it.
    :raise TimeoutError: if it does not stop.
    """
    with ThreadPoolExecutor(1, thread_name_prefix=f"tracer of {pid}") as tracer:
        return tracer.submit(_inject, pid, work).result()


def _inject(pid: int, work: Callable[[Injector], T]) -> T:
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise NotInjectable(
            errno.EOPNOTSUPP, f"system calls cannot be injected on {platform.machine()}"
        )
    ptrace.seize(pid)
    _done("seized")
    ptrace.interrupt(pid)
    _until_interrupted(pid)
    _done("stopped")
    injector = Injector(pid, architecture)
    try:
        return work(injector)
    except (ProcessLookupError, TimeoutError):
        raise
    except OSError:
        ptrace.signal_mask(pid)  # fails if it has exited, which is the reason then
        raise
    finally:
        # It may have exited, or not be back from a call yet: then this fails, and the end of
        # this thread lets go of it.
        with contextlib.suppress(OSError):
            injector.put_back()
            ptrace.detach(pid)
            _done("detached")


def _until_interrupted(pid: int) -> None:
    """Wait for the stop of an interrupt. Signals that are about to be delivered go first."""
    for _ in range(_TRIES):
        stop = ptrace.wait_for_stop(pid, STOP_LIMIT)
        if not stop.signal and not stop.system_call:
            return
        ptrace.resume(pid, stop.signal)
    raise TimeoutError(f"signals keep process {pid} from stopping")


def _done(step: str) -> None:
    if at_step is not None:
        at_step(step)


class _Prepared(msgspec.Struct, frozen=True):
    """A thread whose frame is on its stack."""

    state: ThreadState
    frame_at: int
    covered: bytes
    """What was on the stack where the frame is, from `frame_at` on."""
    data_at: int
    critical_section: tuple[int, bytes] | None
    """Where the thread says that it is in an rseq(2) critical section, and what it says."""


class Injector:
    """Runs system calls in a thread that is stopped. For the tracing thread only."""

    def __init__(self, pid: int, architecture: Architecture) -> None:
        self._pid = pid
        self._architecture = architecture
        self._gadgets: Gadgets | None = None
        self._prepared: _Prepared | None = None

    def call(self, name: str, *arguments: int | bytes) -> int:
        """Run a system call; return its result, which is a negative errno if it has failed.

        A signal that comes first is delivered, and the call tried again: in the signal's handler.

        :param name: one of `Architecture.numbers`.
        :param arguments: numbers; bytes (one argument at most) stand for their address there.
        """
        data = b"".join(argument for argument in arguments if isinstance(argument, bytes))
        number = self._architecture.numbers[name]
        for _ in range(_TRIES):
            prepared = self._prepared or self._prepare()
            if data:
                self._write(prepared.data_at, data)
            self._set_general(
                self._architecture.calling(
                    prepared.state.general,
                    self._find_gadgets(),
                    prepared.frame_at,
                    number,
                    tuple(
                        prepared.data_at if isinstance(argument, bytes) else argument
                        for argument in arguments
                    ),
                )
            )
            _done("registers set")
            try:
                stop = self._run()
            except TimeoutError:
                self._prepared = None  # it comes back from the call by itself, through the frame
                raise
            if stop.signal:
                self._let_through(stop.signal)
            elif self._trapped():
                self._drop_trap()
                return -errno.ENOSYS
            else:
                return self._architecture.result(self._general())
        raise TimeoutError(f"signals keep process {self._pid} from running {name}(2)")

    def put_back(self) -> None:
        """Make the thread what it was, as far as it is still there. Idempotent."""
        if (prepared := self._prepared) is None:
            return
        self._prepared = None
        if prepared.critical_section is not None:
            # The kernel has taken it away because the thread had left it, for our system call.
            # Back in it the thread must be made to begin it anew, as after every interruption.
            self._write(*prepared.critical_section)
        self._set_general(prepared.state.general)
        _done("registers put back")
        self._write(prepared.frame_at, prepared.covered)
        _done("stack put back")

    # -- the steps of a call -----------------------------------------------------------------

    def _prepare(self) -> _Prepared:
        """Put a frame on the stack from which the thread can restore what it has now."""
        architecture = self._architecture
        state = ThreadState(
            architecture.undisturbed(self._general()),
            ptrace.registers(self._pid, architecture.extended_note, _MOST_REGISTERS),
            ptrace.signal_mask(self._pid),
        )
        top = architecture.stack_pointer(state.general)
        data_at = (top - architecture.red_zone - _DATA_SIZE) & -16
        frame_at, frame = architecture.frame(state, data_at, self._find_gadgets().restore)
        self._check_stack(frame_at, top)
        covered = self._read(frame_at, data_at + _DATA_SIZE - frame_at)
        self._prepared = _Prepared(state, frame_at, covered, data_at, self._critical_section())
        _done("saved")
        self._write(frame_at, frame)
        _done("frame written")
        return self._prepared

    def _critical_section(self) -> tuple[int, bytes] | None:
        if not (rseq := ptrace.restartable_sequence(self._pid)):
            return None
        address = rseq + _CRITICAL_SECTION
        return address, self._read(address, 8)

    def _run(self) -> Stop:
        """Let the thread run from the changed registers to the end of the system call.

        Return the stop there, or that of a signal that has come before the call.
        """
        for step in ("entered", "left"):
            ptrace.resume_to_system_call(self._pid)
            stop = ptrace.wait_for_stop(self._pid, CALL_LIMIT if step == "left" else STOP_LIMIT)
            # A second interrupt, or news of a group stop: the thread goes on all the same.
            while not stop.system_call and not stop.signal:
                ptrace.resume_to_system_call(self._pid)
                stop = ptrace.wait_for_stop(self._pid, STOP_LIMIT)
            if stop.signal:
                return stop
            _done(step)
        return stop

    def _let_through(self, number: int) -> None:
        """Deliver a signal to the thread as it was, and stop it again.

        Then it is where the signal's handler begins, and the signal itself is blocked: one that
        comes again and again does not stop the next attempt.
        """
        self.put_back()
        ptrace.interrupt(self._pid)
        ptrace.resume(self._pid, number)
        _until_interrupted(self._pid)
        _done("signal let through")

    def _trapped(self) -> bool:
        """Tell whether a seccomp filter has answered the system call with a SIGSYS."""
        status = Path(f"/proc/{self._pid}/task/{self._pid}/status").read_text(errors="replace")
        pending = re.search(r"^SigPnd:\s*(\w+)", status, re.MULTILINE)
        return pending is not None and bool(int(pending[1], 16) >> (signal.SIGSYS - 1) & 1)

    def _drop_trap(self) -> None:
        """Take the SIGSYS of our own system call away: it is none of the process's making."""
        self.put_back()
        ptrace.resume(self._pid)
        ptrace.wait_for_stop(self._pid, STOP_LIMIT)  # it comes before all other signals
        ptrace.interrupt(self._pid)
        ptrace.resume(self._pid)
        _until_interrupted(self._pid)

    # -- registers and memory ----------------------------------------------------------------

    def _general(self) -> bytes:
        general = ptrace.registers(self._pid, NT_PRSTATUS, _MOST_REGISTERS)
        if len(general) != self._architecture.general_size:
            raise NotInjectable(errno.EOPNOTSUPP, f"process {self._pid} runs 32-bit code")
        return general

    def _set_general(self, general: bytes) -> None:
        ptrace.set_registers(self._pid, NT_PRSTATUS, general)

    def _read(self, address: int, length: int) -> bytes:
        data = process_memory.read(self._pid, address, length)
        if len(data) != length:
            raise failure(f"memory of process {self._pid} at {address:#x}", errno.EFAULT)
        return data

    def _write(self, address: int, data: bytes) -> None:
        process_memory.write(self._pid, address, data)

    def _check_stack(self, lowest: int, top: int) -> None:
        """Check that there is room for the frame: what is below the stack is another's memory."""
        for mapped in mappings(self._pid):
            # The stack of the main thread grows when it is written to.
            grows = mapped.path == "[stack]"
            writable = mapped.permissions.startswith("rw")
            if mapped.start <= top <= mapped.end and writable and (mapped.start <= lowest or grows):
                if lowest < mapped.start:
                    ptrace.grow_stack(self._pid, lowest)
                return
        raise NotInjectable(
            errno.EOPNOTSUPP,
            f"process {self._pid} has no {top - lowest} bytes of room on its stack at {top:#x}",
        )

    def _find_gadgets(self) -> Gadgets:
        if self._gadgets is None:
            code = sorted(self._code(), key=_rank)
            system_call = self._find(code, (self._architecture.system_call_code,))
            restore = self._find(code, self._architecture.restore_codes)
            if system_call is None or restore is None:
                raise NotInjectable(
                    errno.EOPNOTSUPP,
                    f"the code of process {self._pid} has no instructions for a system call and "
                    "for rt_sigreturn(2) to borrow: it runs without a C library",
                )
            self._gadgets = Gadgets(system_call, restore)
        return self._gadgets

    def _find(self, code: list[MappedRange], wanted: tuple[bytes, ...]) -> int | None:
        """Return where one of the wanted pieces of machine code is, None if nowhere."""
        overlap = max(map(len, wanted)) - 1
        for mapped in code:
            for start in range(mapped.start, mapped.end, _SCAN_STEP):
                length = min(_SCAN_STEP + overlap, mapped.end - start)
                text = process_memory.read(self._pid, start, length)
                for piece in wanted:
                    if (place := text.find(piece)) >= 0:
                        return start + place
        return None

    def _code(self) -> Iterator[MappedRange]:
        """Iterate over code that stays: of a file or the vDSO, not made at run time."""
        for mapped in mappings(self._pid):
            if mapped.permissions == "r-xp" and (mapped.inode or mapped.path == "[vdso]"):
                yield mapped


def _rank(mapped: MappedRange) -> int:
    """Sort by where to look first: the kernel's own code, then C libraries."""
    name = mapped.path.rpartition("/")[2]
    return 0 if name == "[vdso]" else 1 if name.startswith(("libc", "ld-musl")) else 2
