"""What differs between architectures when a system call is run inside a stopped thread.

An architecture knows the layout of the registers as ptrace(2) gives them, how a system call is
made and returned from, and the frame that rt_sigreturn(2) takes registers from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec


class ThreadState(msgspec.Struct, frozen=True):
    """What a thread has beside its memory."""

    general: bytes
    """General registers, as NT_PRSTATUS."""
    extended: bytes
    """Floating-point and vector registers, as the architecture's `extended_note`."""
    signal_mask: int
    """The signals that it blocks: bit 0 is signal 1."""


class Gadgets(msgspec.Struct, frozen=True):
    """Instructions that are in the process already, by address."""

    system_call: int
    """A system call, then a return."""
    restore: int
    """rt_sigreturn(2)."""


class Architecture(msgspec.Struct, frozen=True):
    """One architecture of processes. `general` is always what NT_PRSTATUS holds."""

    general_size: int
    """Bytes of NT_PRSTATUS; a process that is not of this architecture has another size."""
    extended_note: int
    """The note of the floating-point and vector registers."""
    red_zone: int
    """Bytes below the stack pointer that belong to the code that runs."""
    system_call_code: bytes
    """Machine code: a system call, then a return."""
    restore_codes: tuple[bytes, ...]
    """Machine code that C libraries or the vDSO have for rt_sigreturn(2)."""
    numbers: Mapping[str, int]
    """The numbers of the system calls that are injected."""
    stack_pointer: Callable[[bytes], int]
    """general -> the address of the top of the stack."""
    result: Callable[[bytes], int]
    """general -> what a system call has returned: a value, or a negative errno."""
    undisturbed: Callable[[bytes], bytes]
    """general -> the registers with which a thread that was stopped goes on as if it had not."""
    frame: Callable[[ThreadState, int, int], tuple[int, bytes]]
    """state, an address, the address of `Gadgets.restore` -> a frame from which rt_sigreturn(2)
    restores that state, and where it has to be: it ends at the given address or a little below."""
    calling: Callable[[bytes, Gadgets, int, int, tuple[int, ...]], bytes]
    """general, gadgets, the address of the frame, number and arguments of a system call -> the
    registers that make the call and return into the frame."""
