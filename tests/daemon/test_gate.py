"""Which listener asks its sources for what, and who may be a source on this host."""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postcopyd.cli.control_client import ControlError
from postcopyd.daemon.certificate_names import AllowedNames
from postcopyd.daemon.config import Configuration, Tls
from postcopyd.daemon.gate import Gate, GateRules, NotSecure
from postcopyd.daemon.sockets import listen_address
from postcopyd.vmm.client import MigrationFailed
from postcopyd.vmm.peer import AllowedPeers
from tests.certificates import Authority
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import Vmm
from tests.daemon.test_service import as_nobody
from tests.support import LIMIT, wait_readable, wait_until

LOOPBACK = ["tcp:127.0.0.1:0", "tcp:127.1.2.3:1", "tcp:[::1]:0", "tcp:localhost:0"]
OTHER = ["tcp:0.0.0.0:0", "tcp:192.0.2.1:7601", "tcp:[::]:0", "tcp:[2001:db8::1]:1"]


def security(rules: GateRules, address: str, named: bool = False) -> str:
    return rules.security_of(listen_address(address), named)


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    authority = Authority(tmp_path)
    server = authority.issue("server")
    return Tls(str(server.certificate), str(server.key), str(authority.file))


@pytest.fixture
def rules() -> Iterator[Callable[[Configuration], GateRules]]:
    made = []

    def make(configuration: Configuration) -> GateRules:
        made.append(GateRules(configuration, AllowedPeers(())))
        return made[-1]

    yield make
    for each in made:
        each.close()


MakeRules = Callable[[Configuration], GateRules]


@pytest.mark.parametrize("address", LOOPBACK)
def test_plain_tcp_is_taken_on_the_loopback(rules: MakeRules, tls: Tls, address: str) -> None:
    assert security(rules(Configuration()), address) == "plain"
    assert security(rules(Configuration(tls=tls)), address) == "plain"
    assert security(rules(Configuration(tls=tls, plain_tcp="never")), address) == "tls"


@pytest.mark.parametrize("address", OTHER)
def test_tls_is_what_other_addresses_take(rules: MakeRules, tls: Tls, address: str) -> None:
    assert security(rules(Configuration(tls=tls)), address) == "tls"
    assert security(rules(Configuration(plain_tcp="always")), address) == "plain"


@pytest.mark.parametrize("address", OTHER)
def test_without_tls_other_addresses_are_refused(rules: MakeRules, address: str) -> None:
    with pytest.raises(NotSecure, match="plain TCP is not allowed there") as caught:
        security(rules(Configuration()), address)
    assert "set up [tls]" in caught.value.hint


def test_a_unix_socket_needs_no_tls(rules: MakeRules, tls: Tls) -> None:
    assert security(rules(Configuration(plain_tcp="never")), "unix:/run/s") == "unix"
    assert security(rules(Configuration(tls=tls)), "unix:/run/s") == "unix"


@pytest.mark.parametrize("address", ["unix:/run/s", "tcp:127.0.0.1:0"])
def test_nobody_is_allowed_by_name_where_nobody_shows_one(
    rules: MakeRules, tls: Tls, address: str
) -> None:
    with pytest.raises(NotSecure, match="no source shows a certificate"):
        security(rules(Configuration(tls=tls)), address, named=True)


# -- as an operator meets it -------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path) as daemon:
        yield daemon


def test_creating_is_refused_and_says_what_to_do(daemon: RunningDaemon, tmp_path: Path) -> None:
    before = daemon.descriptors_at_rest()
    with pytest.raises(ControlError, match="plain TCP is not allowed there") as caught:
        daemon.client.create("vm0", "tcp:0.0.0.0:0", f"{tmp_path}/own")
    assert caught.value.code == "not-secure"
    assert 'plain_tcp = "always"' in caught.value.hint
    with pytest.raises(ControlError, match="none can be allowed by name") as caught:
        daemon.client.create("vm0", allowed=["CN=node7"])
    assert caught.value.code == "not-secure"
    with pytest.raises(ControlError, match="is neither a DNS name") as caught:
        daemon.client.create("vm0", allowed=["no name"])
    assert caught.value.code == "invalid-source"
    with pytest.raises(MigrationFailed, match="plain TCP is not allowed there"):
        Vmm(daemon.handoff, "vm0", "tcp:0.0.0.0:0")
    assert daemon.client.list() == []
    assert not (tmp_path / "own").exists()
    daemon.wait_for_descriptors(before)


def test_tls_at_a_plain_listener_is_told_and_the_migration_waits_on(daemon: RunningDaemon) -> None:
    migration = daemon.client.create("vm0")
    port = int(migration["listen"][0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as source:
        host, port = source.getsockname()
        source.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01")
        wait_until(lambda: daemon.client.show("vm0")["refused"] is not None)
    shown = daemon.client.show("vm0")
    assert shown["refused"].startswith(f"{host}:{port}: migration 'vm0' has not begun")
    assert "it begins as a TLS handshake, and no TLS is spoken here" in shown["refused"]
    assert shown["state"] == "none"


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user can reach, as /run/postcopyd is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize(
    ("more", "allowed"),
    [("", False), ('source_users = ["nobody"]\n', True), ('source_group = "nogroup"\n', True)],
)
def test_a_source_on_a_unix_socket_is_known_by_its_user(
    public_directory: Path, more: str, allowed: bool
) -> None:
    with running_daemon(public_directory, f"source_mode = 0o666\n{more}") as daemon:
        path = public_directory / "stream.sock"
        daemon.client.create("vm0", f"unix:{path}")
        assert path.stat().st_mode & 0o777 == 0o666
        with socket.socket(socket.AF_UNIX) as source:
            source.settimeout(LIMIT)
            as_nobody(lambda: source.connect(str(path)))
            if allowed:
                wait_until(lambda: daemon.client.show("vm0")["peer"])
                assert daemon.client.show("vm0")["peer"].endswith(", uid 65534")
            else:
                assert source.recv(1) == b""
                reason = "user nobody (65534) is not allowed to be a source here"
                wait_until(lambda: reason in daemon.log)
                assert daemon.client.show("vm0")["peer"] is None


def test_a_connection_that_has_gone_before_it_is_looked_at_is_nobody_to_refuse(
    rules: MakeRules,
) -> None:
    refused: list[str] = []
    gate = Gate(
        rules(Configuration()),
        "plain",
        AllowedNames(()),
        let_in=lambda connection, peer: refused.append(f"let in: {peer}"),
        refused=lambda peer, reason: refused.append(reason),
        expect=lambda _: lambda _: None,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as source:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted, _ = listener.accept()
        wait_readable(accepted.fileno())  # its reset is here
        gate.take(accepted)
    assert refused == [] and accepted.fileno() == -1
