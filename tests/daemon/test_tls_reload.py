"""New certificates are used without a restart, and broken ones are not."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from postcopyd.daemon.config import Tls
from postcopyd.daemon.tls_handshake import Handshakes
from postcopyd.daemon.tls_identity import TlsIdentity
from tests.certificates import SERVER, Authority, Issued, client_context, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.support import LIMIT, wait_until


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def server(authority: Authority) -> Issued:
    return authority.issue("server", dns=[SERVER])


@pytest.fixture
def daemon(tmp_path: Path, authority: Authority, server: Issued) -> Iterator[RunningDaemon]:
    directory = tmp_path / "daemon"
    directory.mkdir()
    more = f'plain_tcp = "never"\n{tls_settings(authority, server)}'
    with running_daemon(directory, more) as daemon:
        daemon.client.create("vm0")
        yield daemon


def shown(daemon: RunningDaemon, authority: Authority) -> int:
    """The serial number of the certificate that the daemon shows."""
    port = int(daemon.client.show("vm0")["listen"][0].rpartition(":")[2])
    context = client_context(authority, authority.issue("client"))
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname=SERVER) as connection,
    ):
        certificate = connection.getpeercert()
        assert certificate is not None
        return int(str(certificate["serialNumber"]), 16)


def replace(old: Issued, new: Issued) -> None:
    new.key.replace(old.key)
    new.certificate.replace(old.certificate)


def test_a_changed_file_counts_for_the_next_source(
    daemon: RunningDaemon, authority: Authority, server: Issued
) -> None:
    assert shown(daemon, authority) == server.serial_number
    new = authority.issue("new", dns=[SERVER])
    replace(server, new)
    assert shown(daemon, authority) == new.serial_number
    assert "the certificates were read anew" in daemon.log


def test_a_signal_reads_anew_and_the_service_manager_is_told(
    daemon: RunningDaemon, authority: Authority, server: Issued
) -> None:
    new = authority.issue("new", dns=[SERVER])
    replace(server, new)
    daemon.process.send_signal(signal.SIGHUP)
    while "RELOADING" not in (told := daemon.notification()):
        pass
    assert told["RELOADING"] == "1"
    assert int(told["MONOTONIC_USEC"]) > 0
    assert daemon.notification()["READY"] == "1"
    assert "the certificates were read anew" in daemon.log
    assert shown(daemon, authority) == new.serial_number


@pytest.mark.parametrize("what", ["half way", "expired", "missing"])
def test_what_cannot_be_used_changes_nothing(
    daemon: RunningDaemon, authority: Authority, server: Issued, what: str
) -> None:
    if what == "half way":
        new = authority.issue("new", dns=[SERVER])
        new.certificate.replace(server.certificate)
        reason = "is not the key of"
    elif what == "expired":
        replace(server, authority.issue("new", dns=[SERVER], days=(-9, -1)))
        reason = "has expired"
    else:
        server.key.unlink()
        reason = "No such file"
    assert shown(daemon, authority) == server.serial_number
    assert "cannot be used; those read before stay" in daemon.log
    assert reason in daemon.log
    if what == "half way":
        new.key.replace(server.key)
        assert shown(daemon, authority) == new.serial_number


async def test_who_is_revoked_stays_out_though_our_own_certificate_has_expired(
    authority: Authority,
) -> None:
    server = authority.issue("server", dns=[SERVER], days=(-9, -1))
    stolen = authority.issue("stolen")
    revoked = authority.revoke(authority.issue("other"))
    identity = TlsIdentity(
        Tls(str(server.certificate), str(server.key), str(authority.file), str(revoked))
    )
    try:
        assert await refusal(identity, stolen) is None
        authority.revoke(stolen)
        assert "certificate revoked" in str(await refusal(identity, stolen))
    finally:
        identity.close()


async def refusal(identity: TlsIdentity, issued: Issued) -> str | None:
    """Why a source with that certificate is not let in; None if it is."""
    ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def done(tls: ssl.SSLSocket, _: str) -> None:
        tls.close()
        ended.set_result(None)

    near, far = socket.socketpair()
    near.setblocking(False)
    handshakes = Handshakes(
        identity,
        LIMIT,
        done=done,
        refused=lambda _, reason: ended.set_result(reason),
        expect=lambda _: lambda _: None,
    )
    handshakes.begin(near, "a source")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # ours has expired
    context.load_cert_chain(issued.certificate, issued.key)
    far.settimeout(LIMIT)
    with suppress(OSError), await asyncio.to_thread(context.wrap_socket, far) as source:
        await asyncio.to_thread(source.recv, 1)
    far.close()
    async with asyncio.timeout(LIMIT):
        return await ended


async def test_work_of_a_handshake_that_is_given_up_is_not_begun(authority: Authority) -> None:
    server = authority.issue("server")
    identity = TlsIdentity(Tls(str(server.certificate), str(server.key), str(authority.file)))
    may_end, begun = threading.Event(), []
    try:
        first = asyncio.ensure_future(identity.aside(lambda: may_end.wait(LIMIT)))
        second = asyncio.ensure_future(identity.aside(lambda: begun.append("second")))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        async with asyncio.timeout(LIMIT):
            with pytest.raises(asyncio.CancelledError):
                await second
        assert not first.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not begun
    finally:
        may_end.set()
        identity.close()


def test_a_source_that_is_there_goes_on(daemon: RunningDaemon, authority: Authority) -> None:
    port = int(daemon.client.show("vm0")["listen"][0].rpartition(":")[2])
    context = client_context(authority, authority.issue("client"))
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname=SERVER) as source,
    ):
        wait_until(lambda: daemon.client.show("vm0")["peer"])
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the certificates were read anew" in daemon.log)
        source.sendall(b"QEVM")
        wait_until(lambda: daemon.client.show("vm0")["bytes_received"] == 4)
