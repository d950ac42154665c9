"""Migrations by name: created, paired with VMMs, listed, forgotten."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

from postcopyd.daemon.logging import configured
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.vmm.client import MigrationFailed
from tests.daemon.hosted import LENGTH, PAGE, Hosted, Source, closed, held
from tests.support import LIMIT
from tests.vmm.firecracker_stand_in import FirecrackerStandIn


def refused(code: str) -> pytest.RaisesExc[RegistryError]:
    return pytest.raises(RegistryError, check=lambda error: error.code == code)


# -- creating ----------------------------------------------------------------------------------


async def test_a_migration_listens_from_its_creation_on(hosted: Hosted) -> None:
    entry = hosted.registry.create("vm0")
    (listen,) = entry.listen
    assert listen.startswith("tcp:127.0.0.1:") and not listen.endswith(":0")
    assert entry.view()["state"] == "none"
    assert entry.view()["listen"] == (listen,)
    Source(listen).close()
    assert list(hosted.registry) == [hosted.registry.get("vm0")] == [entry]


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "../x", "a\n"])
async def test_a_name_that_is_not_legal_creates_nothing(hosted: Hosted, name: str) -> None:
    before = held()
    with refused("invalid-name"):
        hosted.registry.create(name)
    assert held() == before
    assert list(hosted.registry) == []


@pytest.mark.parametrize("name", ["a", "x" * 64, "vm-0_1.2"])
async def test_a_legal_name_is_taken(hosted: Hosted, name: str) -> None:
    assert hosted.registry.create(name).name == name


async def test_a_name_is_given_once(hosted: Hosted) -> None:
    hosted.registry.create("vm0")
    before = held()
    with refused("name-taken"):
        hosted.registry.create("vm0")
    assert held() == before


async def test_no_more_than_the_limit_are_under_way(hosted: Hosted) -> None:
    for name in "abc":
        hosted.registry.create(name)
    before = held()
    with refused("too-many-migrations"):
        hosted.registry.create("d")
    assert held() == before
    await hosted.registry.remove("a", force=False)
    hosted.registry.create("d")


async def test_an_address_that_is_taken_leaves_nothing_behind(
    hosted: Hosted, tmp_path: Path
) -> None:
    (listen,) = hosted.registry.create("a").listen
    before = held()
    with refused("address-unusable"):
        hosted.registry.create("b", listen)
    with refused("address-unusable"):
        hosted.registry.create("b", f"unix:{tmp_path}/s", handoff=str(hosted.handoff))
    with refused("invalid-address"):
        hosted.registry.create("b", "nonsense")
    assert held() == before
    assert not (tmp_path / "s").exists()


async def test_what_cannot_be_created_for_want_of_descriptors_leaves_nothing_open(
    hosted: Hosted,
) -> None:
    before = held()
    for spare in range(LIMIT_OF_ONE):
        with only_so_many_descriptors(spare):
            try:
                hosted.registry.create("vm0")
            except RegistryError as error:
                refusal = error.code
            else:
                break
        assert refusal == "out-of-resources"
        assert held() == before
    assert spare > 3  # it has needed several, each of which was once the one too many
    assert [entry.name for entry in hosted.registry] == ["vm0"]


LIMIT_OF_ONE = 20
"""More descriptors than a migration opens that waits for its VMM and its source."""


@contextmanager
def only_so_many_descriptors(number: int) -> Iterator[None]:
    """Let this process open so many more descriptors, and then no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(number + 1)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- VMMs --------------------------------------------------------------------------------------


async def test_a_vmm_with_a_new_name_creates_its_migration(hosted: Hosted) -> None:
    vmm = await hosted.vmm("vm0")
    entry = hosted.registry.get("vm0")
    assert vmm.destination.listen == entry.listen
    assert entry.view()["vmm"].startswith("pid ")
    await vmm.leave()
    await hosted.reach(entry, "failed")


async def test_a_vmm_finds_the_migration_that_waits_for_it(hosted: Hosted, tmp_path: Path) -> None:
    entry = hosted.registry.create("vm0", f"unix:{tmp_path}/stream")
    assert entry.waits_for_vmm
    vmm = await hosted.vmm("vm0")
    assert vmm.destination.listen == entry.listen
    assert not entry.waits_for_vmm
    await vmm.leave()


async def test_a_vmm_may_say_where_its_source_is_waited_for(hosted: Hosted, tmp_path: Path) -> None:
    vmm = await hosted.vmm("vm0", f"unix:{tmp_path}/stream")
    assert vmm.destination.listen == (f"unix:{tmp_path}/stream",)
    await vmm.leave()
    await hosted.registry.get("vm0").wait(LIMIT)
    assert not (tmp_path / "stream").exists()


async def test_a_second_vmm_of_a_name_is_refused(hosted: Hosted) -> None:
    vmm = await hosted.vmm("vm0")
    before = held()
    with pytest.raises(MigrationFailed, match="'vm0' already has a VMM: pid"):
        await hosted.vmm("vm0")
    assert held() == before
    assert not hosted.registry.get("vm0").state.ended
    await vmm.leave()


@pytest.mark.parametrize(
    ("name", "listen", "reason"),
    [
        ("a b", None, "'a b' is not a name for a migration"),
        ("vm0", "tcp:example.org:1", "'example.org' is a name"),
        ("vm0", "unix:/no/such/directory/s", "cannot listen on /no/such"),
        ("known", "tcp:127.0.0.1:1", "'known' listens on tcp:127.0.0.1:[0-9]+ already"),
    ],
)
async def test_a_vmm_that_asks_for_what_cannot_be_is_told_so(
    hosted: Hosted, name: str, listen: str | None, reason: str
) -> None:
    hosted.registry.create("known")
    before = held()
    with pytest.raises(MigrationFailed, match=reason):
        await hosted.vmm(name, listen)
    assert held() == before
    assert [entry.name for entry in hosted.registry] == ["known"]


async def test_a_name_that_has_ended_can_be_used_again(hosted: Hosted) -> None:
    await (await hosted.vmm("vm0")).leave()
    first = hosted.registry.get("vm0")
    await first.wait(LIMIT)
    vmm = await hosted.vmm("vm0")
    assert hosted.registry.get("vm0") is not first
    assert [entry.name for entry in hosted.registry] == ["vm0"]
    await vmm.leave()


@pytest.fixture
def firecracker() -> Iterator[FirecrackerStandIn]:
    with FirecrackerStandIn([4 * PAGE]) as firecracker:
        yield firecracker


async def test_firecracker_gets_the_only_migration_that_waits(
    hosted: Hosted, firecracker: FirecrackerStandIn
) -> None:
    busy, free = hosted.registry.create("busy"), hosted.registry.create("free")
    vmm = await hosted.vmm("busy")
    firecracker.hand_over(hosted.handoff).close()
    await hosted.until(lambda: not free.waits_for_vmm)
    assert free.view()["vmm"].startswith("Firecracker, pid ")
    assert not busy.view()["vmm"].startswith("Firecracker")
    await vmm.leave()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "no migration waits for a VMM: create one (postcopyctl create NAME)"),
        (["a", "b"], "2 migrations wait for a VMM (a, b) and this VMM does not name its own"),
    ],
)
async def test_firecracker_is_refused_where_it_could_be_for_anybody(
    hosted: Hosted, firecracker: FirecrackerStandIn, names: list[str], reason: str
) -> None:
    entries = [hosted.registry.create(name) for name in names]
    before = held()
    with configured("info", "json", stream=(log := StringIO())):
        with firecracker.hand_over(hosted.handoff) as connection:
            await closed(connection)
        event = json.loads(log.getvalue())
    assert event["event"] == "a VMM was refused"
    assert event["reason"].startswith(reason)
    assert event["peer"] == f"pid {os.getpid()}, uid {os.geteuid()}"
    assert held() == before
    assert all(entry.waits_for_vmm for entry in entries)


async def test_a_handoff_socket_of_its_own_tells_which_migration(
    hosted: Hosted, firecracker: FirecrackerStandIn, tmp_path: Path
) -> None:
    own = tmp_path / "own.sock"
    hosted.registry.create("other")
    entry = hosted.registry.create("vm0", handoff=str(own))
    assert entry.view()["handoff"] == str(own)
    with pytest.raises(MigrationFailed, match="this socket belongs to migration 'vm0', not to 'x'"):
        await hosted.vmm("x", path=own)
    firecracker.hand_over(own).close()
    await hosted.until(lambda: not entry.waits_for_vmm)
    await hosted.registry.remove("vm0", force=False)
    assert not own.exists()


async def test_a_vmm_that_was_taken_is_kept_when_no_more_are(
    hosted: Hosted, firecracker: FirecrackerStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it still waits for the service manager: its guest may run already."""
    settling = asyncio.Event()

    async def settled() -> None:
        settling.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(hosted.registry, "settled", settled)
    entry = hosted.registry.create("vm0")
    firecracker.hand_over(hosted.handoff).close()
    async with asyncio.timeout(LIMIT):
        await settling.wait()
        with configured("info", "json", stream=(log := StringIO())):
            await hosted.take_no_more_vmms()
    assert log.getvalue() == ""
    assert entry.migration is not None and entry.migration.vmm is not None
    assert entry.migration.vmm.memory.userfaultfd.fileno() >= 0


# -- sources -----------------------------------------------------------------------------------


async def test_a_whole_migration_ends_and_leaves_its_report(hosted: Hosted) -> None:
    before = held()
    vmm, entry, source = await hosted.listening("vm0")
    vmm.destination.loaded()
    await source.finish()
    await asyncio.to_thread(vmm.destination.wait_for_completion, LIMIT)
    await hosted.reach(entry, "end")
    await source.hear_the_end()
    source.close()
    await entry.wait(LIMIT)
    await vmm.leave()
    assert entry.migration is None
    assert entry.view()["state"] == "end"
    assert entry.view()["received"] == LENGTH
    assert held() == before


async def test_nothing_of_the_engine_is_kept_for_what_has_ended(hosted: Hosted) -> None:
    vmm, entry, source = await hosted.listening("vm0")
    assert entry.migration is not None
    migration = weakref.ref(entry.migration)
    await hosted.registry.remove("vm0", force=True)
    source.close()
    await vmm.leave()
    await hosted.until(lambda: entry.done.done())
    gc.collect()
    assert migration() is None
    assert entry.view()["package_length"] > 0


async def test_a_second_source_is_refused_and_told_of(hosted: Hosted) -> None:
    entry = hosted.registry.create("vm0")
    first, second = Source(entry.listen[0]), Source(entry.listen[0])
    with configured("info", "json", stream=(log := StringIO())):
        await first.begin()
        await second.begin()
        await closed(second.connection)
        events = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        "a source has connected",
        "a source was refused",
    ]
    assert events[1]["migration"] == "vm0"
    host, port = second.connection.getsockname()
    assert events[1]["peer"] == f"{host}:{port}"
    host, port = first.connection.getsockname()
    assert events[1]["reason"] == f"migration 'vm0' already has a source: {host}:{port}"
    assert entry.view()["peer"] == f"{host}:{port}"
    first.close()
    second.close()


async def test_a_source_over_a_unix_socket_is_known_by_its_process(
    hosted: Hosted, tmp_path: Path
) -> None:
    entry = hosted.registry.create("vm0", f"unix:{tmp_path}/stream")
    source = Source(entry.listen[0])
    await source.begin()
    assert entry.migration is not None
    await hosted.until(lambda: entry.view()["peer"] == f"pid {os.getpid()}, uid {os.geteuid()}")
    source.close()


# -- removing, forgetting ----------------------------------------------------------------------


async def test_cancelling_ends_it_and_keeps_it_listed(hosted: Hosted) -> None:
    before = held()
    vmm = await hosted.vmm("vm0")
    entry = await hosted.registry.remove("vm0", force=False)
    assert entry.view()["state"] == "failed"
    assert entry.view()["failure"] == "cancelled by an operator"
    assert list(hosted.registry) == [entry]
    with pytest.raises(MigrationFailed, match="cancelled by an operator"):
        await asyncio.to_thread(vmm.destination.wait_for_device_state, LIMIT)
    await vmm.leave()
    assert held() == before


async def test_removing_what_has_ended_forgets_it(hosted: Hosted) -> None:
    hosted.registry.create("vm0")
    await hosted.registry.remove("vm0", force=False)
    await hosted.registry.remove("vm0", force=False)
    assert list(hosted.registry) == []
    with refused("no-such-migration"):
        await hosted.registry.remove("vm0", force=False)


async def test_after_the_package_only_force_ends_it(hosted: Hosted) -> None:
    vmm, entry, source = await hosted.listening("vm0")
    with refused("past-the-package"):
        await hosted.registry.remove("vm0", force=False)
    assert entry.state.value == "listening"
    assert (await hosted.registry.remove("vm0", force=True)).state.value == "failed"
    source.close()
    await vmm.leave()


async def test_only_so_many_that_have_ended_stay_listed(hosted: Hosted) -> None:
    for name in "abc":
        hosted.registry.create(name)
        await hosted.registry.remove(name, force=False)
    hosted.registry.create("d")
    assert [entry.name for entry in hosted.registry] == ["b", "c", "d"]


# -- stopping ----------------------------------------------------------------------------------


async def test_stopping_cancels_those_whose_source_can_go_on(hosted: Hosted) -> None:
    entry = hosted.registry.create("vm0")
    async with asyncio.timeout(LIMIT):
        await hosted.registry.stop(wait=True)
    assert entry.view()["failure"] == "postcopyd is being stopped"
    with refused("stopping"):
        hosted.registry.create("vm1")
    with pytest.raises(MigrationFailed, match="postcopyd is being stopped"):
        await hosted.vmm("vm1")


async def test_stopping_waits_for_a_guest_that_lives_here(hosted: Hosted) -> None:
    vmm, entry, source = await hosted.listening("vm0")
    stopping = asyncio.create_task(hosted.registry.stop(wait=True))
    await asyncio.sleep(0)
    with refused("stopping"):
        hosted.registry.create("another")
    assert not stopping.done() and entry.state.value == "listening"
    vmm.destination.loaded()
    await source.finish()
    await asyncio.to_thread(vmm.destination.wait_for_completion, LIMIT)
    await hosted.reach(entry, "end")
    await source.hear_the_end()
    source.close()
    await asyncio.wait_for(stopping, LIMIT)
    assert entry.view()["state"] == "end"
    await vmm.leave()


async def test_stopping_without_waiting_gives_the_guest_up(hosted: Hosted) -> None:
    vmm, entry, source = await hosted.listening("vm0")
    async with asyncio.timeout(LIMIT):
        await hosted.registry.stop(wait=False)
    assert entry.view()["state"] == "failed"
    source.close()
    await vmm.leave()


# -- with other workers ------------------------------------------------------------------------


class OtherWorkers:
    """Has the names that other workers have, and says what a worker claims and gives up."""

    def __init__(self, *taken: str) -> None:
        self.taken = set(taken)
        self.claimed: list[str] = []

    async def claim(self, name: str) -> None:
        await asyncio.sleep(0)
        if name in self.taken:
            raise RegistryError("name-taken", f"there is a migration {name!r} already")
        self.taken.add(name)
        self.claimed.append(name)

    def give_up(self, name: str) -> None:
        self.taken.remove(name)


async def test_a_name_is_claimed_before_its_migration_is_created(tmp_path: Path) -> None:
    others = OtherWorkers("theirs")
    hosted = Hosted(tmp_path, claims=others)
    hosted.start()
    with refused("name-taken"):
        await hosted.registry.open("theirs")
    with pytest.raises(MigrationFailed, match="there is a migration 'theirs' already"):
        await hosted.vmm("theirs")
    assert list(hosted.registry) == []
    vmm = await hosted.vmm("ours")
    with refused("name-taken"):
        await hosted.registry.open("ours")
    assert others.claimed == ["ours"]
    await vmm.leave()
    await hosted.stop()


async def test_a_claim_is_given_up_when_nothing_is_created(tmp_path: Path) -> None:
    others = OtherWorkers()
    hosted = Hosted(tmp_path, claims=others)
    hosted.start()
    with refused("address-unusable"):
        await hosted.registry.open("a", "unix:/no/such/place")
    assert others.taken == set()
    await hosted.stop()


async def test_two_at_once_want_one_name_and_one_gets_it(tmp_path: Path) -> None:
    hosted = Hosted(tmp_path, claims=OtherWorkers())
    hosted.start()
    wishes = (hosted.registry.open("a") for _ in range(2))
    done = await asyncio.gather(*wishes, return_exceptions=True)
    assert [type(one).__name__ for one in done] == ["Entry", "RegistryError"]
    await hosted.stop()


async def test_a_vmm_that_comes_while_its_migration_is_created_is_paired(tmp_path: Path) -> None:
    hosted = Hosted(tmp_path, claims=OtherWorkers())
    hosted.start()
    entry, vmm = await asyncio.gather(hosted.registry.open("a"), hosted.vmm("a"))
    assert not entry.waits_for_vmm
    await vmm.leave()
    await hosted.stop()


async def test_the_others_are_told_how_each_stands(hosted: Hosted) -> None:
    hosted.registry.create("waits")
    vmm = await hosted.vmm("has-one")
    hosted.registry.create("ended")
    await hosted.registry.remove("ended", force=False)
    assert hosted.registry.listings() == {
        "waits": ("none", "waiting"),
        "has-one": ("none", "running"),
        "ended": ("failed", "ended"),
    }
    changes = hosted.changes
    for name in ("waits", "ended"):
        hosted.registry.forget(name)
    assert hosted.changes > changes
    assert set(hosted.registry.listings()) == {"waits", "has-one"}
    await vmm.leave()
