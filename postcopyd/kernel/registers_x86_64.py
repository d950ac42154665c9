"""Registers and signal frame of x86-64.

Layouts: struct user_regs_struct of asm/user_64.h, struct ucontext and struct sigcontext_64 of
asm/ucontext.h and asm/sigcontext.h, struct rt_sigframe of asm/sigframe.h. What the kernel demands
of the extended state in a frame is check_xstate_in_sigframe() of arch/x86/kernel/fpu/signal.c.
"""

from __future__ import annotations

import errno
import struct

from postcopyd.kernel.ptrace import NT_X86_XSTATE
from postcopyd.kernel.registers import Architecture, Gadgets, ThreadState

# Of struct user_regs_struct, all of 8 bytes.
_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base"),
    *("ds", "es", "fs", "gs"),
)
_GENERAL = struct.Struct(f"<{len(_NAMES)}Q")
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")

# Of struct sigcontext_64, up to rip and eflags.
_IN_FRAME = (
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx"),
    *("rax", "rcx", "rsp", "rip", "eflags"),
)

# struct rt_sigframe: the address to return to; the ucontext: flags, link, stack (pointer, flags,
# size), sigcontext (18 registers; cs, gs, fs, ss; err, trapno, oldmask, cr2; fpstate; 8 reserved),
# signal mask. What follows, the siginfo, is not read.
_FRAME = struct.Struct("<Q QQ QixxxxQ 18Q HHHH QQQQ Q 64x Q 128x")
_UC_FP_XSTATE = 1
_UC_SIGCONTEXT_SS = 2
_UC_STRICT_RESTORE_SS = 4
_UC_FLAGS = _UC_FP_XSTATE | _UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS
# No mode that sigaltstack(2) has. The kernel refuses it, ignores that it has, and leaves the
# alternate stack as it is: restore_altstack(). What it is cannot be asked from outside.
_NO_ALTERNATE_STACK = 3

# struct _fpx_sw_bytes, in the legacy part of the extended state; the features of the state.
_SOFTWARE = struct.Struct("<IIQI 28x")
_SOFTWARE_AT = 464
_FEATURES_AT = 512
_MAGIC_1 = 0x46505853
_MAGIC_2 = struct.pack("<I", 0x46505845)
_EXTENDED_ALIGNMENT = 64

# AMX. The kernel restores at most what the process has asked for, and tile data is the one
# component that it must ask for. It is the last of the layout.
_TILE_DATA = 1 << 18
_TILE_DATA_SIZE = 8192

# The results by which the kernel marks a system call to be restarted: include/linux/errno.h.
_RESTARTED = frozenset({-512, -513, -514})  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND
_RESTART_NO_HANDLER = (1 << 64) - 514
_RESTART_BLOCK = -516
_SYSTEM_CALL_SIZE = 2
_NO_SYSTEM_CALL = (1 << 64) - 1

# Waits that any stop ends with EINTR (signal(7)): number -> the argument that is their time-out.
_EPOLL_WAIT = {232: "r10", 281: "r10"}  # epoll_wait, epoll_pwait: milliseconds, an int
_TIMED = {128: "rdx", 220: "r10", 441: "r10"}  # rt_sigtimedwait, semtimedop, epoll_pwait2: pointers
_SEMOP = 65


def _stack_pointer(general: bytes) -> int:
    return _values(general)["rsp"]


def _result(general: bytes) -> int:
    return _signed(_values(general)["rax"])


def _undisturbed(general: bytes) -> bytes:
    values = _values(general)
    if _signed(values["rax"]) == -errno.EINTR and _waits_for_ever(values):
        return _GENERAL.pack(*(values | {"rax": _RESTART_NO_HANDLER}).values())
    return general


def _frame(state: ThreadState, below: int, restore: int) -> tuple[int, bytes]:
    extended = _extended(state.extended)
    extended_at = (below - len(extended)) & -_EXTENDED_ALIGNMENT
    # As the kernel aligns it: as if the return address had just been pushed.
    frame_at = ((extended_at - _FRAME.size + 8) & -16) - 8
    values = _restarted_by_hand(_values(state.general))
    frame = _FRAME.pack(
        restore,
        *(_UC_FLAGS, 0),
        *(0, _NO_ALTERNATE_STACK, 0),
        *(values[name] for name in _IN_FRAME),
        *(values[name] for name in ("cs", "gs", "fs", "ss")),
        *(0, 0, 0, 0),
        extended_at,
        state.signal_mask,
    )
    return frame_at, frame.ljust(extended_at - frame_at, b"\0") + extended


def _calling(
    general: bytes, gadgets: Gadgets, frame: int, number: int, arguments: tuple[int, ...]
) -> bytes:
    values = _values(general)
    values.update(zip(_ARGUMENTS, arguments, strict=False))
    values["rax"] = number
    values["rip"] = gadgets.system_call
    values["rsp"] = frame
    # Else the kernel would take what was interrupted for what is to be restarted.
    values["orig_rax"] = _NO_SYSTEM_CALL
    return _GENERAL.pack(*values.values())


def _values(general: bytes) -> dict[str, int]:
    return dict(zip(_NAMES, _GENERAL.unpack(general), strict=True))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _waits_for_ever(values: dict[str, int]) -> bool:
    """Tell whether it was in a wait that can be begun anew, because it has no time-out."""
    number = values["orig_rax"]
    if number in _EPOLL_WAIT:
        return bool(values[_EPOLL_WAIT[number]] & 0x80000000)
    return number == _SEMOP or (number in _TIMED and values[_TIMED[number]] == 0)


def _restarted_by_hand(values: dict[str, int]) -> dict[str, int]:
    """Return the registers as the kernel leaves them when it restarts a system call.

    It does so on the way out of a system call; rt_sigreturn(2) is a way out of another one.
    """
    if values["orig_rax"] == _NO_SYSTEM_CALL:
        return values
    result = _signed(values["rax"])
    if result in _RESTARTED:
        return values | {
            "rax": values["orig_rax"],
            "rip": values["rip"] - _SYSTEM_CALL_SIZE,
        }
    if result == _RESTART_BLOCK:
        # Where such a call has to go on (how long to sleep still) is in the kernel's restart block,
        # which rt_sigreturn(2) forgets. Begun anew it would last too long.
        return values | {"rax": (1 << 64) - errno.EINTR}
    return values


def _extended(xstate: bytes) -> bytes:
    """Return NT_X86_XSTATE with the words by which the kernel knows it in a frame."""
    (offered,) = struct.unpack_from("<Q", xstate, _SOFTWARE_AT)
    (present,) = struct.unpack_from("<Q", xstate, _FEATURES_AT)
    size = len(xstate)
    if offered & _TILE_DATA and not present & _TILE_DATA:
        offered &= ~_TILE_DATA
        size -= _TILE_DATA_SIZE
    state = bytearray(xstate[:size] + _MAGIC_2)
    _SOFTWARE.pack_into(state, _SOFTWARE_AT, _MAGIC_1, len(state), offered, size)
    return bytes(state)


X86_64 = Architecture(
    general_size=_GENERAL.size,
    extended_note=NT_X86_XSTATE,
    red_zone=128,
    system_call_code=bytes.fromhex("0f05 c3"),  # syscall; ret
    restore_codes=(
        bytes.fromhex("48c7c00f000000 0f05"),  # mov $15, %rax; syscall
        bytes.fromhex("b80f000000 0f05"),  # mov $15, %eax; syscall
    ),
    numbers={"close": 3, "ioctl": 16, "madvise": 28, "openat": 257, "userfaultfd": 323},
    stack_pointer=_stack_pointer,
    result=_result,
    undisturbed=_undisturbed,
    frame=_frame,
    calling=_calling,
)
