"""What QEMU's human monitor prints: recorded from 7.2.22 and 10.0.2, and what is not known."""

from __future__ import annotations

import pytest

from postcopyd.vmm.qemu_texts import (
    ListedBlock,
    MappedPart,
    UnknownText,
    parse_blocks,
    parse_guest_memory,
    parse_host_address,
)

BLOCKS_7_2 = """\
              Block Name    PSize              Offset               Used              Total
                      m0    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
   0000:00:01.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000
"""

BLOCKS_10_0 = """\
              Block Name    PSize              Offset               Used              Total\
                HVA  RO
                      m0    1 GiB  0x0000000000000000 0x0000000040000000 0x0000000040000000\
 0x00007f8f83fff000  rw
    /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000\
 0x00007f8f82000000  ro
"""

# Every line ends in a carriage return and a newline.

TREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-000000000fffffff (prio 0, ram): not this one

FlatView #2
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): n0 KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom KVM
  0000000000100000-000000003fffffff (prio 0, ram): n0 @0000000000100000 KVM
  0000000040000000-000000007fffffff (prio 0, ram): a name
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000017fffffff (prio -1, ram): a name @0000000040000000

FlatView #3
 AS "mch", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""


def test_blocks_of_7_2_have_no_addresses() -> None:
    assert parse_blocks(BLOCKS_7_2.replace("\n", "\r\n")) == [
        ListedBlock("m0", 2 << 20, 64 << 20, 64 << 20, None),
        ListedBlock("0000:00:01.0/vga.vram", 4096, 16 << 20, 16 << 20, None),
        ListedBlock("/rom@etc/acpi/tables", 4096, 0x20000, 0x200000, None),
    ]


def test_blocks_of_10_0_have_addresses() -> None:
    assert parse_blocks(BLOCKS_10_0.replace("\n", "\r\n")) == [
        ListedBlock("m0", 1 << 30, 1 << 30, 1 << 30, 0x7F8F83FFF000),
        ListedBlock("/rom@etc/acpi/tables", 4096, 0x20000, 0x200000, 0x7F8F82000000),
    ]


def test_a_block_without_a_name_never_migrates() -> None:
    nameless = " " * 24 + "    4 KiB  0x0000000000000000 0x0000000000001000 0x0000000000001000\n"
    assert parse_blocks("heading\n" + nameless) == []


def test_a_block_that_reads_otherwise_is_not_passed_over() -> None:
    with pytest.raises(UnknownText, match="'m0 4096 bytes'"):
        parse_blocks("heading\n   m0 4096 bytes\n")


def test_the_guest_sees_a_block_in_parts() -> None:
    assert parse_guest_memory(TREE.replace("\n", "\r\n")) == [
        MappedPart("n0", 0, 0),
        MappedPart("n0", 0x100000, 0x100000),
        MappedPart("a name", 0x40000000, 0),
        MappedPart("a name", 0x100000000, 0x40000000),
    ]


def test_guest_memory_must_be_there() -> None:
    with pytest.raises(UnknownText, match="memory"):
        parse_guest_memory(TREE.replace('AS "memory"', 'AS "storage"'))


def test_an_address() -> None:
    text = "Host virtual address for 0x0 (pc.ram) is 0x7fa5e7e00000\r\n"
    assert parse_host_address(text) == 0x7FA5E7E00000
    with pytest.raises(UnknownText, match="No memory is mapped at address 0x7"):
        parse_host_address("No memory is mapped at address 0x7\r\n")
