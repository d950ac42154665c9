"""A daemon that takes TLS alone, and a migration of which only one name may be the source."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from postcopyd.kernel.processes import pidfd_open
from tests.certificates import SERVER, Authority, Issued, client_context, tls_settings
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.support import LIMIT, wait_readable, wait_until

ALLOWED: Final = "node7.hosts.example.org"
"""The name that may be the source of the migration."""
OTHER: Final = "node8.hosts.example.org"
"""One that has a certificate of the same authority, and that the configuration allows as well."""
VM: Final = "vm0"


class NamedSource:
    """The migration, who may be its source, and who may not."""

    def __init__(self, daemon: RunningDaemon, authority: Authority) -> None:
        self.daemon = daemon
        self._authority = authority
        self._allowed = authority.issue("allowed", dns=[ALLOWED])
        self._stranger = client_context(authority, authority.issue("stranger", dns=[OTHER]))
        daemon.client.create(VM, allowed=[ALLOWED])

    @property
    def options(self) -> list[str]:
        """Of ``postcopyctl send``, with which it is let in."""
        issued: Issued = self._allowed
        return [
            *("--tls-ca-certificates", str(self._authority.file)),
            *("--tls-certificate", str(issued.certificate), "--tls-key", str(issued.key)),
            *("--tls-hostname", SERVER),
        ]

    @property
    def port(self) -> int:
        """At which the source is waited for."""
        return int(self.show()["listen"][0].rpartition(":")[2])

    def show(self) -> dict[str, Any]:
        return self.daemon.client.show(VM)

    def rules(self) -> dict[str, Any]:
        """What the control API tells of who may be the source, and where."""
        shown = self.show()
        return {key: shown[key] for key in ("allowed_sources", "security", "listen")}

    def reach(self, state: str) -> None:
        """Return when the migration is in that state."""
        wait_until(lambda: self.show()["state"] == state)

    def try_as_a_stranger(self, port: int) -> bytes:
        """Connect with the other name; return what the daemon says, which closes then."""
        said = b""
        with (
            suppress(ssl.SSLError, ConnectionError),
            socket.create_connection(("127.0.0.1", port), LIMIT) as raw,
            self._stranger.wrap_socket(raw, server_hostname=SERVER) as connection,
        ):
            while received := connection.recv(4096):
                said += received
        return said

    def assert_a_stranger_is_refused(self) -> None:
        """Somebody with the other name is refused by the process that is there now, and logged."""
        before = self.refusals
        assert self.try_as_a_stranger(self.port) == b""
        wait_until(lambda: self.refusals == before + 1)

    @property
    def refusals(self) -> int:
        """How often it is logged that the other name is none of those that may be the source."""
        return sum(
            "a source was refused" in line
            and "CN=stranger,O=Tests" in line
            and f"({OTHER}) are among the allowed sources" in line
            for line in self.daemon.log.splitlines()
        )

    def assert_nobody_else_was_let_in(self) -> None:
        let_in = [line for line in self.daemon.log.splitlines() if "a source has connected" in line]
        assert let_in
        assert all("CN=allowed,O=Tests" in line for line in let_in), let_in

    # -- kills -----------------------------------------------------------------------------------

    @contextmanager
    def dying(self) -> Iterator[None]:
        """Have all of the daemon die within, its supervisor first; then start it again.

        As the service manager does it: not before all of its processes have gone.
        """
        workers = [pidfd_open(worker) for worker in self.daemon.workers()]
        try:
            yield
            self.daemon.process.wait(LIMIT)
            for worker in workers:
                wait_readable(worker)
        finally:
            for worker in workers:
                os.close(worker)
        self.start_again()

    def start_again(self) -> None:
        """Start it with what the service manager has, when that has heard everything."""
        self.daemon.manager.catch_up()
        self.daemon.start()

    def kill_all(self) -> None:
        """Kill every process of the daemon, and start it again."""
        self.daemon.kill()
        self.start_again()

    def kill_supervisor(self) -> None:
        """Kill the supervisor alone, whose workers go by themselves, and start it again."""
        with self.dying():
            self.daemon.process.kill()


@contextmanager
def named_source(
    directory: Path, *, timeouts: str = "", environment: dict[str, str] | None = None
) -> Iterator[NamedSource]:
    """Run a daemon with the migration, as yet without VMM and source.

    :param timeouts: lines of the table of that name.
    """
    authority = Authority(directory / "authority")
    server = authority.issue("server", dns=[SERVER])
    settings = tls_settings(authority, server, 'allowed_sources = ["*.hosts.example.org"]\n')
    more = f'plain_tcp = "never"\n[timeouts]\n{timeouts}\n{settings}'
    with running_daemon(directory, more, environment=environment) as daemon:
        yield NamedSource(daemon, authority)
        assert "Traceback" not in daemon.log
