"""The options of `postcopyctl send` about TLS."""

from __future__ import annotations

import argparse
import ssl
from contextlib import suppress
from typing import Final

from postcopyd.daemon.config import Tls as Settings
from postcopyd.daemon.tls_files import TlsFilesError, client_context, signature
from postcopyd.outgoing.tls import Tls
from postcopyd.wire.address import Address

_OPTIONS: Final = {
    "ca_certificates": "--tls-ca-certificates",
    "certificate": "--tls-certificate",
    "key": "--tls-key",
    "name": "--tls-hostname",
}


def register(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("TLS")
    group.add_argument(
        _OPTIONS["ca_certificates"],
        default="",
        metavar="FILE",
        help="speak TLS, with a destination whose certificate one of these authorities has given",
    )
    group.add_argument(
        _OPTIONS["certificate"],
        default="",
        metavar="FILE",
        help="our own certificate, with those that lead to its authority",
    )
    group.add_argument(_OPTIONS["key"], default="", metavar="FILE", help="its private key")
    group.add_argument(
        _OPTIONS["name"],
        default="",
        metavar="NAME",
        help="the name in the destination's certificate (default: the host in --to)",
    )


class WrongUsage(Exception):
    """The options contradict each other."""


class _Files:
    """The files of TLS, read anew when they have changed: an outage may outlast a certificate."""

    def __init__(self, settings: Settings) -> None:
        """Read them.

        :raise TlsFilesError: if they are of no use.
        """
        self._settings = settings
        self._signature = signature(settings)
        self._context = client_context(settings)

    def context(self) -> ssl.SSLContext:
        """Return what the next handshake is made with; the one before if the files are no good."""
        if (now := signature(self._settings)) != self._signature:
            self._signature = now
            with suppress(TlsFilesError):
                self._context = client_context(self._settings)
        return self._context


def from_arguments(arguments: argparse.Namespace) -> Tls | None:
    """Return how to speak TLS; None if that is not asked for.

    :raise WrongUsage: if options contradict each other.
    :raise ValueError: naming the option whose file is of no use.
    """
    given = {
        key: str(getattr(arguments, option.strip("-").replace("-", "_")))
        for key, option in _OPTIONS.items()
    }
    to: Address = arguments.to
    if not any(given.values()):
        return None
    if to.kind == "unix":
        raise WrongUsage(f"TLS is spoken over TCP alone, not at {to}")
    if not given["ca_certificates"]:
        raise WrongUsage(
            f"without {_OPTIONS['ca_certificates']} nobody can tell the destination from another"
        )
    if bool(given["certificate"]) is not bool(given["key"]):
        raise WrongUsage(f"{_OPTIONS['certificate']} and {_OPTIONS['key']} go together")
    settings = Settings(given["certificate"], given["key"], given["ca_certificates"])
    try:
        return Tls(_Files(settings).context, given["name"] or to.host)
    except TlsFilesError as error:
        raise ValueError(f"{_OPTIONS[error.setting]}: {error.reason}") from None
