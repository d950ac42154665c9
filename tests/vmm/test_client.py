"""The client through whole migrations, in a process of its own, served by the test's engine."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopyd.incoming.vmm import DeviceLoad
from postcopyd.kernel import memory_file, processes
from postcopyd.vmm.native import NativeVmm
from tests.vmm import client_process
from tests.vmm.client_process import NOBODY, Child, Plan, running
from tests.vmm.handoffs import LIMIT, Handoffs, listening
from tests.vmm.page_source import PageSource

HUGE = 2 << 20


async def serve(vmm: NativeVmm, device_state: bytes = b"state") -> PageSource:
    """Take `vmm` to where it runs."""
    await vmm.advise()
    for block in vmm.memory.blocks:
        if block.memory_file is not None:
            memory_file.punch_hole(block.memory_file, block.file_offset, block.length)
    await vmm.discard()
    source = PageSource(vmm)
    source.listen()
    vmm.listening()
    await vmm.run(DeviceLoad(b"", device_state, (), asyncio.Event(), print, print))
    return source


async def whole_migration(handoffs: Handoffs, child: Child) -> dict[str, object]:
    """Migrate into `child` and check what every VMM must see; return what else it saw."""
    seen = await child.said()
    assert seen["listen"] == ("tcp:127.0.0.1:40123",)
    vmm = await handoffs.native_vmm()
    serving = asyncio.create_task(serve(vmm))
    loading = await child.said()
    assert loading["state"] == b"state"
    assert loading["balloon"] == (True,)
    source = await asyncio.wait_for(serving, LIMIT)
    wrong_pages = await child.said()
    assert wrong_pages == []
    source.place_everything()
    source.finish()
    await vmm.complete(0)
    done = await child.said()
    assert done["completed"]
    assert done["balloon"] == (True, False)
    assert await child.said() == [True, True], "a descriptor is left, or memory has changed"
    await asyncio.wait_for(vmm.gone(), LIMIT)
    return {"faults": source.faults, "loading": loading, "done": done, "seen": seen}


@pytest.mark.parametrize("kind", ["anonymous", "memory-file", "at"])
async def test_a_vmm_reads_right_pages_only_from_before_the_first_has_come(
    handoffs: Handoffs, kind: str
) -> None:
    plan = Plan(kind)
    with running(client_process.migrate, handoffs.path, plan) as child:
        seen = await whole_migration(handoffs, child)
    assert seen["faults"] == plan.pages, "what was in the memory before was still there"


@pytest.mark.parametrize("kind", ["anonymous", "memory-file"])
async def test_huge_pages_are_served_whole(
    handoffs: Handoffs, kind: str, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(4)
    plan = Plan(kind, pages=2, page_size=HUGE)
    with running(client_process.migrate, handoffs.path, plan) as child:
        seen = await whole_migration(handoffs, child)
    assert seen["faults"] == 2


async def test_huge_pages_do_not_form_while_pages_come_and_may_afterwards(
    handoffs: Handoffs,
) -> None:
    with running(client_process.migrate, handoffs.path, Plan()) as child:
        seen = await whole_migration(handoffs, child)
    loading, done = seen["loading"], seen["done"]
    assert isinstance(loading, dict)
    assert isinstance(done, dict)
    assert loading["flags"] & {"nh", "hg"} == {"nh"}
    assert done["flags"] & {"nh", "hg"} == {"hg"}
    assert "dc" in loading["flags"], "a child process would inherit the memory"


@pytest.mark.parametrize("locked", [True, False])
async def test_memory_locks_are_put_aside_and_come_back(handoffs: Handoffs, locked: bool) -> None:
    with running(client_process.migrate, handoffs.path, Plan(locked=locked)) as child:
        seen = await whole_migration(handoffs, child)
    loading, done = seen["loading"], seen["done"]
    assert isinstance(loading, dict)
    assert isinstance(done, dict)
    assert loading["locked"] == 0
    assert (done["locked"] > 0) == locked


async def test_without_rights_the_client_has_a_userfaultfd_for_user_mode_and_says_so() -> None:
    unprivileged_allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() == "1\n"
    # Not tmp_path: nobody else may look into that.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        users = [NOBODY if os.geteuid() == 0 else os.geteuid()]
        async with listening(Path(directory, "handoff.sock"), users=users) as handoffs:
            plan = Plan(unprivileged=True)
            with running(client_process.migrate, handoffs.path, plan) as child:
                seen = await whole_migration(handoffs, child)
    opened = seen["seen"]
    assert isinstance(opened, dict)
    assert opened["user_mode_only"] is not unprivileged_allowed


async def test_no_userfaultfd_at_all_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "nobody-listens"
    with running(client_process.open_without_descriptors, path, Plan()) as child:
        assert "Raise the limit of open files" in await child.said()


@pytest.mark.parametrize("how", ["failed", "gone"])
async def test_memory_hangs_when_the_migration_fails_until_the_vmm_gives_it_up(
    handoffs: Handoffs, how: str
) -> None:
    with running(client_process.run_and_fail, handoffs.path, Plan()) as child:
        vmm = await handoffs.native_vmm()
        source = await asyncio.wait_for(serve(vmm), LIMIT)
        source.stop()
        if how == "failed":
            await vmm.failed("the source has gone")
        vmm.close()
        expected = "the source has gone" if how == "failed" else "closed the connection"
        assert expected in await child.said()
        assert await child.said() == {"waits": True, "waiting": 1}
        assert await child.said() == {"waits": False, "zeros": True}


@pytest.mark.parametrize("moment", ["registered", "advised", "running"])
async def test_a_vmm_that_is_killed_at_any_moment_is_gone(handoffs: Handoffs, moment: str) -> None:
    with running(client_process.migrate, handoffs.path, Plan()) as child:
        vmm = await handoffs.native_vmm()
        source = None
        if moment == "advised":
            await vmm.advise()
        elif moment == "running":
            source = await asyncio.wait_for(serve(vmm), LIMIT)
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGKILL)
        await asyncio.wait_for(vmm.gone(), LIMIT)
        if source is not None:
            source.stop()


async def test_a_vmm_is_gone_with_its_process_even_if_somebody_holds_its_socket(
    handoffs: Handoffs,
) -> None:
    with running(client_process.migrate, handoffs.path, Plan(pages=1)) as child:
        vmm = await handoffs.native_vmm()
        assert child.process.pid is not None
        pidfd = os.pidfd_open(child.process.pid)
        held = [
            processes.pidfd_getfd(pidfd, int(descriptor))
            for descriptor in os.listdir(f"/proc/{child.process.pid}/fd")
            if is_socket(child.process.pid, descriptor)
        ]
        child.process.kill()
        await asyncio.wait_for(vmm.gone(), LIMIT)
        for descriptor in [*held, pidfd]:
            os.close(descriptor)


def is_socket(pid: int, descriptor: str) -> bool:
    return os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("socket:")
