"""The daemon does its whole job within what its unit file leaves it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import DEVICE_STATE, Image, assert_sent, running_guest
from tests.support import LIMIT, ROOT
from tests.system.unit_files import SERVICE, allowed_calls, call_numbers, values


def status_of(daemon: RunningDaemon) -> dict[str, str]:
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return {
        name: value.strip()
        for name, _, value in (line.partition(":") for line in text.splitlines())
    }


def test_a_migration_needs_no_more_than_the_unit_allows(tmp_path: Path) -> None:
    assert values(SERVICE, "CapabilityBoundingSet") == [""]
    assert values(SERVICE, "MemoryDenyWriteExecute") == ["yes"]
    assert values(SERVICE, "SystemCallErrorNumber") == ["EPERM"]
    numbers = call_numbers()
    calls = ",".join(str(numbers[name]) for name in sorted(allowed_calls()) if name in numbers)
    confined = (sys.executable, str(ROOT / "tests/system/confined.py"), calls)
    image = Image(tmp_path / "image", seed=4)
    # LimitMEMLOCK=infinity is a right of who starts the service, which not everybody has.
    assert "mlockall" in allowed_calls()
    with running_daemon(tmp_path, "memory_lock = false\n", wrapper=confined) as daemon:
        status = status_of(daemon)
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        with running_guest(daemon, "vm0", "memory-file") as guest:
            assert_sent(image.start_sending(guest.says()["listen"][0]))
            assert guest.says() == {"complete": True, "changed": 0}
            assert guest.process.wait(LIMIT) == 0
        assert guest.memory() == image.memory
        assert guest.device_state() == DEVICE_STATE
        assert daemon.client.wait("vm0", LIMIT)["state"] == "end"
        assert {finding["key"] for finding in daemon.client.check()["findings"]} >= {"copy"}
        daemon.terminate()
        assert daemon.ended() == 0
        assert "Traceback" not in daemon.log
        assert "the network cannot be watched" not in daemon.log
