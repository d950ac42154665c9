"""Which QEMUs are adopted and which are refused, and that either leaves them as they were."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.wire import stream_writer
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.interop.qemu_versions import PROGRAMS, QemuVersion
from tests.support import LIMIT, wait_until

PAGE = 4096
VERSIONS: list[QemuVersion] = ["7.2", "10.0"]
MEMORY = ("-m", "64M", "-machine", "q35,memory-backend=m0")
SHARED_FILE = "memory-backend-file,id=m0,size=64M,share=on,mem-path"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    # In a process of its own, as always: the parent of a process must not be its tracer.
    with running_daemon(
        tmp_path_factory.mktemp("daemon"), 'listen = "tcp:127.0.0.1:0"\n'
    ) as daemon:
        yield daemon


@dataclass
class Waiting:
    """A QEMU that was started with some options, with a monitor for us and one for postcopyd."""

    process: subprocess.Popen[bytes]
    monitor: Path
    _ours: socket.socket

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command."""
        request = {"execute": command, "arguments": arguments}
        self._ours.sendall(json.dumps(request).encode())
        while True:
            answer = json.loads(self._line())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = self._ours.recv(1)
            assert byte, "QEMU has ended"
            line += byte
        return line

    def begin(self) -> None:
        """Begin our own session."""
        self._line()
        self.execute("qmp_capabilities")

    def state(self) -> tuple[str, list[str], str]:
        """What adoption may not change: its status, its descriptors, what its memory is like."""
        descriptors = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                descriptors.append(os.readlink(entry))
        flags = Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines()
        return (
            self.execute("query-status")["status"],
            sorted(descriptors),
            "\n".join(line for line in flags if line.startswith("VmFlags")),
        )

    def wait_for_state(self, expected: tuple[str, list[str], str]) -> None:
        """Return when it is so: QEMU notices a little later that its client has gone."""
        wait_until(lambda: self.state() == expected)


@contextlib.contextmanager
def qemu(directory: Path, *options: str, version: QemuVersion = "7.2") -> Iterator[Waiting]:
    program = PROGRAMS[version]
    ours, theirs = socket.socketpair()
    monitor = directory / "qmp"
    command = [program.path, *program.arguments, "-nodefaults", "-display", "none", *options]
    command += ["-chardev", f"socket,id=ours,fd={theirs.fileno()}", "-mon", "ours,mode=control"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    process = subprocess.Popen(
        command,
        env=os.environ | program.environment,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    ours.settimeout(LIMIT)
    try:
        with ours:
            waiting = Waiting(process, monitor, ours)
            waiting.begin()
            yield waiting
    finally:
        process.kill()
        process.wait(LIMIT)


def adopt(daemon: RunningDaemon, waiting: Waiting) -> dict[str, Any]:
    return daemon.client.receive_qemu(str(waiting.monitor), name="vm0")


FITTING = {
    "plain memory": ("-m", "64M"),
    "memory of a backend": (*MEMORY, "-object", "memory-backend-ram,id=m0,size=64M"),
    "a memory file": (*MEMORY, "-object", "memory-backend-memfd,id=m0,size=64M,share=on"),
    "a file in /dev/shm": (
        *MEMORY,
        "-object",
        f"{SHARED_FILE}=/dev/shm/postcopyd-test-{os.getpid()}",
    ),
    "two nodes": (
        *("-m", "64M", "-numa", "node,memdev=n0", "-numa", "node,memdev=n1"),
        *("-object", "memory-backend-ram,id=n0,size=32M"),
        *("-object", "memory-backend-memfd,id=n1,size=32M,share=on"),
    ),
    "above 4 GiB": ("-m", "5G"),
    "an old machine": ("-m", "64M", "-machine", "pc-i440fx-3.1"),
}


@pytest.mark.parametrize("options", FITTING.values(), ids=FITTING.keys())
@pytest.mark.parametrize("version", VERSIONS)
def test_a_qemu_that_waits_is_adopted_and_given_back_as_it_was(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion, options: tuple[str, ...]
) -> None:
    if version == "10.0":
        options = tuple("pc-i440fx-5.2" if word == "pc-i440fx-3.1" else word for word in options)
    with qemu(tmp_path, *options, "-incoming", "defer", version=version) as waiting:
        before = waiting.state()
        for _ in range(2):
            migration = adopt(daemon, waiting)
            assert migration["state"] == "none"
            assert migration["vmm"].startswith(f"QEMU {version}")
            assert migration["vmm"].endswith(f"pid {waiting.process.pid}")
            watched = [block for block in migration["blocks"] if block["watched"]]
            assert sum(block["length"] for block in watched) >= 64 << 20
            daemon.client.cancel("vm0")
            daemon.client.wait("vm0", LIMIT)
            daemon.client.cancel("vm0")
            waiting.wait_for_state(before)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_qemu_is_given_back_as_it_was_by_the_successor_of_who_has_prepared_it(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion
) -> None:
    options = ("-m", "64M", "-machine", "q35", "-incoming", "defer")
    with qemu(tmp_path, *options, version=version) as waiting:
        before = waiting.state()
        listen = adopt(daemon, waiting)["listen"][0]
        with socket.create_connection(("127.0.0.1", int(listen.rpartition(":")[2]))) as source:
            source.sendall(
                stream_writer.configuration(f"pc-q35-{version}")
                + stream_writer.open_return_path()
                + stream_writer.advise(PAGE, PAGE)
            )
            wait_until(lambda: waiting.state()[2] != before[2])
            wait_until(lambda: len(waiting.state()[1]) > len(before[1]) + 1)
            daemon.kill_worker()
        wait_until(lambda: daemon.client.show("vm0")["state"] == "none")
        daemon.client.cancel("vm0")
        daemon.client.wait("vm0", LIMIT)
        daemon.client.cancel("vm0")
        waiting.wait_for_state(before)


REFUSED = {
    "running": (("-m", "64M"), "its status is 'running': start it with -incoming defer"),
    "paused": (("-m", "64M", "-S"), "its status is 'prelaunch': start it with -incoming defer"),
    "with a channel of its own": (
        ("-m", "64M", "-incoming", "tcp:127.0.0.1:0"),
        "start it with -incoming defer",
    ),
    "private file": (
        (*MEMORY, "-object", "memory-backend-file,id=m0,size=64M,mem-path={file}"),
        "'m0' is private memory of the file",
    ),
    "file on a disk": (
        (*MEMORY, "-object", f"{SHARED_FILE}={{file}}"),
        "which is not memory: use memory-backend-memfd,share=on",
    ),
    "locked memory": (("-m", "64M", "-overcommit", "mem-lock=on"), "mem-lock=off"),
    "virtio-mem": (
        (
            *("-m", "64M,maxmem=1G,slots=1"),
            *("-object", "memory-backend-memfd,id=v0,size=128M,share=on"),
            *("-device", "virtio-mem-pci,memdev=v0,id=vm0"),
        ),
        "virtio-mem",
    ),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("version", VERSIONS)
def test_a_qemu_that_cannot_be_filled_is_refused_with_what_to_change(
    daemon: RunningDaemon,
    tmp_path: Path,
    version: QemuVersion,
    options: tuple[str, ...],
    reason: str,
) -> None:
    file = Path(__file__).parent / f".memory-{os.getpid()}"  # not on a tmpfs
    waits = () if "status" in reason or "-incoming" in options else ("-incoming", "defer")
    words = [word.replace("{file}", str(file)) for word in options]
    try:
        with qemu(tmp_path, *words, *waits, version=version) as waiting:
            before = waiting.state()
            with pytest.raises(ControlError) as refusal:
                adopt(daemon, waiting)
            assert reason in str(refusal.value)
            waiting.wait_for_state(before)
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("capability", ["multifd", "x-ignore-shared", "postcopy-preempt"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_capability_that_spoils_the_feed_is_refused_by_name(
    daemon: RunningDaemon, tmp_path: Path, version: QemuVersion, capability: str
) -> None:
    with qemu(tmp_path, "-m", "64M", "-incoming", "defer", version=version) as waiting:
        names = ["postcopy-ram", capability] if "postcopy" in capability else [capability]
        states = [{"capability": name, "state": True} for name in names]
        waiting.execute("migrate-set-capabilities", capabilities=states)
        with pytest.raises(ControlError, match=f"capability {capability} on: .*; switch it off"):
            adopt(daemon, waiting)


def test_a_monitor_whose_socket_another_process_made_is_refused(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "made by us"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-incoming", "defer"]
        command += ["-chardev", f"socket,id=m,fd={listener.fileno()},server=on,wait=off"]
        process = subprocess.Popen(
            [*command, "-mon", "m,mode=control"],
            pass_fds=[listener.fileno()],
        )
        try:
            with pytest.raises(ControlError, match=f"made by process {os.getpid()}"):
                daemon.client.receive_qemu(str(path), name="vm0")
        finally:
            process.kill()
            process.wait(LIMIT)
