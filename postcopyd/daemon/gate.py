"""Who may be a source: by the certificate over TLS, by the user over a Unix socket.

Which of these a listener asks for is the configuration's to say, never the peer's. Plain TCP, where
nobody can be asked, is taken only where `plain_tcp` allows it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from typing import Literal

from postcopyd.daemon.certificate_names import AllowedNames, name_in
from postcopyd.daemon.config import Configuration
from postcopyd.daemon.sockets import takes_plain_tcp
from postcopyd.daemon.tls_connection import TlsConnection
from postcopyd.daemon.tls_handshake import Handshakes
from postcopyd.daemon.tls_identity import TlsIdentity
from postcopyd.incoming.connection import Connection
from postcopyd.incoming.stream import prepare
from postcopyd.vmm.peer import AllowedPeers, peer_of
from postcopyd.wire.address import Address

Security = Literal["unix", "plain", "tls"]


class NotSecure(Exception):
    """No source may be waited for so; the text says why, `hint` what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class GateRules:
    """What the configuration says of sources, for all migrations."""

    def __init__(self, configuration: Configuration, users: AllowedPeers) -> None:
        """Read the files of TLS, if there are any.

        :param users: who may be a source over a Unix socket.
        :raise TlsFilesError: if they cannot be used.
        """
        self.identity = TlsIdentity(configuration.tls) if configuration.tls.certificate else None
        self.names = AllowedNames(configuration.tls.allowed_sources)
        self.users = users
        self.handshake_timeout = configuration.timeouts.handshake
        self.fault_window = configuration.engine_settings().fault_window
        self._plain_tcp = configuration.plain_tcp

    def security_of(self, address: Address, named: bool) -> Security:
        """Return what a listener at `address` asks of its sources.

        :param named: that only certain names in certificates may be.
        :raise NotSecure: if it cannot be asked.
        """
        if address.kind == "unix":
            security: Security = "unix"
        elif takes_plain_tcp(address, self._plain_tcp):
            security = "plain"
        elif self.identity is not None:
            security = "tls"
        else:
            raise NotSecure(
                f"at {address} whoever reaches it could be the source, and whoever is on the way "
                "read the guest's memory: plain TCP is not allowed there",
                "set up [tls] in the configuration, listen on 127.0.0.1 or a Unix socket, or set "
                'plain_tcp = "always" if all of that network is trusted (postcopyd.toml(5))',
            )
        if named and security != "tls":
            raise NotSecure(
                f"at {address} no source shows a certificate, so none can be allowed by name",
                "listen where TLS is spoken: plain_tcp and [tls] in postcopyd.toml(5) tell",
            )
        return security

    async def reload(self) -> None:
        """Read the files of TLS anew."""
        if self.identity is not None:
            await self.identity.reload()

    def close(self) -> None:
        """Give back what was taken for TLS; no gate may be open any more."""
        if self.identity is not None:
            self.identity.close()


class Gate:
    """Lets sources in to one migration. Whoever may not be one is closed."""

    def __init__(
        self,
        rules: GateRules,
        security: Security,
        names: AllowedNames,
        *,
        let_in: Callable[[Connection, str], None],
        refused: Callable[[str, str], None],
        expect: Callable[[socket.socket], Callable[[bool], None]],
    ) -> None:
        """Ask what `security` says.

        :param names: that a certificate may have, beside what the rules say.
        :param let_in: takes a connection over and is told who it is, such as
            ``192.0.2.1:40123, CN=node7``.
        :param refused: told who it was and why.
        :param expect: told of a connection that may be let in soon. As in `Handshakes`.
        """
        self.security = security
        self._rules = rules
        self._names = names
        self._let_in = let_in
        self._refused = refused
        self._handshakes: Handshakes | None = None
        if security == "tls":
            assert rules.identity is not None
            self._handshakes = Handshakes(
                rules.identity,
                rules.handshake_timeout,
                done=self._shaken,
                refused=refused,
                expect=expect,
            )

    def take(self, connection: socket.socket) -> None:
        """Take over a connection that was accepted; non-blocking."""
        try:
            if self.security == "unix":
                self._take_local(connection)
                return
            host, port = connection.getpeername()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if self._handshakes is None:
                self._let_in(connection, address)
                return
            # The source may send its first pages right behind its handshake.
            prepare(connection, self._rules.fault_window)
            self._handshakes.begin(connection, address)
        except OSError as error:
            connection.close()
            if error.errno != errno.ENOTCONN:  # it has gone already: there is nobody to refuse
                self._refused("unknown", str(error))

    def _take_local(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        reason = self._rules.users.refusal(peer, "be a source")
        if reason is None:
            self._let_in(connection, str(peer))
        else:
            connection.close()
            self._refused(str(peer), reason)

    def _shaken(self, tls: ssl.SSLSocket, address: str) -> None:
        try:
            name = name_in(tls.getpeercert() or {})
        except ValueError as error:  # an authority may put bytes there that are no text
            tls.close()
            self._refused(address, f"the names in its certificate cannot be read: {error}")
            return
        peer = f"{address}, {name}"
        connection = TlsConnection(tls)
        if self._rules.names.allow(name) and self._names.allow(name):
            self._let_in(connection, peer)
            return
        connection.close()
        self._refused(
            peer,
            f"its certificate is valid, but neither its subject {name.subject!r} nor its DNS names "
            f"({', '.join(name.dns) or 'none'}) are among the allowed sources",
        )

    async def close(self) -> None:
        """Give up the handshakes that are under way."""
        if self._handshakes is not None:
            await self._handshakes.close()
