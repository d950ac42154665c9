"""The numbers, against the kernel's own header and against how the header makes them."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from postcopyd.kernel import userfaultfd, userfaultfd_abi, userfaultfd_open
from postcopyd.kernel.userfaultfd_abi import Feature, Operation, RegisterMode


def number_of(direction: int, size: int, number: int) -> int:
    """As _IOC of asm-generic/ioctl.h: 1 = _IOW, 2 = _IOR, 3 = _IOWR."""
    return direction << 30 | size << 16 | 0xAA << 8 | number


def ioctl_numbers() -> dict[str, int]:
    return {
        "UFFDIO_" + name.removeprefix("_IOC_"): value
        for name, value in vars(userfaultfd).items()
        if name.startswith("_IOC_")
    }


def test_ioctl_numbers_are_made_of_direction_size_and_number() -> None:
    # The sizes of the structs, by their fields of 8 bytes.
    assert ioctl_numbers() == {
        "UFFDIO_API": number_of(3, 3 * 8, 0x3F),
        "UFFDIO_REGISTER": number_of(3, 4 * 8, 0x00),
        "UFFDIO_UNREGISTER": number_of(2, 2 * 8, 0x01),
        "UFFDIO_WAKE": number_of(2, 2 * 8, 0x02),
        "UFFDIO_COPY": number_of(3, 5 * 8, 0x03),
        "UFFDIO_ZEROPAGE": number_of(3, 4 * 8, 0x04),
        "UFFDIO_MOVE": number_of(3, 5 * 8, 0x05),
        "UFFDIO_WRITEPROTECT": number_of(3, 3 * 8, 0x06),
        "UFFDIO_CONTINUE": number_of(3, 4 * 8, 0x07),
        "UFFDIO_POISON": number_of(3, 4 * 8, 0x08),
    }


def test_numbers_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    """What this machine's header is too old for is left to the test above."""
    ours = ioctl_numbers()
    ours |= {f"UFFD_FEATURE_{feature.name}": feature.value for feature in Feature}
    ours |= {
        "UFFDIO_REGISTER_MODE_MISSING": RegisterMode.MISSING,
        "UFFDIO_REGISTER_MODE_WP": RegisterMode.WRITE_PROTECT,
        "UFFDIO_REGISTER_MODE_MINOR": RegisterMode.MINOR,
        "UFFD_PAGEFAULT_FLAG_WRITE": userfaultfd_abi.PAGEFAULT_WRITE,
        "UFFD_PAGEFAULT_FLAG_WP": userfaultfd_abi.PAGEFAULT_WRITE_PROTECT,
        "UFFD_PAGEFAULT_FLAG_MINOR": userfaultfd_abi.PAGEFAULT_MINOR,
        "UFFDIO_COPY_MODE_DONTWAKE": userfaultfd_abi.MODE_DONT_WAKE,
        "UFFDIO_ZEROPAGE_MODE_DONTWAKE": userfaultfd_abi.MODE_DONT_WAKE,
        "UFFDIO_CONTINUE_MODE_DONTWAKE": userfaultfd_abi.MODE_DONT_WAKE,
        "UFFDIO_POISON_MODE_DONTWAKE": userfaultfd_abi.MODE_DONT_WAKE,
        "UFFDIO_MOVE_MODE_DONTWAKE": userfaultfd_abi.MODE_DONT_WAKE,
        "UFFDIO_COPY_MODE_WP": userfaultfd_abi.MODE_WRITE_PROTECT,
        "UFFDIO_CONTINUE_MODE_WP": userfaultfd_abi.MODE_WRITE_PROTECT,
        "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES": userfaultfd_abi.MODE_ALLOW_HOLES,
        "UFFD_API": userfaultfd._API,
        "UFFD_USER_MODE_ONLY": userfaultfd_open._USER_MODE_ONLY,
        "USERFAULTFD_IOC_NEW": userfaultfd_open._DEVICE_IOC_NEW,
        "SYS_userfaultfd": userfaultfd_open._SYSTEM_CALL[platform.machine()],
    }
    ours |= {
        f"UFFD_EVENT_{name}": getattr(userfaultfd_abi, f"EVENT_{name}")
        for name in ("PAGEFAULT", "FORK", "REMAP", "REMOVE", "UNMAP")
    }
    ours |= {f"_UFFDIO_{operation.name}": operation.bit_length() - 1 for operation in Operation}
    headers = ("linux/userfaultfd.h", "stdio.h", "sys/ioctl.h", "sys/syscall.h")
    program = "".join(f"#include <{header}>\n" for header in headers)
    program += "int main(void) {\n" + "".join(
        f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long)({name}));\n#endif\n'
        for name in ours
    )
    (tmp_path / "numbers.c").write_text(program + "}\n")
    subprocess.run(["gcc", "-o", "numbers", "numbers.c"], cwd=tmp_path, check=True, timeout=60)
    printed = subprocess.run(
        ["./numbers"], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True
    )
    theirs = {name: int(value) for name, value in map(str.split, printed.stdout.splitlines())}
    assert theirs == {name: ours[name] for name in theirs}
    assert len(theirs) >= 40


def test_a_set_of_features_is_as_new_as_its_newest() -> None:
    assert Feature.EVENT_REMOVE.since == "4.11"
    assert (Feature.EVENT_REMOVE | Feature.EXACT_ADDRESS | Feature.THREAD_ID).since == "5.18"
    assert Feature(0).since == "4.3"
    assert all(feature.since != "4.3" for feature in Feature)
