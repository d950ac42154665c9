"""Who is let in over TLS, and that nobody who is not is in anybody's way."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtensionOID

from postcopyd.wire import stream_writer
from tests.certificates import SERVER, Authority, Issued, client_context, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.hosted import Source, Vmm
from tests.support import LIMIT, wait_until

HELLO = b"\x16\x03\x01"
HANDSHAKES = 16
"""That a listener has at a time."""

pytestmark = pytest.mark.timeout(60)


class World:
    """A daemon that takes TLS alone, and an authority that it believes."""

    def __init__(self, daemon: RunningDaemon, authority: Authority, revoked: Issued) -> None:
        self.daemon = daemon
        self.authority = authority
        self.revoked = revoked
        self.good = authority.issue("good", dns=["good.example.org"])
        self._created = 0

    def create(self, *allowed: str) -> str:
        """Create a migration; return its name."""
        self._created += 1
        name = f"vm{self._created}"
        self.daemon.client.create(name, allowed=allowed)
        return name

    def migration(self, name: str) -> dict[str, Any]:
        return self.daemon.client.show(name)

    def connect(self, name: str) -> socket.socket:
        """A connection to the migration, without TLS so far."""
        port = int(self.migration(name)["listen"][0].rpartition(":")[2])
        return socket.create_connection(("127.0.0.1", port), LIMIT)

    def shake(self, name: str, context: ssl.SSLContext) -> ssl.SSLSocket:
        connection = self.connect(name)
        try:
            return context.wrap_socket(connection, server_hostname=SERVER)
        except BaseException:
            connection.close()
            raise

    @contextmanager
    def source(self, name: str, issued: Issued | None = None) -> Iterator[ssl.SSLSocket]:
        """A source that is let in."""
        with self.shake(name, client_context(self.authority, issued or self.good)) as source:
            wait_until(lambda: self.migration(name)["peer"])
            yield source

    def assert_refused(self, name: str, context: ssl.SSLContext) -> None:
        """Connect; the other end closes, while or soon after the handshake is done."""
        with suppress(ssl.SSLError, ConnectionError), self.shake(name, context) as source:
            assert not source.recv(1)

    def refusal(self, name: str, reason: str) -> None:
        """Return when it is logged that a source of the migration was refused, and why."""
        line = re.compile(rf"a source was refused .*migration={name} .*{reason}")
        wait_until(lambda: line.search(self.daemon.log))

    def assert_still_waits(self, name: str) -> None:
        """Nothing has happened to the migration, and a good source gets in."""
        migration = self.migration(name)
        assert (migration["state"], migration["peer"]) == ("none", None)
        with self.source(name):
            pass
        assert "Traceback" not in self.daemon.log


@contextmanager
def running_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    server = authority.issue("server", dns=[SERVER])
    revoked = authority.issue("revoked")
    crl = f'crl = "{authority.revoke(revoked)}"\n'
    settings = tls_settings(authority, server, crl)
    more = f'plain_tcp = "never"\n[timeouts]\nhandshake = 2\n{settings}'
    with running_daemon(tmp_path_factory.mktemp("daemon"), more) as daemon:
        yield World(daemon, authority, revoked)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory) as world:
        yield world


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One to which nobody has come yet."""
    with running_world(tmp_path_factory) as world:
        yield world


def test_a_source_is_known_by_the_name_in_its_certificate(world: World) -> None:
    name = world.create()
    assert world.migration(name)["security"] == "tls"
    with world.source(name) as source:
        host, port = source.getsockname()
        assert world.migration(name)["peer"] == f"{host}:{port}, CN=good,O=Tests"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_whole_migration_goes_over_tls(world: World, version: str) -> None:
    vmm = Vmm(world.daemon.handoff, f"whole-{version}")
    try:
        context = client_context(world.authority, world.good)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        with world.shake(f"whole-{version}", context) as tls:
            source = TlsSource(tls)
            asyncio.run(source.begin())
            asyncio.run(source.send_package())
            assert vmm.destination.wait_for_device_state(LIMIT) == b""
            vmm.destination.loaded()
            asyncio.run(source.finish())
            vmm.destination.wait_for_completion(LIMIT)
    finally:
        asyncio.run(vmm.leave())


class TlsSource(Source):
    """A source that sends over TLS; it blocks."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._tls = connection
        self._writer = stream_writer.StreamWriter(2)

    async def send(self, *parts: bytes) -> None:
        self._tls.sendall(b"".join(parts))


# -- certificates ------------------------------------------------------------------------------


def test_without_a_certificate_nobody_gets_in(world: World) -> None:
    name = world.create()
    world.assert_refused(name, client_context(world.authority, None))
    world.refusal(name, "it shows no certificate")
    world.assert_still_waits(name)


def test_a_certificate_of_another_authority_does_not_count(world: World, tmp_path: Path) -> None:
    name = world.create()
    stranger = Authority(tmp_path, "authority").issue("good")
    world.assert_refused(name, client_context(world.authority, stranger))
    world.refusal(name, "its certificate is not accepted: ")
    world.assert_still_waits(name)


@pytest.mark.parametrize(
    ("days", "reason"), [((-9, -1), "certificate has expired"), ((1, 9), "is not yet valid")]
)
def test_a_certificate_of_another_time_does_not_count(
    world: World, days: tuple[float, float], reason: str
) -> None:
    name = world.create()
    issued = world.authority.issue("untimely", days=days)
    world.assert_refused(name, client_context(world.authority, issued))
    world.refusal(name, f"its certificate is not accepted: .*{reason}")
    world.assert_still_waits(name)


def test_a_certificate_that_was_revoked_does_not_count(world: World) -> None:
    name = world.create()
    world.assert_refused(name, client_context(world.authority, world.revoked))
    world.refusal(name, "its certificate is not accepted: certificate revoked")
    world.assert_still_waits(name)


NOT_TEXT = b"\x30\x04\x82\x02\xff\xfe"
"""DER of a DNS name."""


def test_names_that_cannot_be_read_are_nobodys(world: World) -> None:
    names = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, NOT_TEXT)
    odd = world.authority.issue("odd", more=[names])
    name = world.create()
    world.assert_refused(name, client_context(world.authority, odd))
    world.refusal(name, "the names in its certificate cannot be read")
    world.assert_still_waits(name)


@pytest.mark.parametrize("pattern", ["CN=good,O=Tests", "*.example.org"])
def test_only_the_allowed_name_gets_in(world: World, pattern: str) -> None:
    name = world.create("nobody.example.org", pattern)
    other = world.authority.issue("other", dns=["other.example.net"])
    world.assert_refused(name, client_context(world.authority, other))
    world.refusal(
        name, r"CN=other,O=Tests.* reason=.*\(other\.example\.net\) are among the allowed"
    )
    assert world.migration(name)["allowed_sources"] == ["nobody.example.org", pattern]
    world.assert_still_waits(name)


def test_a_source_that_does_not_believe_us_is_told_of(world: World, tmp_path: Path) -> None:
    name = world.create()
    world.assert_refused(name, client_context(Authority(tmp_path), world.good))
    world.refusal(name, "it does not know the authority of our certificate")
    world.assert_still_waits(name)


def test_an_old_version_of_tls_is_refused(world: World) -> None:
    name = world.create()
    context = client_context(world.authority, world.good)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    world.assert_refused(name, context)
    world.refusal(name, "it speaks no version of TLS that tls.minimum_version allows")
    world.assert_still_waits(name)


# -- who does not do as agreed -----------------------------------------------------------------


def hello(context: ssl.SSLContext) -> bytes:
    """The first message of a handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=SERVER).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (stream_writer.configuration("pc"), "it begins with a migration stream without TLS"),
        (b"GET / HTTP/1.1\r\n\r\n", "it begins with 47 45 54 20 2f 20 48 54"),
        (b"\x80\x2e\x01\x03\x01", "it begins with 80 2e 01 03 01"),
        (b"\x16\x03\x01\x00\x05hello", "its TLS handshake failed: "),
        (b"\x16\xff\xff\xff\xff" + bytes(100), "its TLS handshake failed: "),
    ],
)
def test_what_is_not_tls_is_told(world: World, first: bytes, reason: str) -> None:
    name = world.create()
    with world.connect(name) as connection:
        connection.sendall(first)
        world.refusal(name, reason)
        with suppress(ConnectionError):
            while connection.recv(100):
                pass
    world.assert_still_waits(name)


def test_a_handshake_byte_by_byte_is_one(world: World) -> None:
    name = world.create()
    context = client_context(world.authority, world.good)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=SERVER)
    with world.connect(name) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def flush() -> None:
            for byte in outgoing.read():
                connection.sendall(bytes([byte]))

        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                flush()
                incoming.write(connection.recv(4096))
            else:
                break
        flush()
        wait_until(lambda: world.migration(name)["peer"])


def silence(connection: socket.socket) -> None:
    """Say nothing."""


def half_a_hello(connection: socket.socket) -> None:
    connection.sendall(HELLO)


@pytest.mark.parametrize("say", [silence, half_a_hello])
def test_who_stalls_is_let_go(world: World, say: Callable[[socket.socket], None]) -> None:
    name = world.create()
    with world.connect(name) as connection:
        say(connection)
        world.refusal(name, "its TLS handshake was not done within 2 s")
        assert connection.recv(1) == b""
    world.assert_still_waits(name)


def test_who_goes_away_in_the_middle_is_let_go(world: World) -> None:
    name = world.create()
    with world.connect(name) as connection:
        connection.sendall(hello(client_context(world.authority, world.good)))
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    world.refusal(name, "it went away in the middle of its TLS handshake")
    with world.connect(name):
        pass
    world.refusal(name, "it went away before its TLS handshake")
    world.assert_still_waits(name)


def test_a_hundred_that_stall_are_in_nobodys_way(fresh: World) -> None:
    names = [fresh.create(), fresh.create()]
    before = fresh.daemon.descriptors_at_rest()
    with ExitStack() as stalling:
        for number in range(100):
            connection = stalling.enter_context(fresh.connect(names[0]))
            if number % 2:
                connection.sendall(HELLO)
        for name in names:
            fresh.assert_still_waits(name)
        fresh.refusal(names[0], f"has taken longest, and {HANDSHAKES} others are under way")
    fresh.daemon.wait_for_descriptors(before)


def test_a_migration_that_ends_gives_up_handshakes(fresh: World) -> None:
    before = fresh.daemon.descriptors_at_rest()
    name = fresh.create()
    with fresh.connect(name) as connection:
        connection.sendall(HELLO)
        fresh.daemon.client.cancel(name)
        assert connection.recv(1) == b""
    fresh.daemon.wait_for_descriptors(before)


def test_pages_right_behind_the_handshake_are_not_lost(world: World) -> None:
    """The first bytes of the stream are there before the daemon has seen the certificate."""
    name = world.create()
    context = client_context(world.authority, world.good)
    with world.shake(name, context) as source:
        source.sendall(stream_writer.configuration("pc-test"))
        wait_until(lambda: world.migration(name)["bytes_received"])


def test_no_key_reaches_the_log(world: World) -> None:
    """Last: what all of these have logged."""
    log = world.daemon.log
    assert "BEGIN" not in log
    for file in world.authority.directory.glob("*.key"):
        assert file.read_text().splitlines()[1] not in log
