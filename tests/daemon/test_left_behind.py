"""What a predecessor has left of a migration and nobody can go on from is held, and reported."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from io import StringIO

import msgspec
import pytest

from postcopyd.daemon.entry import EntryFacts
from postcopyd.daemon.logging import configured
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.incoming.journal import Journal, MigrationRecord, VmmRecord
from postcopyd.kernel.userfaultfd import Userfaultfd
from tests.daemon.hosted import Hosted, held
from tests.support import LIMIT


class Kept:
    """A keeper that remembers whether it was told to let go of everything."""

    def __init__(self) -> None:
        self.forgotten = False

    def keep(self, name: str, descriptor: int) -> None:
        pass

    def release(self, name: str) -> None:
        pass

    def forget(self) -> None:
        self.forgotten = True

    async def settled(self) -> None:
        pass


def listener() -> int:
    return socket.create_server(("127.0.0.1", 0)).detach()


def file_of(content: bytes) -> int:
    descriptor = os.memfd_create("left")
    os.write(descriptor, content)
    return descriptor


def journal(**fields: object) -> int:
    descriptor = Journal.create()
    writing = Journal(os.dup(descriptor))
    writing.write(MigrationRecord(state="running", **fields))  # type: ignore[arg-type]
    writing.close()
    return descriptor


def userfaultfd() -> int:
    with Userfaultfd.open() as opened:
        return os.dup(opened.fileno())


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def facts(*allowed: str) -> int:
    return file_of(msgspec.json.encode(EntryFacts(allowed)))


VMM = VmmRecord("no such kind", msgspec.Raw(b"{}"), (), (), False)
UNREADABLE: dict[str, tuple[dict[str, Callable[[], int]], str]] = {
    "no listener": (
        {"vmm-userfaultfd": userfaultfd, "entry": facts, "journal": journal},
        "was not kept",
    ),
    "a pipe for a listener": ({"listener": pipe, "entry": facts, "journal": journal}, "socket"),
    "a socket that does not listen": (
        {"listener": lambda: socket.socket().detach(), "entry": facts, "journal": journal},
        "does not listen",
    ),
    "a file for a handoff socket": (
        {
            "listener": listener,
            "handoff": lambda: file_of(b""),
            "entry": facts,
            "journal": journal,
        },
        "socket",
    ),
    "no facts": ({"listener": listener, "journal": journal}, "was not kept"),
    "facts of another kind": (
        {"listener": listener, "entry": lambda: file_of(b"{}"), "journal": journal},
        "readable",
    ),
    "a name where nobody shows one any more": (
        {"listener": listener, "entry": lambda: facts("node7"), "journal": journal},
        "none can be allowed by name",
    ),
    "no journal in its journal": (
        {"listener": listener, "entry": facts, "journal": lambda: file_of(b"postcopyd")},
        "size",
    ),
    "a vmm of no known kind": (
        {
            "listener": listener,
            "entry": facts,
            "journal": lambda: journal(vmm=VMM, loaded_at=1.0),
            "vmm-userfaultfd": userfaultfd,
        },
        "no such kind",
    ),
    "no userfaultfd in its place": (
        {
            "listener": listener,
            "entry": facts,
            "journal": lambda: journal(vmm=VMM, loaded_at=1.0),
            "vmm-userfaultfd": lambda: file_of(b""),
        },
        "is none",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
async def test_it_is_held_under_its_name_and_the_log_says_why(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    left, reason = UNREADABLE[case]
    before = held()
    kept = Kept()
    monkeypatch.setattr(hosted.registry, "_keeper", lambda name: kept)
    with configured("info", "json", stream=(log := StringIO())):
        hosted.registry.restore("vm0", {name: make() for name, make in left.items()})
    assert reason in log.getvalue()
    assert not kept.forgotten, "the guest would read zeros"
    with pytest.raises(RegistryError) as refused:
        hosted.registry.create("vm0")
    assert refused.value.code == "name-taken"
    with pytest.raises(RegistryError) as refused:
        await hosted.registry.abandon("vm0", force=True)
    assert refused.value.code == "unreadable"
    assert hosted.registry.create("vm1").state.value == "none"
    await hosted.registry.remove("vm1", force=True)
    assert not held() - before


async def test_it_is_shown_as_a_migration_is(hosted: Hosted) -> None:
    hosted.registry.restore("vm0", {"listener": listener(), "journal": journal()})
    (it,) = hosted.registry.held
    assert hosted.registry.find("vm0") is it
    assert it.view().keys() == hosted.registry.create("vm1").view().keys()
    assert (it.view()["state"], it.view()["failure"]) == (
        "unreadable",
        "what its source must show was not kept",
    )
    await hosted.registry.remove("vm1", force=True)


async def test_it_is_let_go_of_only_by_force(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr(hosted.registry, "_keeper", lambda name: kept)
    hosted.registry.restore("vm0", {"listener": listener(), "journal": journal()})
    (it,) = hosted.registry.held
    waiting = asyncio.create_task(it.wait(None))
    with pytest.raises(RegistryError) as refused:
        hosted.registry.release(it, force=False)
    assert refused.value.code == "past-the-package"
    await it.wait(0.001)
    assert not (waiting.done() or kept.forgotten)
    hosted.registry.release(it, force=True)
    assert kept.forgotten
    assert it.view()["state"] == "failed"
    assert it.view()["guest_lost"]
    async with asyncio.timeout(LIMIT):
        await waiting
    assert not hosted.registry.held


async def test_a_mistake_of_ours_with_one_is_not_the_end_of_the_others(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(estate: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr("postcopyd.daemon.left_behind.inherited_facts", broken)
    with configured("info", "json", stream=(log := StringIO())):
        hosted.registry.restore(
            "vm0", {"listener": listener(), "entry": facts(), "journal": journal()}
        )
    assert "ZeroDivisionError: a mistake of ours" in log.getvalue()


async def test_what_never_had_a_vmm_is_let_go_of(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr(hosted.registry, "_keeper", lambda name: kept)
    hosted.registry.restore("vm0", {"journal": Journal.create()})
    assert kept.forgotten
    hosted.registry.create("vm0")
