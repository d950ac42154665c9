"""New certificates are used without a restart, and broken ones are not."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import SERVER, Authority, Issued, client_context, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.support import wait_until


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
