"""What systemd/adopt-qemu.conf grants is needed to adopt another user's QEMU, and is enough."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kernel.rights import CAP_SYS_PTRACE
from tests.support import LIMIT, ROOT
from tests.system.unit_files import SERVICE, allowed_calls, values
from tests.vmm.test_qemu import FITTING, qemu

DROP_IN = ROOT / "systemd" / "adopt-qemu.conf"

ADOPT = """
import asyncio, sys
from postcopyd.vmm.adoption import AdoptionRefused
from postcopyd.vmm.qemu import adopt_qemu
from tests.kernel.rights import drop_rights, keep_only

async def adopt():
    vmm = await adopt_qemu(sys.argv[1])
    await vmm.advise()
    print(vmm.description, len(vmm.memory.blocks))
    await vmm.failed("only tried")
    vmm.close()

keep_only({capability}) if {capability} else drop_rights()
try:
    asyncio.run(adopt())
except AdoptionRefused as error:
    sys.exit(str(error))
"""


def adopt_as_nobody(monitor: Path, capability: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ADOPT.format(capability=capability), str(monitor)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.parametrize("kind", ["plain memory", "a memory file", "two nodes"])
def test_the_right_to_trace_is_enough(kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        with qemu(directory, *FITTING[kind], "-incoming", "defer") as waiting:
            waiting.monitor.chmod(0o666)
            before = waiting.state()
            done = adopt_as_nobody(waiting.monitor, CAP_SYS_PTRACE)
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("QEMU 7.2")
            waiting.wait_for_state(before)


def test_without_it_the_refusal_says_what_to_do() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        with qemu(directory, "-m", "64M", "-incoming", "defer") as waiting:
            waiting.monitor.chmod(0o666)
            before = waiting.state()
            done = adopt_as_nobody(waiting.monitor, 0)
            assert done.returncode == 1
            assert "CAP_SYS_PTRACE" in done.stderr
            assert "Traceback" not in done.stderr
            waiting.wait_for_state(before)


def test_the_drop_in_grants_that_right_and_the_calls() -> None:
    assert values(DROP_IN, "CapabilityBoundingSet") == ["CAP_SYS_PTRACE"]
    assert values(DROP_IN, "AmbientCapabilities") == ["CAP_SYS_PTRACE"]
    (more,) = values(DROP_IN, "SystemCallFilter")
    granted = allowed_calls() | set(more.split())
    needed = {"ptrace", "waitid", "process_vm_readv", "process_vm_writev", "pidfd_getfd"}
    assert needed <= granted
    assert not needed <= allowed_calls()
    assert values(SERVICE, "User") == ["postcopyd"]
    assert os.access(DROP_IN, os.R_OK)
