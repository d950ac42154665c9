"""`postcopyctl list|show|create|wait|cancel` against a real daemon."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.certificates import Authority, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import LENGTH, PAGE, Source, Vmm
from tests.support import LIMIT, ROOT, wait_until


class Ctl:
    """Runs postcopyctl as a user does."""

    def __init__(self, control: Path) -> None:
        self._environment = {**os.environ, "POSTCOPYD_CONTROL": str(control)}

    def __call__(self, *words: str, status: int = 0) -> str:
        """Run a command that ends with `status`; return what it prints, be it an error."""
        done = subprocess.run(
            [sys.executable, "-m", "postcopyd.cli.postcopyctl", *words],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if status == 0:
            assert done.stderr == ""
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def ctl(daemon: RunningDaemon) -> Iterator[Ctl]:
    """The command; afterwards the daemon has forgotten every migration."""
    yield Ctl(daemon.control)
    for migration in daemon.client.list():
        if migration["state"] not in ("end", "abandoned", "failed"):
            daemon.client.cancel(migration["name"], force=True)
        daemon.client.cancel(migration["name"])


@contextmanager
def guest_that_lives_here(daemon: RunningDaemon, name: str) -> Iterator[tuple[Vmm, Source]]:
    """A migration whose package has come, and a guest that runs."""
    vmm = Vmm(daemon.handoff, name)
    source = Source(vmm.destination.listen[0])

    async def send() -> None:
        await source.begin()
        await source.send_package()

    asyncio.run(send())
    vmm.destination.wait_for_device_state(LIMIT)
    vmm.destination.loaded()
    yield vmm, source
    source.close()
    asyncio.run(vmm.leave())


@pytest.fixture
def tls_ctl(tmp_path: Path) -> Iterator[Ctl]:
    """The command, with a daemon that takes TLS alone."""
    authority = Authority(tmp_path / "authority")
    settings = tls_settings(authority, authority.issue("server"))
    (tmp_path / "daemon").mkdir()
    with running_daemon(tmp_path / "daemon", f'plain_tcp = "never"\n{settings}') as daemon:
        yield Ctl(daemon.control)


# -- what people read --------------------------------------------------------------------------


def test_an_empty_list_says_how_to_begin(ctl: Ctl) -> None:
    assert "postcopyctl create NAME" in ctl("list")


def test_the_list_has_a_line_for_each(ctl: Ctl, daemon: RunningDaemon) -> None:
    listen = daemon.client.create("vm0")["listen"][0]
    with guest_that_lives_here(daemon, "vm1"):
        title, *lines = ctl("list").splitlines()
        assert title.split() == ["NAME", "STATE", "RECEIVED", "FAULTS", "VMM", "SOURCE"]
        cells = [re.split("  +", line.strip()) for line in lines]
        assert cells[0] == [
            *("vm0", "none", "0 B of 0 B", "0", "(waited for)", f"(waited for at {listen})")
        ]
        assert cells[1][:4] == ["vm1", "running", "0 B of 64.0 KiB", "0"]
        assert cells[1][4].startswith(f"pid {os.getpid()}, uid ")
        assert cells[1][5].startswith("127.0.0.1:")
        assert len(cells) == 2


def test_a_migration_over_tls_says_so_and_whom_it_takes(tls_ctl: Ctl) -> None:
    created = tls_ctl("create", "vm0", "--allow-source", "*.example.org", "--allow-source", "CN=a")
    assert "and asks it for a certificate (TLS)" in created
    lines = [line.split(None, 1) for line in tls_ctl("show", "vm0").splitlines()]
    assert ["security", "TLS"] in [[word.rstrip() for word in line] for line in lines]
    shown = json.loads(tls_ctl("show", "--json", "vm0"))
    assert shown["security"] == "tls"
    assert shown["allowed_sources"] == ["*.example.org", "CN=a"]


def test_an_address_that_is_not_secure_is_refused_with_what_to_do(ctl: Ctl) -> None:
    told = ctl("create", "vm0", "--listen", "tcp:0.0.0.0:0", status=3)
    assert "plain TCP is not allowed there" in told
    assert "set up [tls] in the configuration" in told


def test_show_tells_of_vmm_source_and_blocks(ctl: Ctl, daemon: RunningDaemon) -> None:
    with guest_that_lives_here(daemon, "vm1") as (vmm, _):
        shown = ctl("show", "vm1")
    facts = dict(line.split(None, 1) for line in shown.splitlines() if line.strip())
    assert facts["state"].rstrip() == "running"
    assert facts["VMM"].startswith(f"pid {os.getpid()}, uid ")
    assert facts["listens"].rstrip() == f"on    {vmm.destination.listen[0]}"
    assert facts["BLOCK"].split() == ["LENGTH", "PAGE", "SIZE", "PAGES", "RECEIVED"]
    assert facts["pc.ram"].split() == ["64.0", "KiB", "4.00", "KiB", str(LENGTH // PAGE), "0"]


def test_create_says_where_source_and_vmm_are_waited_for(ctl: Ctl, tmp_path: Path) -> None:
    output = ctl("create", "vm0", "--listen", f"unix:{tmp_path}/s", "--handoff", f"{tmp_path}/h")
    assert output == (
        f"vm0 waits for its source at unix:{tmp_path}/s\nand for its VMM at {tmp_path}/h\n"
    )
    assert (tmp_path / "s").is_socket() and (tmp_path / "h").is_socket()


def test_a_name_cannot_act_on_the_terminal(ctl: Ctl) -> None:
    error = ctl("show", "\x1b[2J", status=3)
    assert "\x1b" not in error


# -- how commands end --------------------------------------------------------------------------


def test_waiting_for_what_ends_well_is_0(ctl: Ctl, daemon: RunningDaemon) -> None:
    with guest_that_lives_here(daemon, "vm0") as (vmm, source):
        asyncio.run(source.finish())
        vmm.destination.wait_for_completion(LIMIT)
        asyncio.run(source.hear_the_end())
        source.close()
        assert ctl("wait", "vm0") == "vm0: all memory is here\n"


def test_waiting_for_what_fails_is_1_and_tells_why(ctl: Ctl) -> None:
    ctl("create", "vm0")
    assert ctl("cancel", "vm0") == "vm0 has ended, in state failed\n"
    assert ctl("wait", "vm0", status=1) == (
        "postcopyctl: vm0 has failed: cancelled by an operator\n"
    )


def test_waiting_too_long_is_1_and_says_where_it_stands(ctl: Ctl) -> None:
    ctl("create", "vm0")
    assert ctl("wait", "vm0", "--timeout", "0.1", status=1) == (
        "postcopyctl: vm0 is still under way, in state none\n"
    )


@pytest.mark.parametrize("command", ["show", "wait", "cancel", "abandon"])
def test_a_migration_that_is_not_there_is_3(ctl: Ctl, command: str) -> None:
    assert ctl(command, "absent", status=3) == (
        "postcopyctl: there is no migration 'absent'\n"
        "  postcopyctl list shows those that there are\n"
    )


def test_a_guest_that_lives_here_is_cancelled_only_with_force(
    ctl: Ctl, daemon: RunningDaemon
) -> None:
    with guest_that_lives_here(daemon, "vm0"):
        error = ctl("cancel", "vm0", status=3)
        assert "cancelling loses the guest" in error and "force" in error
        assert ctl("cancel", "vm0", "--force") == "vm0 has ended, in state failed\n"


def test_what_the_daemon_refuses_is_3(ctl: Ctl) -> None:
    ctl("create", "vm0")
    assert "choose another name" in ctl("create", "vm0", status=3)
    assert "is a name; to listen takes" in ctl("create", "a", "--listen", "tcp:x.org:1", status=3)
    assert "is not a name for a migration" in ctl("create", "a b", status=3)


def test_what_never_came_can_be_given_up_and_is_listed(
    ctl: Ctl, daemon: RunningDaemon, tmp_path: Path
) -> None:
    with guest_that_lives_here(daemon, "vm0") as (vmm, source):
        refused = ctl("abandon", "vm0", status=3)
        assert "is running, with its source at 127.0.0.1" in refused
        source.close()
        wait_until(lambda: daemon.client.show("vm0")["state"] == "paused")
        told = ctl("abandon", "vm0")
        first, second = told.splitlines()
        assert first == ("vm0 is abandoned: 64.0 KiB in 1 range never came, and are memory errors")
        vmm.destination.wait_for_completion(LIMIT)
        assert vmm.destination.missing == LENGTH
    path = Path(second.removeprefix("They are listed in "))
    assert path.parent == daemon.directory / "records"
    listed = json.loads(path.read_text())
    assert listed["missing"] == [{"block": "pc.ram", "offset": 0, "length": LENGTH}]
    assert (listed["name"], listed["length"]) == ("vm0", LENGTH)
    assert "64.0 KiB in 1 range never came" in ctl("show", "vm0")
    assert "was abandoned" in ctl("wait", "vm0", status=1)
    assert daemon.client.show("vm0")["missing"] == listed["missing"]
    assert "has ended" in ctl("abandon", "vm0", status=3)


def test_a_list_that_cannot_be_written_is_told_of_until_it_is(
    ctl: Ctl, daemon: RunningDaemon
) -> None:
    in_its_way = daemon.directory / "records" / "unlisted.unfinished"
    in_its_way.mkdir()
    with guest_that_lives_here(daemon, "unlisted") as (vmm, source):
        source.close()
        wait_until(lambda: daemon.client.show("unlisted")["state"] == "paused")
        told = ctl("abandon", "unlisted", status=1)
        assert told.startswith("unlisted is abandoned: 64.0 KiB in 1 range never came")
        not_written = "the list of what is missing is not written: "
        assert f"{not_written}{in_its_way}: Is a directory; tried again" in told
        vmm.destination.wait_for_completion(LIMIT)
    assert "not listed" in ctl("show", "unlisted")
    assert not_written in ctl("wait", "unlisted", status=1)
    assert "to give the list up" in ctl("cancel", "unlisted", status=3)
    in_its_way.rmdir()
    wait_until(lambda: daemon.client.show("unlisted")["missing_list"])
    assert not_written not in ctl("wait", "unlisted", status=1)


# -- what programs read ------------------------------------------------------------------------


def test_json_is_what_the_control_api_says(ctl: Ctl, daemon: RunningDaemon) -> None:
    created = json.loads(ctl("create", "vm0", "--json"))
    assert created == json.loads(ctl("show", "vm0", "--json")) == daemon.client.show("vm0")
    del created["missing"]
    assert json.loads(ctl("list", "--json")) == [created]
    assert json.loads(ctl("cancel", "vm0", "--json"))["state"] == "failed"
    waited = ctl("wait", "vm0", "--json", status=1)
    assert json.loads(waited[: waited.index("postcopyctl: ")])["state"] == "failed"
