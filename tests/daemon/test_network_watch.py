"""What is seen of the network path of a stream, in networks of the test's own."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import ip_address
from typing import Any

import pytest
from pyroute2 import IPRoute

from postcopyd.daemon import network_watch
from postcopyd.daemon.network_watch import Carrier, Loss, NetworkWatch, look
from postcopyd.incoming.path import StreamPath
from postcopyd.kernel import network as kernel_network
from postcopyd.kernel.network import Network
from tests.support import LIMIT
from tests.two_hosts import Host, TwoHosts, link, set_link, two_hosts

Change = Callable[[IPRoute], object]
PATH = StreamPath(ip_address(TwoHosts.HERE), ip_address(TwoHosts.THERE))
PATH_6 = StreamPath(ip_address(TwoHosts.HERE_6), ip_address(TwoHosts.THERE_6))


@pytest.fixture
def hosts(assert_nothing_left: None) -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


def looking(host: Host, path: StreamPath, carrier: Carrier | None = None) -> Any:
    """Look once, on that host."""

    def do() -> object:
        with Network() as network:
            return look(network, path, carrier)

    return host.run(do)


def carrier_of(host: Host, path: StreamPath) -> Carrier:
    """What carries a path that works."""
    carrier, loss = looking(host, path)
    assert loss is None
    assert isinstance(carrier, Carrier)
    return carrier


def loss_after(host: Host, path: StreamPath, *changes: Change) -> Loss | None:
    """What is wrong with a path that has worked, when the host's network has changed."""
    carrier = carrier_of(host, path)
    for change in changes:
        host.configure(change)
    _, loss = looking(host, path, carrier)
    assert loss is None or isinstance(loss, Loss)
    return loss


def remove_link(name: str) -> Change:
    return lambda network: network.link("del", index=link(network, name))


def remove_route(to: str) -> Change:
    return lambda network: network.route("del", dst=to, scope=255)  # whatever its scope


def add_default_over_another_link(network: IPRoute) -> None:
    network.link("add", ifname="other", kind="veth", peer={"ifname": "its-end"})
    other = link(network, "other")
    for index in (other, link(network, "its-end")):
        network.link("set", index=index, state="up")
    network.addr("add", index=other, address="198.51.100.1", prefixlen=24)
    network.route("add", dst="default", gateway="198.51.100.2")


def move_addresses_to_another_link(network: IPRoute) -> None:
    stream = link(network, "stream")
    network.link("add", ifname="bridge", kind="bridge")
    bridge = link(network, "bridge")
    network.link("set", index=bridge, state="up")
    network.link("set", index=stream, master=bridge)
    network.addr("del", index=stream, address=TwoHosts.HERE, prefixlen=24)
    network.addr("add", index=bridge, address=TwoHosts.HERE, prefixlen=24)


@pytest.mark.parametrize("path", [PATH, PATH_6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(
    ("change", "loss"),
    [
        (set_link("stream", "down"), Loss("link stream is down", False)),
        (remove_link("stream"), Loss("link stream has been removed", True)),
    ],
    ids=["down", "removed"],
)
def test_a_link_that_does_not_work_is_named(
    hosts: TwoHosts, path: StreamPath, change: Change, loss: Loss
) -> None:
    assert loss_after(hosts.here, path, change) == loss


@pytest.mark.parametrize("path", [PATH, PATH_6], ids=["IPv4", "IPv6"])
def test_a_link_without_carrier_is_named(hosts: TwoHosts, path: StreamPath) -> None:
    carrier = carrier_of(hosts.here, path)
    hosts.switch.configure(set_link("here", "down"))
    assert looking(hosts.here, path, carrier)[1] == Loss("link stream has no carrier", False)
    hosts.switch.configure(set_link("here", "up"))
    assert looking(hosts.here, path, carrier)[1] is None


@pytest.mark.parametrize(("path", "prefix"), [(PATH, 24), (PATH_6, 64)], ids=["IPv4", "IPv6"])
def test_an_address_that_is_removed_is_named(
    hosts: TwoHosts, path: StreamPath, prefix: int
) -> None:
    carrier = carrier_of(hosts.here, path)
    hosts.remove_address(hosts.here, str(path.here), prefix)
    loss = Loss(f"address {path.here} has been removed from this host", True)
    assert looking(hosts.here, path, carrier)[1] == loss


@pytest.mark.parametrize(
    ("path", "to"),
    [(PATH, "192.0.2.0/24"), (PATH_6, "fd00:db8::/64")],
    ids=["IPv4", "IPv6"],
)
def test_a_source_to_which_no_route_leads_is_named(
    hosts: TwoHosts, path: StreamPath, to: str
) -> None:
    loss = loss_after(hosts.here, path, remove_route(to))
    assert loss == Loss(f"there is no route to {path.there}", False)


def test_a_default_route_does_not_stand_in_for_the_link_that_has_our_address(
    hosts: TwoHosts,
) -> None:
    hosts.here.configure(add_default_over_another_link)
    loss = loss_after(hosts.here, PATH, set_link("stream", "down"))
    assert loss == Loss("link stream is down", False)


def test_an_address_that_moves_to_another_link_takes_its_streams_along(hosts: TwoHosts) -> None:
    assert loss_after(hosts.here, PATH, move_addresses_to_another_link) is None
    carrier, loss = looking(hosts.here, PATH, carrier_of(hosts.here, PATH))
    assert (carrier.link.name, loss) == ("bridge", None)


def test_a_stream_whose_address_is_on_no_real_link_goes_the_way_that_is_left(
    hosts: TwoHosts,
) -> None:
    def add_address(network: IPRoute) -> None:
        network.addr("add", index=link(network, "lo"), address="203.0.113.1", prefixlen=32)

    hosts.here.configure(add_address)
    hosts.here.configure(add_default_over_another_link)
    path = StreamPath(ip_address("203.0.113.1"), PATH.there)
    carrier = carrier_of(hosts.here, path)
    assert carrier.link.name == "stream"
    hosts.here.configure(set_link("stream", "down"))
    carrier, loss = looking(hosts.here, path, carrier)
    assert (carrier.link.name, loss) == ("other", None)
    hosts.here.configure(set_link("other", "down"))
    assert looking(hosts.here, path, carrier)[1] == Loss("link other is down", False)


def test_a_stream_between_addresses_of_this_host_depends_on_the_loopback_alone(
    hosts: TwoHosts,
) -> None:
    home = ip_address("127.0.0.1")
    for path in (StreamPath(home, home), StreamPath(PATH.here, PATH.here)):
        assert loss_after(hosts.here, path, set_link("stream", "down")) is None
        loss = loss_after(hosts.here, path, set_link("lo", "down"))
        assert loss == Loss("link lo is down", False)
        hosts.here.configure(set_link("lo", "up"))


def test_link_local_addresses_are_about_their_link(hosts: TwoHosts) -> None:
    hosts.add_address(hosts.here, "fe80::1", 64)
    found: list[int] = []
    hosts.here.configure(lambda network: found.append(link(network, "stream")))
    path = StreamPath(ip_address("fe80::1"), ip_address("fe80::2"), found[0])
    assert carrier_of(hosts.here, path).link.name == "stream"
    assert loss_after(hosts.here, path, remove_link("stream")) is not None


def test_a_path_that_cannot_be_followed_is_not_judged(hosts: TwoHosts) -> None:
    strange = StreamPath(ip_address("203.0.113.1"), PATH.there)
    assert looking(hosts.here, strange) == (None, None)


# -- watching ------------------------------------------------------------------------------------


class Told:
    """What a watch has told."""

    def __init__(self) -> None:
        self.losses: list[tuple[str, bool]] = []
        self.back = 0
        self._news = asyncio.Event()

    def lost(self, reason: str, for_good: bool) -> None:
        self.losses.append((reason, for_good))
        self._news.set()

    def is_back(self) -> None:
        self.back += 1
        self._news.set()

    async def until(self, predicate: Callable[[Told], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not predicate(self):
                self._news.clear()
                await self._news.wait()


async def seen_to_work(watch: network_watch.PathWatch) -> None:
    """Return when the path has been looked at."""
    async with asyncio.timeout(LIMIT):
        while watch.carrier is None:
            await asyncio.sleep(0.001)


def configure(change: Change) -> None:
    with IPRoute() as network:
        change(network)


def on_host(host: Host, test: Callable[[], Any]) -> None:
    """Run a test's coroutine in the network of a host.

    The event loop's helper threads are begun there, so they are in that network as well.
    """
    host.run(lambda: asyncio.run(test()))


def test_a_change_is_told_once_and_so_is_its_end(hosts: TwoHosts) -> None:
    async def watch_it() -> None:
        told, network = Told(), NetworkWatch()
        with closing(network.watch(PATH, told.lost, told.is_back)) as watch:
            await seen_to_work(watch)
            await asyncio.to_thread(configure, set_link("stream", "down"))
            await told.until(lambda told: bool(told.losses))
            await asyncio.to_thread(configure, set_link("stream", "up"))
            await told.until(lambda told: told.back == 1)
        assert told.losses == [("link stream is down", False)]

    on_host(hosts.here, watch_it)


def test_a_storm_of_changes_hides_nothing(hosts: TwoHosts) -> None:
    def storm() -> None:
        with IPRoute() as network:
            lo = link(network, "lo")
            for number in range(300):
                network.addr("add", index=lo, address=f"10.0.0.{number % 250 + 1}", prefixlen=32)
                network.addr("del", index=lo, address=f"10.0.0.{number % 250 + 1}", prefixlen=32)

    async def watch_it() -> None:
        told, network = Told(), NetworkWatch()
        with closing(network.watch(PATH, told.lost, told.is_back)) as watch:
            await seen_to_work(watch)
            # More than the kernel keeps for us: the event loop is held up meanwhile.
            with ThreadPoolExecutor(1) as beside:
                beside.submit(storm).result(LIMIT)
                beside.submit(configure, remove_link("stream")).result(LIMIT)
            await told.until(lambda told: bool(told.losses))
        assert told.losses == [("link stream has been removed", True)]

    on_host(hosts.here, watch_it)


async def test_where_the_network_cannot_be_watched_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(flags: int = 0) -> None:
        raise PermissionError(errno.EPERM, "no netlink socket can be opened")

    said: list[str] = []
    monkeypatch.setattr(kernel_network, "_open", refuse)
    monkeypatch.setattr(network_watch, "log_network_unwatched", said.append)
    told, network = Told(), NetworkWatch()
    network.prepare()
    watches = [network.watch(PATH, told.lost, told.is_back) for _ in range(2)]
    await asyncio.sleep(0)
    for watch in watches:
        watch.close()
    assert said == ["PermissionError: [Errno 1] no netlink socket can be opened"]
