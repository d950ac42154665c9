"""What the unit files say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support import LIMIT, ROOT

SERVICE = ROOT / "systemd" / "postcopyd.service"
SOCKET = ROOT / "systemd" / "postcopyd.socket"
SYSUSERS = ROOT / "systemd" / "postcopyd.sysusers"


def values(unit: Path, directive: str) -> list[str]:
    """Return what a directive is set to, each time that it is set."""
    return re.findall(rf"^{directive}=(.*)$", unit.read_text(), re.MULTILINE)


def allowed_calls() -> frozenset[str]:
    """Return the names of the system calls that the service may make."""
    allowed: set[str] = set()
    for value in values(SERVICE, "SystemCallFilter"):
        names = _expand(value.removeprefix("~").split())
        allowed = allowed - names if value.startswith("~") else allowed | names
    return frozenset(allowed)


def call_numbers() -> dict[str, int]:
    """Return the numbers of this machine's system calls, by name."""
    done = subprocess.run(
        ["gcc", "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", "/dev/null"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    found = re.findall(r"^#define __NR_(\w+) (\d+)$", done.stdout, re.MULTILINE)
    return {name: int(number) for name, number in found}


def _expand(names: list[str]) -> set[str]:
    """Return the system calls that these names and sets (@...) stand for."""
    calls: set[str] = set()
    for name in names:
        if name.startswith("@"):
            done = subprocess.run(
                ["systemd-analyze", "syscall-filter", name],
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=True,
            )
            lines = [line.strip() for line in done.stdout.splitlines()[1:]]
            calls |= _expand([line for line in lines if line and not line.startswith("#")])
        else:
            calls.add(name)
    return calls
