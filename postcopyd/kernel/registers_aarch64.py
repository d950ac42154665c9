"""Registers and signal frame of aarch64.

Layouts: struct user_pt_regs and struct user_fpsimd_state of asm/ptrace.h, struct ucontext of
asm/ucontext.h, struct sigcontext and struct fpsimd_context of asm/sigcontext.h, struct rt_sigframe
of arch/arm64/kernel/signal.c.

A system call that the stop has interrupted is set up to be begun anew before the kernel stops the
thread (do_signal() there), so nothing is done about it here. Where it has to go on (how long to
sleep still) is forgotten: a nanosleep(2) begins anew.
"""

from __future__ import annotations

import struct

from postcopyd.kernel.ptrace import NT_PRFPREG
from postcopyd.kernel.registers import Architecture, Gadgets, ThreadState

# struct user_pt_regs: x0 to x30, sp, pc, pstate.
_GENERAL = struct.Struct("<34Q")
_X8 = 8
_X30 = 30
_SP = 31
_PC = 32
_PSTATE = 33
_PSTATE_BTYPE = 0b11 << 10

# struct rt_sigframe: siginfo (not read); the ucontext: flags, link, stack (pointer, flags, size),
# signal mask in a field of 128 bytes, then at a multiple of 16 the sigcontext: fault address,
# general registers, and at a multiple of 16 records of 4096 bytes altogether.
_FRAME = struct.Struct("<128x QQ QixxxxQ Q 120x 8x Q 34Q 8x 4096s")
# No mode that sigaltstack(2) has. The kernel refuses it, ignores that it has, and leaves the
# alternate stack as it is: restore_altstack(). What it is cannot be asked from outside.
_NO_ALTERNATE_STACK = 3

# struct user_fpsimd_state: 32 vector registers, fpsr, fpcr, padding.
_EXTENDED = struct.Struct("<512s II 8x")
# struct fpsimd_context: magic, size, fpsr, fpcr, 32 vector registers. A record of zeros is the end.
_FPSIMD = struct.Struct("<II II 512s")
_FPSIMD_MAGIC = 0x46508001


def _stack_pointer(general: bytes) -> int:
    return _values(general)[_SP]


def _result(general: bytes) -> int:
    result: int = struct.unpack_from("<q", general)[0]
    return result


def _undisturbed(general: bytes) -> bytes:
    return general


def _frame(state: ThreadState, below: int, restore: int) -> tuple[int, bytes]:
    vectors, fpsr, fpcr = _EXTENDED.unpack(state.extended)
    record = _FPSIMD.pack(_FPSIMD_MAGIC, _FPSIMD.size, fpsr, fpcr, vectors)
    frame = _FRAME.pack(
        *(0, 0),
        *(0, _NO_ALTERNATE_STACK, 0),
        state.signal_mask,
        0,
        *_values(state.general),
        record,
    )
    return (below - len(frame)) & -16, frame


def _calling(
    general: bytes, gadgets: Gadgets, frame: int, number: int, arguments: tuple[int, ...]
) -> bytes:
    values = _values(general)
    values[: len(arguments)] = arguments
    values[_X8] = number
    values[_X30] = gadgets.restore
    values[_SP] = frame
    values[_PC] = gadgets.system_call
    # Else the processor, interrupted on a branch, could take this for where it leads to.
    values[_PSTATE] &= ~_PSTATE_BTYPE
    return _GENERAL.pack(*values)


def _values(general: bytes) -> list[int]:
    return list(_GENERAL.unpack(general))


AARCH64 = Architecture(
    general_size=_GENERAL.size,
    extended_note=NT_PRFPREG,
    red_zone=0,
    system_call_code=bytes.fromhex("010000d4 c0035fd6"),  # svc #0; ret
    restore_codes=(bytes.fromhex("681180d2 010000d4"),),  # mov x8, #139; svc #0
    numbers={
        "close": 57,
        "ioctl": 29,
        "madvise": 233,
        "openat": 56,
        "userfaultfd": 282,
    },
    stack_pointer=_stack_pointer,
    result=_result,
    undisturbed=_undisturbed,
    frame=_frame,
    calling=_calling,
)
