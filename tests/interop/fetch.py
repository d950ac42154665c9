"""Fetch what the interop tests need beside installed packages: QEMU 10.0 and a guest's kernel.

Run as ``python -m tests.interop.fetch``; it is quick when all is there already. Everything goes
below the user's cache directory and the machine itself stays as it is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.interop import linux_guest, qemu_versions
from tests.interop.debian_archive import (
    BACKPORTS,
    ArchiveError,
    DebianArchive,
    made_whole,
    unpack,
)

_KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"


def fetch_qemu(archive: DebianArchive) -> None:
    """Unpack QEMU 10.0 of the backports, and the libraries that it needs and are missing here."""
    packages = archive.download(f"qemu-system-x86/{BACKPORTS}")
    with made_whole(qemu_versions.UNPACKED) as directory:
        unpack(packages, directory)


def fetch_kernel(archive: DebianArchive) -> None:
    """Unpack Debian's kernel for virtual machines: the kernel itself, none of its modules."""
    package = archive.real_package(_KERNEL_PACKAGE)
    archive.apt("apt-get", "download", package)
    with made_whole(linux_guest.KERNEL_DIRECTORY) as directory:
        unpack(list(archive.directory.glob("linux-image-*.deb")), directory, only="boot/vmlinuz-")


def main() -> None:
    missing: list[Callable[[DebianArchive], None]] = []
    if not qemu_versions.works("10.0"):
        missing.append(fetch_qemu)
    if not linux_guest.has_kernel():
        missing.append(fetch_kernel)
    if not missing:
        return
    print("fetching from Debian's archive: QEMU 10.0 and a kernel for the tests' guest")
    try:
        with tempfile.TemporaryDirectory(prefix="postcopyd-apt.") as directory:
            archive = DebianArchive(Path(directory))
            archive.update()
            for fetch in missing:
                fetch(archive)
    except (ArchiveError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"could not fetch what the tests need: {error}")


if __name__ == "__main__":
    main()
