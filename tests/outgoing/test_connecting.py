"""How a destination is reached, and reached again."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from pathlib import Path

import pytest

from postcopyd.outgoing.connecting import NobodyListens, connect, way_back
from postcopyd.outgoing.connection import ConnectionLost
from postcopyd.wire.address import Address
from tests.outgoing.destination import no_descriptor_left


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
async def test_a_tcp_listener_is_reached(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        address = Address("tcp", host=host, port=listener.getsockname()[1])
        with await connect(address) as connection:
            accepted, peer = listener.accept()
            accepted.close()
            assert peer[:2] == connection.getsockname()[:2]
            assert not connection.getblocking()


async def test_a_unix_listener_is_reached(tmp_path: Path) -> None:
    path = str(tmp_path / "stream.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with await connect(Address("unix", path=path)) as connection:
            assert connection.getpeername() == path


async def test_where_nobody_listens_the_error_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with no_descriptor_left(), pytest.raises(ConnectionLost) as refusal:
        await connect(Address("tcp", host="127.0.0.1", port=port))
    assert str(refusal.value) == f"cannot connect to tcp:127.0.0.1:{port}: Connection refused"


async def test_a_unix_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "missing")
    with no_descriptor_left(), pytest.raises(ConnectionLost, match="No such file") as refusal:
        await connect(Address("unix", path=path))
    assert f"unix:{path}" in str(refusal.value)


async def test_a_unix_socket_for_which_others_wait_already_is_no_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "stream.sock")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(path)
        listener.listen(0)
        while True:
            other = waiting.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            if other.connect_ex(path) == errno.EAGAIN:
                break
        with no_descriptor_left(), pytest.raises(ConnectionLost, match="cannot connect to unix:"):
            await connect(Address("unix", path=path))


async def test_the_way_back_leads_to_the_same_address_and_not_to_the_name(tmp_path: Path) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    path = str(tmp_path / "stream.sock")
    listeners[1].bind(path)
    listeners[1].listen()
    port = listeners[0].getsockname()[1]
    addresses = (Address("tcp", host="localhost", port=port), Address("unix", path=path))
    names = (f"tcp:127.0.0.1:{port}", f"unix:{path}")
    for listener, address, name in zip(listeners, addresses, names, strict=True):
        with listener, await connect(address) as first:
            connect_again = way_back(first, address)
            with await connect_again() as second:
                assert second.getpeername() == first.getpeername()
        if address.kind == "unix":
            Path(path).unlink()
        with no_descriptor_left(), pytest.raises(NobodyListens, match=f"connect to {name}: "):
            await connect_again()


async def test_the_way_back_to_a_unix_socket_is_the_path_by_which_it_was_found(
    tmp_path: Path,
) -> None:
    """Its owner may call it by another one: in a container, through a link."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "theirs"))
        listener.listen()
        (tmp_path / "theirs").rename(tmp_path / "ours")
        address = Address("unix", path=str(tmp_path / "ours"))
        with await connect(address) as first, await way_back(first, address)() as second:
            assert second.getpeername() == first.getpeername()


async def test_there_is_no_way_back_to_who_has_gone_already() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("tcp", host="127.0.0.1", port=listener.getsockname()[1])
        connection = await connect(address)
        far, _ = listener.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        with pytest.raises(ConnectionLost, match="the connection was lost"):
            way_back(connection, address)
    assert connection.fileno() == -1


async def test_a_port_that_is_given_to_ourselves_is_one_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    class Bound(socket.socket):
        """Gets that very port, as any may that tries for long enough."""

        def __init__(self, *arguments: int) -> None:
            super().__init__(*arguments)
            if self.family == socket.AF_INET:  # the event loop has others
                self.bind(("127.0.0.1", port))

    monkeypatch.setattr(socket, "socket", Bound)
    with pytest.raises(NobodyListens, match="Connection refused"):
        await connect(Address("tcp", host="127.0.0.1", port=port))


async def test_a_name_without_an_address_is_named() -> None:
    with pytest.raises(ConnectionLost, match=r"cannot connect to tcp:no-such-host\.invalid:1"):
        await connect(Address("tcp", host="no-such-host.invalid", port=1))
