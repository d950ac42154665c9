"""Two hosts and a switch between them: network namespaces that go with the threads in them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pyroute2 import IPRoute

from tests.support import LIMIT, libc, wait_until

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_TC_H_ROOT = 0xFFFFFFFF  # linux/pkt_sched.h
_RTN_LOCAL = 2  # linux/rtnetlink.h
T = TypeVar("T")


class Host:
    """A network namespace without a name: it is there as long as its thread or somebody in it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=_leave_network)
        self.namespace = self.run(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.namespace)
        self._thread.shutdown()

    @property
    def wrapper(self) -> tuple[str, ...]:
        """A command that starts another one on this host."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}")

    def run(self, what: Callable[[], T]) -> T:
        """Do something on this host."""
        return self._thread.submit(what).result(LIMIT)

    def configure(self, what: Callable[[IPRoute], object]) -> None:
        """Change its network."""

        def do() -> None:
            with IPRoute() as network:
                what(network)

        self.run(do)

    def connect(self, address: str, port: int) -> socket.socket:
        """Connect from this host."""
        return self.run(lambda: socket.create_connection((address, port), LIMIT))


def _leave_network() -> None:
    if libc.unshare(_CLONE_NEWNET):
        raise OSError("no network namespace: these tests must be root's")


def link(network: IPRoute, name: str) -> int:
    """The number of a link."""
    (index,) = network.link_lookup(ifname=name)
    assert isinstance(index, int)
    return index


def _carries(network: IPRoute, name: str) -> bool:
    """Tell whether the link works; for IPv6 that matters."""
    (found,) = network.get_links(ifname=name)
    return bool(found.get_attr("IFLA_OPERSTATE") == "UP")


def _is_local(network: IPRoute, address: str, index: int) -> bool:
    """Tell whether the kernel takes an address for its own."""
    (found,) = network.route("get", dst=address, oif=index)
    return bool(found["type"] == _RTN_LOCAL)


def set_link(name: str, state: str) -> Callable[[IPRoute], object]:
    """Set a link up or down, for `Host.configure`."""
    return lambda network: network.link("set", index=link(network, name), state=state)


class TwoHosts:
    """`here` and `there`, each with a link ``stream``, whose other ends are ports of `switch`."""

    HERE = "192.0.2.1"
    THERE = "192.0.2.2"
    HERE_6 = "fd00:db8::1"
    THERE_6 = "fd00:db8::2"

    def __init__(self, here: Host, there: Host, switch: Host) -> None:
        self.here, self.there, self.switch = here, there, switch
        for host in (here, there, switch):
            host.configure(set_link("lo", "up"))
        switch.configure(self._add_switch)
        self.plug(here, "here", {self.HERE: 24, self.HERE_6: 64})
        self.plug(there, "there", {self.THERE: 24, self.THERE_6: 64})

    @staticmethod
    def _add_switch(network: IPRoute) -> None:
        network.link("add", ifname="switch", kind="bridge")
        network.link("set", index=link(network, "switch"), state="up")

    def plug(self, host: Host, port: str, addresses: dict[str, int], name: str = "stream") -> None:
        """Make a host's link, connect it with a port of the switch, and give it its addresses."""

        def connect(network: IPRoute) -> None:
            network.link("add", ifname=port, kind="veth", peer={"ifname": name})
            network.link("set", index=link(network, name), net_ns_fd=host.namespace)
            switch = link(network, "switch")
            network.link("set", index=link(network, port), master=switch, state="up")

        self.switch.configure(connect)
        host.configure(set_link(name, "up"))
        host.configure(lambda network: wait_until(lambda: _carries(network, name)))
        for address, prefix in addresses.items():
            self.add_address(host, address, prefix, name)

    def add_address(self, host: Host, address: str, prefix: int, name: str = "stream") -> None:
        """Give a host an address on one of its links, and return when it can be used."""
        flags = {"flags": _IFA_F_NODAD} if ":" in address else {}

        def add(network: IPRoute) -> None:
            index = link(network, name)
            network.addr("add", index=index, address=address, prefixlen=prefix, **flags)
            wait_until(lambda: _is_local(network, address, index))

        host.configure(add)

    def remove_address(self, host: Host, address: str, prefix: int, name: str = "stream") -> None:
        """Take an address from a link of a host."""
        host.configure(
            lambda network: network.addr(
                "del", index=link(network, name), address=address, prefixlen=prefix
            )
        )

    def shape(self, host: Host, megabits: int) -> None:
        """Have a host send no faster than so many megabits a second; 0 for as fast as it can."""

        def change(network: IPRoute) -> None:
            index = link(network, "stream")
            if megabits:
                rate = f"{megabits}mbit"
                network.tc("add", "tbf", index=index, rate=rate, burst=32 << 10, latency="50ms")
            else:
                network.tc("del", index=index, parent=_TC_H_ROOT)

        host.configure(change)

    def silence(self, silent: bool = True) -> None:
        """Have nothing reach the host there any more, without a word to anybody; or end that."""

        def change(network: IPRoute) -> None:
            switch = 0 if silent else link(network, "switch")
            network.link("set", index=link(network, "there"), master=switch)

        self.switch.configure(change)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts that reach each other; all is gone afterwards."""
    with Host() as here, Host() as there, Host() as switch:
        yield TwoHosts(here, there, switch)
