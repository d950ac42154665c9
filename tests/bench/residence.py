"""How much memory the daemon itself takes: idle, and for each migration that waits in it."""

from __future__ import annotations

from contextlib import ExitStack

from postcopyd.kernel.memory import Mapping
from postcopyd.vmm.client import Block, Destination
from tests.daemon.daemon_process import RunningDaemon

_MIGRATIONS = 16
_LENGTH = 256 << 20


def resident_memory(daemon: RunningDaemon) -> dict[str, float]:
    """Return MiB: `idle`, and `per_migration` with a VMM of 256 MiB in it."""
    idle = daemon.memory("VmRSS")
    with ExitStack() as stack:
        for number in range(_MIGRATIONS):
            memory = stack.enter_context(Mapping.anonymous(_LENGTH))
            block = Block.at("pc.ram", memory.address, memory.length)
            stack.enter_context(Destination(str(daemon.handoff), f"vm{number}", [block]))
        held = daemon.memory("VmRSS")
    return {"idle": idle / 2**20, "per_migration": (held - idle) / _MIGRATIONS / 2**20}
