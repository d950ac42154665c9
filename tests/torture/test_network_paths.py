"""A migration between two hosts, while the network between them changes.

Each case follows from the seed and its number: see test_network_cuts.py. Its instants are at
random, so what they hit is told by the seed and by how fast the machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.test_network import add_route, remove_route, set_our_link, set_port
from tests.daemon.whole_migration import LENGTHS, Image
from tests.support import LIMIT, wait_until
from tests.torture import broken_migrations
from tests.torture.broken_migrations import (
    BREAK_AFTER,
    CONFIGURATION,
    check_arrival,
    checked_guest,
    nothing_left,
    numbered,
)
from tests.torture.sampling import Sampling, Tally
from tests.torture.test_network_cuts import make_case
from tests.two_hosts import TwoHosts, link, set_link, two_hosts

Change = Callable[[TwoHosts], None]
NEW_ADDRESS: Final = "192.0.2.3"


@dataclass(frozen=True, slots=True)
class Misfortune:
    """What happens to the network, and how that ends."""

    begin: Change
    end: Change


def move_here(old: str, new: str) -> Change:
    """Move the daemon's address from one link to another."""

    def change(hosts: TwoHosts) -> None:
        hosts.remove_address(hosts.here, hosts.HERE, 24, old)
        hosts.add_address(hosts.here, hosts.HERE, 24, new)

    return change


def readdress_source(old: str, new: str) -> Change:
    """Give the source's host another address."""

    def change(hosts: TwoHosts) -> None:
        hosts.remove_address(hosts.there, old, 24)
        hosts.add_address(hosts.there, new, 24)

    return change


def remove_address(hosts: TwoHosts) -> None:
    hosts.remove_address(hosts.here, hosts.HERE, 24)


def add_address(hosts: TwoHosts) -> None:
    hosts.add_address(hosts.here, hosts.HERE, 24)


def set_source_link(state: str) -> Change:
    return lambda hosts: hosts.there.configure(set_link("stream", state))


def set_source_port(state: str) -> Change:
    """Set the other end of the source's link up or down."""
    return lambda hosts: hosts.switch.configure(set_link("there", state))


def remove_source_route(hosts: TwoHosts) -> None:
    hosts.there.configure(lambda network: network.route("del", dst="192.0.2.0/24", scope=255))


def add_source_route(hosts: TwoHosts) -> None:
    hosts.there.configure(
        lambda network: network.route("add", dst="192.0.2.0/24", oif=link(network, "stream"))
    )


MISFORTUNES: Final = {
    "our link down": Misfortune(set_our_link("down"), set_our_link("up")),
    "our carrier lost": Misfortune(set_port("down"), set_port("up")),
    "our address away": Misfortune(remove_address, add_address),
    "our address on another link": Misfortune(
        move_here("stream", "other"), move_here("other", "stream")
    ),
    "our route deleted": Misfortune(remove_route, add_route),
    "source's link down": Misfortune(set_source_link("down"), set_source_link("up")),
    "source's carrier lost": Misfortune(set_source_port("down"), set_source_port("up")),
    "source's address another one": Misfortune(
        readdress_source(TwoHosts.THERE, NEW_ADDRESS), readdress_source(NEW_ADDRESS, TwoHosts.THERE)
    ),
    "source's route deleted": Misfortune(remove_source_route, add_source_route),
    "source silent": Misfortune(lambda hosts: hosts.silence(), lambda hosts: hosts.silence(False)),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_a_migration_arrives_whatever_becomes_of_the_network:
        numbered(metafunc, usual=3, full=4 * len(MISFORTUNES))
    else:
        numbered(metafunc, usual=2, full=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        hosts.plug(hosts.here, "here-other", {}, "other")
        yield hosts


@pytest.fixture(scope="module")
def daemon(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    listen = f'listen = "tcp:{hosts.HERE}:0"\nplain_tcp = "always"\n{CONFIGURATION}'
    directory = tmp_path_factory.mktemp("daemon")
    with running_daemon(directory, listen, wrapper=hosts.here.wrapper) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("source") / "image", seed=3)


@contextlib.asynccontextmanager
async def slowly(hosts: TwoHosts, megabits: int) -> AsyncIterator[None]:
    """Have the source's link be a slow one."""
    hosts.shape(hosts.there, megabits)
    try:
        yield
    finally:
        hosts.shape(hosts.there, 0)


async def test_a_migration_arrives_whatever_becomes_of_the_network(
    hosts: TwoHosts,
    daemon: RunningDaemon,
    image: Image,
    sampling: Sampling,
    tally: Callable[[str], Tally],
    number: int,
) -> None:
    names = sorted(MISFORTUNES)
    sampling.numbers("network paths").shuffle(names)
    name = names[number % len(names)]
    misfortune = MISFORTUNES[name]
    numbers = sampling.numbers(f"network paths {number}")
    kind = numbers.choice(("anonymous", "memory-file"))
    megabits = numbers.choice((20, 40, 80))
    # Noticed by nobody, by netlink alone, about when the ends notice, by everybody.
    lasts = [numbers.uniform(0.0, numbers.choice((0.1, 1.0, 2.5, 4.0)) * BREAK_AFTER / 2)]
    lasts += [numbers.uniform(0.0, 1.0)] * numbers.randrange(2)
    print(f"{number}: {name} for {lasts} s, {kind}, {megabits} Mbit/s")
    before = await asyncio.to_thread(daemon.descriptors_at_rest)
    vm = f"path{number}"
    async with (
        asyncio.timeout(broken_migrations.LIMIT),
        slowly(hosts, megabits),
        checked_guest(daemon, vm, kind, image.directory) as guest,
    ):
        (listen,) = (await guest.says())["listen"]
        options = ("--break-after", str(BREAK_AFTER))
        with image.start_sending(listen, *options, wrapper=hosts.there.wrapper) as source:
            try:
                await asyncio.to_thread(
                    wait_until, lambda: daemon.client.show(vm)["state"] == "running"
                )
                for seconds in lasts:
                    await asyncio.sleep(numbers.uniform(0.0, 0.5))
                    misfortune.begin(hosts)
                    try:
                        await asyncio.sleep(seconds)
                    finally:
                        misfortune.end(hosts)
                output, errors = await asyncio.to_thread(source.communicate, timeout=2 * LIMIT)
            finally:
                source.kill()
        assert source.returncode == 0, errors
        word = await guest.says()
    assert word["wrong"] == []
    report = await asyncio.to_thread(daemon.client.wait, vm, LIMIT)
    assert report["state"] == "end"
    assert report["received"] == report["length"] == sum(LENGTHS.values())
    await asyncio.to_thread(nothing_left, daemon, before)
    reconnects = json.loads(output)["reconnects"]
    matrix = tally("network: paths")
    matrix.outcomes["complete" if reconnects else "complete on the first connection"] += 1
    matrix.pauses.append(word["longest_wait"])


@pytest.mark.usefixtures("soon_in_doubt")
async def test_a_migration_over_a_slow_link_that_is_cut_at_any_byte_arrives(
    hosts: TwoHosts,
    daemon: RunningDaemon,
    image: Image,
    sampling: Sampling,
    tally: Callable[[str], Tally],
    number: int,
) -> None:
    numbers = sampling.numbers(f"network slow cuts {number}")
    case = make_case(number, numbers)
    async with slowly(hosts, numbers.choice((20, 40, 80))):
        await check_arrival(daemon, image, case, tally("network: cuts of a slow link"), hosts)
