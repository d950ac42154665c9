"""Why a process cannot be adopted, and what to do: in words for the operator."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CAP_SYS_PTRACE = 1 << 19
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class AdoptionRefused(Exception):
    """The process cannot be adopted; the text says what is wrong and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check(pid: int) -> None:
    """Refuse what can be told without touching the process.

    :raise AdoptionRefused: if it does not exist, has exited, is traced, or is not fit for it.
    """
    status = _status(pid)
    if status is None:
        raise AdoptionRefused(f"there is no process {pid}")
    if status["Tgid"] != str(pid):
        raise AdoptionRefused(
            f"{pid} is a thread of process {status['Tgid']}: name the process instead"
        )
    if status["State"][0] in "ZX":
        raise AdoptionRefused(f"process {pid} has exited")
    if (tracer := status["TracerPid"]) != "0":
        raise AdoptionRefused(_traced(pid, tracer))
    if "VmSize" not in status:
        raise AdoptionRefused(f"process {pid} is a part of the kernel")
    if "shstk" in status.get("x86_Thread_features", "").split():
        raise AdoptionRefused(
            f"process {pid} has a shadow stack, which lets no system call be run in it: start it "
            "without one (glibc: GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)"
        )


def why(pid: int, error: OSError) -> str:
    """Return the reason that an error met on the way is told as."""
    status = _status(pid)
    if isinstance(error, ProcessLookupError) or status is None or status["State"][0] in "ZX":
        if "SIGSYS" in str(error):
            return f"process {pid} was ended by its seccomp filter: allow userfaultfd(2) there"
        return f"process {pid} has exited while being adopted"
    if isinstance(error, PermissionError):
        return _not_permitted(pid, status)
    if isinstance(error, TimeoutError):
        return f"{error}: it waits for a device, or gets one signal after another; try again"
    return str(error.strerror or error)


def _traced(pid: int, tracer: str) -> str:
    return (
        f"process {pid} is traced by process {tracer} (a debugger, strace): "
        "a process has one tracer only, so end that one"
    )


def _not_permitted(pid: int, status: dict[str, str]) -> str:
    if (tracer := status["TracerPid"]) != "0":
        return _traced(pid, tracer)
    refused = f"tracing process {pid} is not permitted"
    try:
        scope = _YAMA.read_text().strip()
    except FileNotFoundError:
        scope = "0"  # a kernel without Yama
    if scope == "3":
        return f"{refused}: kernel.yama.ptrace_scope is 3, which forbids it until the next reboot"
    ours = _status(os.getpid()) or {}
    if int(ours.get("CapEff", "0"), 16) & _CAP_SYS_PTRACE:
        return (
            f"{refused}, though we have CAP_SYS_PTRACE: it is in another user namespace, or a "
            "security module (AppArmor, SELinux) forbids it"
        )
    remedy = "run postcopyd as root or with CAP_SYS_PTRACE"
    if len({*status["Uid"].split(), *ours["Uid"].split()}) > 1:
        owner, us = status["Uid"].split()[0], ours["Uid"].split()[0]
        return f"{refused}: it belongs to user {owner}, and we are user {us}: {remedy}"
    if scope != "0":
        return (
            f"{refused}: kernel.yama.ptrace_scope is {scope}, and we have no CAP_SYS_PTRACE: "
            f"{remedy}, or set kernel.yama.ptrace_scope=0"
        )
    return (
        f"{refused}: it has rights that we have not, or its memory is protected (not dumpable): "
        f"{remedy}"
    )


def _status(pid: int) -> dict[str, str] | None:
    """Return /proc/PID/status, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.MULTILINE))
