"""The layouts of registers and signal frames: offsets as the kernel's headers have them."""

from __future__ import annotations

import errno
import struct

import pytest

from postcopyd.kernel.registers import Architecture, Gadgets, ThreadState
from postcopyd.kernel.registers_aarch64 import AARCH64
from postcopyd.kernel.registers_x86_64 import X86_64

GADGETS = Gadgets(system_call=0x1000, restore=0x2000)
MASK = 0x4000_0000_0000_0001
BELOW = 0x7FFF_0000_1238
NO_SYSTEM_CALL = (1 << 64) - 1

# struct user_regs_struct of asm/user_64.h, in words.
X86_R15, X86_R10, X86_RAX, X86_RDX, X86_RSI, X86_RDI, X86_ORIG_RAX = 0, 7, 10, 12, 13, 14, 15
X86_RIP, X86_CS, X86_EFLAGS, X86_RSP, X86_SS = 16, 17, 18, 19, 20
X86_WORDS = 27

# struct rt_sigframe of asm/sigframe.h; struct ucontext begins at 8, struct sigcontext_64 at 48.
X86_FRAME_RETURN = 0
X86_FRAME_FLAGS = 8
X86_FRAME_STACK_FLAGS = 32
X86_FRAME_R8 = 48
X86_FRAME_R15 = 104
X86_FRAME_RDI = 112
X86_FRAME_RAX = 152
X86_FRAME_RSP = 168
X86_FRAME_RIP = 176
X86_FRAME_EFLAGS = 184
X86_FRAME_CS = 192
X86_FRAME_SS = 198
X86_FRAME_EXTENDED = 232
X86_FRAME_MASK = 304

# struct user_pt_regs of asm/ptrace.h: x0 to x30, sp, pc, pstate.
ARM_X8, ARM_X30, ARM_SP, ARM_PC, ARM_PSTATE, ARM_WORDS = 8, 30, 31, 32, 33, 34

# struct rt_sigframe of arch/arm64/kernel/signal.c: struct siginfo of 128 bytes, struct ucontext,
# in it struct sigcontext at 176, and in that the records at 288.
ARM_FRAME_SIZE = 4688
ARM_FRAME_STACK_FLAGS = 128 + 24
ARM_FRAME_MASK = 128 + 40
ARM_FRAME_X0 = 128 + 176 + 8
ARM_FRAME_SP = ARM_FRAME_X0 + 31 * 8
ARM_FRAME_RECORDS = 128 + 176 + 288


def words(general: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(general) // 8}Q", general))


def packed(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def word(data: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<Q", data, offset)[0]
    return value


def half_word(data: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<I", data, offset)[0]
    return value


# -- x86-64 --------------------------------------------------------------------------------------


def x86_general(**changes: int) -> bytes:
    values = [0x100 + number for number in range(X86_WORDS)]
    values[X86_ORIG_RAX] = NO_SYSTEM_CALL
    for name, value in changes.items():
        values[globals()[f"X86_{name.upper()}"]] = value & NO_SYSTEM_CALL
    return packed(values)


def x86_extended(size: int = 2696, offered: int = 0x2E7, present: int = 0x3) -> bytes:
    """NT_X86_XSTATE: the features that the kernel has at 464, those in use at 512."""
    state = bytearray(n % 251 for n in range(size))
    struct.pack_into("<QQQQQQ", state, 464, offered, 0, 0, 0, 0, 0)
    struct.pack_into("<Q", state, 512, present)
    return bytes(state)


def x86_frame(general: bytes, extended: bytes = x86_extended()) -> tuple[int, bytes]:
    return X86_64.frame(ThreadState(general, extended, MASK), BELOW, GADGETS.restore)


def test_x86_registers_of_a_call() -> None:
    general = x86_general(rax=-514, orig_rax=35)
    calling = words(X86_64.calling(general, GADGETS, 0x5000, 323, (7, 8, 9, 10)))
    assert [calling[place] for place in (X86_RDI, X86_RSI, X86_RDX, X86_R10)] == [7, 8, 9, 10]
    assert calling[X86_RAX] == 323
    assert calling[X86_RIP] == GADGETS.system_call
    assert calling[X86_RSP] == 0x5000
    assert calling[X86_ORIG_RAX] == NO_SYSTEM_CALL
    changed = {X86_RDI, X86_RSI, X86_RDX, X86_R10, X86_RAX, X86_RIP, X86_RSP, X86_ORIG_RAX}
    before = words(general)
    assert all(calling[n] == before[n] for n in range(X86_WORDS) if n not in changed)


def test_x86_frame_holds_the_registers() -> None:
    address, frame = x86_frame(x86_general())
    assert word(frame, X86_FRAME_RETURN) == GADGETS.restore
    assert word(frame, X86_FRAME_FLAGS) == 7
    assert word(frame, X86_FRAME_R15) == 0x100 + X86_R15
    assert word(frame, X86_FRAME_RDI) == 0x100 + X86_RDI
    assert word(frame, X86_FRAME_RAX) == 0x100 + X86_RAX
    assert word(frame, X86_FRAME_RSP) == 0x100 + X86_RSP
    assert word(frame, X86_FRAME_RIP) == 0x100 + X86_RIP
    assert word(frame, X86_FRAME_EFLAGS) == 0x100 + X86_EFLAGS
    assert struct.unpack_from("<H", frame, X86_FRAME_CS) == (0x100 + X86_CS,)
    assert struct.unpack_from("<H", frame, X86_FRAME_SS) == (0x100 + X86_SS,)
    assert word(frame, X86_FRAME_MASK) == MASK
    assert half_word(frame, X86_FRAME_STACK_FLAGS) == 3, "no mode of an alternate stack"
    assert address % 16 == 8
    assert BELOW - 80 < address + len(frame) <= BELOW


def test_x86_frame_holds_the_extended_state_as_the_kernel_wants_it() -> None:
    extended = x86_extended()
    address, frame = x86_frame(x86_general(), extended)
    place = word(frame, X86_FRAME_EXTENDED)
    assert place % 64 == 0
    state = frame[place - address :]
    assert state[:464] == extended[:464]
    # struct _fpx_sw_bytes of asm/sigcontext.h, and the second magic word behind the state.
    assert struct.unpack_from("<IIQI", state, 464) == (0x46505853, 2700, 0x2E7, 2696)
    assert state[512:2696] == extended[512:]
    assert state[2696:] == struct.pack("<I", 0x46505845)


def test_x86_tile_data_that_are_not_in_use_are_left_out() -> None:
    # The kernel takes no more than the process has asked for, else it restores SSE only.
    offered = 0x602E7
    _, with_tiles = x86_frame(x86_general(), x86_extended(11008, offered, 0x40003))
    assert struct.unpack_from("<QI", with_tiles, with_tiles.index(b"SXPF") + 8) == (offered, 11008)
    _, without = x86_frame(x86_general(), x86_extended(11008, offered, 0x3))
    assert struct.unpack_from("<QI", without, without.index(b"SXPF") + 8) == (0x202E7, 2816)
    assert without.endswith(b"EXPF")


@pytest.mark.parametrize("result", [-512, -513, -514])
def test_x86_frame_begins_an_interrupted_system_call_anew(result: int) -> None:
    _, frame = x86_frame(x86_general(rax=result, orig_rax=271, rip=0x1002))
    assert word(frame, X86_FRAME_RIP) == 0x1000
    assert word(frame, X86_FRAME_RAX) == 271


def test_x86_frame_ends_a_system_call_whose_progress_is_lost() -> None:
    _, frame = x86_frame(x86_general(rax=-516, orig_rax=35, rip=0x1002))
    assert word(frame, X86_FRAME_RIP) == 0x1002
    assert word(frame, X86_FRAME_RAX) == (1 << 64) - errno.EINTR


def test_x86_frame_leaves_alone_what_only_looks_like_a_restart() -> None:
    _, frame = x86_frame(x86_general(rax=-514, rip=0x1002))
    assert word(frame, X86_FRAME_RIP) == 0x1002
    assert word(frame, X86_FRAME_RAX) == NO_SYSTEM_CALL - 513


@pytest.mark.parametrize(
    ("number", "arguments", "restarts"),
    [
        (232, {"r10": 0xFFFF_FFFF}, True),  # epoll_wait, without a time-out
        (232, {"r10": 1000}, False),
        (281, {"r10": -1}, True),  # epoll_pwait
        (441, {"r10": 0}, True),  # epoll_pwait2
        (441, {"r10": 0x1000}, False),
        (128, {"rdx": 0}, True),  # rt_sigtimedwait
        (220, {"r10": 0x1000}, False),  # semtimedop
        (65, {}, True),  # semop
        (0, {"r10": -1}, False),  # read
    ],
)
def test_x86_waits_that_every_stop_ends_are_begun_anew(
    number: int, arguments: dict[str, int], restarts: bool
) -> None:
    general = x86_general(rax=-errno.EINTR, orig_rax=number, **arguments)
    expected = x86_general(rax=-514, orig_rax=number, **arguments) if restarts else general
    assert X86_64.undisturbed(general) == expected
    done = x86_general(rax=1, orig_rax=number, **arguments)
    assert X86_64.undisturbed(done) == done


# -- aarch64 -------------------------------------------------------------------------------------


def arm_general() -> bytes:
    values = [0x100 + number for number in range(ARM_WORDS)]
    values[ARM_PSTATE] = 0x6000_0C00
    return packed(values)


def arm_frame() -> tuple[int, bytes]:
    # struct user_fpsimd_state of asm/ptrace.h: 32 vectors, fpsr, fpcr, padding.
    extended = bytes(range(256)) * 2 + struct.pack("<IIQ", 0x11, 0x22, 0)
    return AARCH64.frame(ThreadState(arm_general(), extended, MASK), BELOW, GADGETS.restore)


def test_aarch64_registers_of_a_call() -> None:
    calling = words(AARCH64.calling(arm_general(), GADGETS, 0x5000, 282, (7, 8)))
    assert calling[:3] == [7, 8, 0x102]
    assert calling[ARM_X8] == 282
    assert calling[ARM_X30] == GADGETS.restore
    assert calling[ARM_SP] == 0x5000
    assert calling[ARM_PC] == GADGETS.system_call
    assert calling[ARM_PSTATE] == 0x6000_0000, "without the type of a branch"


def test_aarch64_frame_holds_the_registers() -> None:
    address, frame = arm_frame()
    assert len(frame) == ARM_FRAME_SIZE
    assert address % 16 == 0
    assert BELOW - 16 < address + len(frame) <= BELOW
    assert half_word(frame, ARM_FRAME_STACK_FLAGS) == 3, "no mode of an alternate stack"
    assert word(frame, ARM_FRAME_MASK) == MASK
    assert frame[ARM_FRAME_X0 : ARM_FRAME_X0 + 34 * 8] == arm_general()
    assert word(frame, ARM_FRAME_SP) == 0x100 + ARM_SP


def test_aarch64_frame_holds_the_vectors() -> None:
    _, frame = arm_frame()
    # struct fpsimd_context of asm/sigcontext.h: magic, size, fpsr, fpcr, 32 vectors; zeros end it.
    record = frame[ARM_FRAME_RECORDS:]
    assert struct.unpack_from("<IIII", record) == (0x46508001, 528, 0x11, 0x22)
    assert record[16:528] == bytes(range(256)) * 2
    assert record[528:536] == bytes(8)


# -- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "size", "place", "stack"),
    [(X86_64, 216, X86_RAX, X86_RSP), (AARCH64, 272, 0, ARM_SP)],
)
def test_results_are_signed(architecture: Architecture, size: int, place: int, stack: int) -> None:
    values = [0] * (size // 8)
    assert architecture.general_size == size
    for result in (0, 5, -errno.EPERM):
        values[place] = result & NO_SYSTEM_CALL
        assert architecture.result(packed(values)) == result
    values[stack] = BELOW
    assert architecture.stack_pointer(packed(values)) == BELOW
