"""The QEMUs that the tests run: Debian 12's own, and 10.0 of its backports unpacked beside it."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

QemuVersion = Literal["7.2", "10.0"]

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postcopyd"
UNPACKED: Final = CACHE / "qemu-10.0"
"""Where tests/interop/fetch.py unpacks QEMU 10.0."""

COMMON_MACHINE: Final = "pc-q35-7.2"
"""A machine type that both versions have."""


@dataclass(frozen=True)
class Program:
    """How one version of QEMU is run."""

    path: str
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


_LIBRARIES: Final = UNPACKED / "usr" / "lib" / "x86_64-linux-gnu"
_SHARED: Final = UNPACKED / "usr" / "share"

# An unpacked QEMU would look for its firmware and its modules where the installed one has its own.
PROGRAMS: Final[dict[QemuVersion, Program]] = {
    "7.2": Program("qemu-system-x86_64"),
    "10.0": Program(
        str(UNPACKED / "usr" / "bin" / "qemu-system-x86_64"),
        ["-L", str(_SHARED / "qemu"), "-L", str(_SHARED / "seabios")],
        {"LD_LIBRARY_PATH": str(_LIBRARIES), "QEMU_MODULE_DIR": str(_LIBRARIES / "qemu")},
    ),
}


def works(version: QemuVersion) -> bool:
    """Whether this version is here and starts."""
    program = PROGRAMS[version]
    try:
        printed = subprocess.run(
            [program.path, *program.arguments, "--version"],
            env=os.environ | program.environment,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except OSError:
        return False
    return re.match(rf"QEMU emulator version {re.escape(version)}\.", printed) is not None
