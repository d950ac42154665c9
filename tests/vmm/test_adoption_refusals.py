"""Processes that cannot be adopted: what they are told of, and that nothing is left in them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from postcopyd.kernel import injection
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from postcopyd.vmm import adoption_refusals
from postcopyd.vmm.adoption import AdoptionRefused, adopt
from tests.kernel.target import Target, status
from tests.kernel.test_processes import NO_SUCH_PROCESS
from tests.support import LIMIT, ROOT, run_python, wait_readable, wait_until

WANTED = Feature.THREAD_ID


@pytest.fixture(autouse=True)
def nothing_left(assert_nothing_left: None) -> None:
    """Every test here."""


def refusal(pid: int) -> str:
    with pytest.raises(AdoptionRefused) as refused:
        adopt(pid, WANTED)
    assert str(refused.value) == refused.value.reason
    return refused.value.reason


# -- who it is ----------------------------------------------------------------------------------


def test_no_process() -> None:
    assert refusal(NO_SUCH_PROCESS) == f"there is no process {NO_SUCH_PROCESS}"


def test_a_zombie() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: status(process.pid)["State"].startswith("Z"))
        assert refusal(process.pid) == f"process {process.pid} has exited"


def test_a_thread() -> None:
    with Target("threads") as target:
        thread = max(int(entry.name) for entry in Path(f"/proc/{target.pid}/task").iterdir())
        assert f"{thread} is a thread of process {target.pid}: " in refusal(thread)


def test_a_part_of_the_kernel() -> None:
    kthreadd = 2
    if Path(f"/proc/{kthreadd}/comm").read_text() == "kthreadd\n":
        assert refusal(kthreadd) == "process 2 is a part of the kernel"


def test_a_process_that_is_traced_names_the_tracer() -> None:
    code = (
        "import sys; from postcopyd.kernel import ptrace; "
        "ptrace.seize(int(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    with (
        Target("read") as target,
        subprocess.Popen(
            [sys.executable, "-c", code, str(target.pid)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as tracer,
    ):
        assert tracer.stdout is not None
        wait_readable(tracer.stdout.fileno())
        assert f"is traced by process {tracer.pid} " in refusal(target.pid)
        tracer.communicate(timeout=LIMIT)


def test_a_process_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "STOP_LIMIT", 0.1)
    with Target("vfork") as target:
        assert "has not stopped in 0.1 s: it waits for a device, " in refusal(target.pid)
        assert target.end() == "back"


def test_a_shadow_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    with Target("read") as target:
        facts = status(target.pid) | {"x86_Thread_features": "shstk wrss"}
        monkeypatch.setattr(adoption_refusals, "_status", lambda pid: facts)
        assert "has a shadow stack" in refusal(target.pid)


@pytest.mark.parametrize("step", ["seized", "stopped", "registers set", "left", "detached"])
def test_a_process_that_exits_meanwhile(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with Target("read") as target:

        def kill(done: str) -> None:
            if done == step:
                os.kill(target.pid, signal.SIGKILL)

        monkeypatch.setattr(injection, "at_step", kill)
        if step == "detached":
            process = adopt(target.pid, WANTED)
            wait_readable(process.pidfd)
            process.close()
        else:
            assert refusal(target.pid) == f"process {target.pid} has exited while being adopted"


AS_NOBODY = """
import sys
from postcopyd.kernel.userfaultfd import Feature
from postcopyd.vmm.adoption import AdoptionRefused, adopt
from tests.kernel.rights import drop_rights
drop_rights()
try:
    adopt(int(sys.argv[1]), Feature(0))
except AdoptionRefused as error:
    print(error)
"""


def test_a_process_of_another_user() -> None:
    with Target("read") as target:
        assert run_python(AS_NOBODY, str(target.pid)).strip() == (
            f"tracing process {target.pid} is not permitted: it belongs to user 0, and we are "
            "user 65534: run postcopyd as root or with CAP_SYS_PTRACE"
        )
        assert target.end().startswith("0 -")


@pytest.mark.parametrize(
    ("scope", "nobody", "expected"),
    [
        ("1", True, r"ptrace_scope is 1, .* set kernel\.yama\.ptrace_scope=0"),
        ("0", True, r"it has rights that we have not, .*: run postcopyd as root"),
        ("3", False, r"ptrace_scope is 3, which forbids it until the next reboot"),
        ("0", False, r"though we have CAP_SYS_PTRACE: .* \(AppArmor, SELinux\) forbids it"),
    ],
)
def test_what_is_not_permitted_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: str, nobody: bool, expected: str
) -> None:
    yama = tmp_path / "ptrace_scope"
    yama.write_text(f"{scope}\n")
    monkeypatch.setattr(adoption_refusals, "_YAMA", yama)
    real = adoption_refusals._status

    def with_or_without_rights(pid: int) -> dict[str, str] | None:
        found = real(pid)
        return found | {"CapEff": "0"} if found is not None and nobody else found

    monkeypatch.setattr(adoption_refusals, "_status", with_or_without_rights)
    with Target("read") as target:
        refused = PermissionError(errno.EPERM, "Operation not permitted")
        assert re.search(expected, adoption_refusals.why(target.pid, refused))


# -- no userfaultfd to be had -------------------------------------------------------------------


def test_a_process_that_may_not_have_one_is_refused_with_what_to_do() -> None:
    with Target("without rights") as target:
        fields, before = target.fields(), target.descriptors()
        assert refusal(target.pid) == (
            f"process {target.pid} cannot open a userfaultfd: "
            "userfaultfd(2): Operation not permitted; /dev/userfaultfd: Permission denied. "
            "Give the user of the process access to /dev/userfaultfd, or set "
            "sysctl vm.unprivileged_userfaultfd=1; if a seccomp filter forbids it, "
            "allow userfaultfd there"
        )
        target.wait_for_fields(fields)
        assert target.descriptors() == before
        assert target.end() == "back"


def test_a_filter_that_kills_is_named() -> None:
    with Target("filtered, kill") as target:
        assert "was ended by its seccomp filter" in refusal(target.pid)


def test_a_copy_that_cannot_be_taken_is_closed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Userfaultfd, wanted: Feature) -> Feature:
        raise OSError(errno.EINVAL, "no handshake today")

    monkeypatch.setattr(Userfaultfd, "handshake", refuse)
    with Target("read") as target:
        before = target.descriptors()
        assert refusal(target.pid) == "no handshake today"
        assert target.descriptors() == before
        assert target.end().startswith("0 -")
