"""The files of TLS: certificate, key, CA certificates and CRL, and what is wrong with them."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn

import msgspec

from postcopyd.daemon.config_problems import ConfigurationError, Lines, Problem

if TYPE_CHECKING:
    from postcopyd.daemon.config import Tls

_MARKS: Final = {
    "certificate": (b"-----BEGIN CERTIFICATE-----", "certificate"),
    "key": (b"PRIVATE KEY-----", "private key"),
    "ca_certificates": (b"-----BEGIN CERTIFICATE-----", "certificate"),
    "crl": (b"-----BEGIN X509 CRL-----", "certificate revocation list"),
}
_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED of openssl/x509_vfy.h
_NOT_YET_VALID: Final = 9

_Role = Literal["server", "client"]

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TlsFilesError(Exception):
    """The files are of no use; the text says which setting is wrong, and how."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"tls.{setting}: {reason}")
        self.setting = setting
        self.reason = reason


class TlsFiles(msgspec.Struct, frozen=True):
    """The files as they were when they were read."""

    context: ssl.SSLContext
    """Makes the server's side of a connection whose other side must have a certificate."""
    outdated: tuple[TlsFilesError, ...]
    """What can be used, but will not be accepted."""
    exposed: tuple[TlsFilesError, ...]
    """What others can read."""

    @classmethod
    def load(cls, settings: Tls) -> TlsFiles:
        """Read the files that `settings` name.

        :raise TlsFilesError: if they cannot be used.
        """
        _check_marks(settings)
        with _that_are_changed_meanwhile():
            context = _context(settings)
            outdated = _outdated(context, settings, "server")
            return cls(context, tuple(outdated), tuple(_exposed(settings)))


def client_context(settings: Tls) -> ssl.SSLContext:
    """Return what makes the source's side of a connection, from the files that `settings` name.

    Its certificate and key may be left out; a destination that asks for them refuses it then.

    :raise TlsFilesError: if they cannot be used, or nobody would accept them.
    """
    _check_marks(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = _VERSIONS[settings.minimum_version]
    with _that_are_changed_meanwhile():
        if settings.certificate:
            _load_identity(context, settings)
        _load_authorities(context, settings)
        for outdated in _outdated(context, settings, "client"):
            raise outdated
    return context


@contextmanager
def _that_are_changed_meanwhile() -> Iterator[None]:
    """Have files that could be read a moment ago told as no longer usable, whatever goes wrong."""
    try:
        yield
    except OSError as error:
        what = f"the files change while they are read: {error.strerror or error}"
        raise TlsFilesError("certificate", what) from None


def signature(settings: Tls) -> dict[str, tuple[int, ...]]:
    """Return, for each setting that names a file, what changes when it is changed or replaced."""
    return {setting: _signature(getattr(settings, setting)) for setting in _MARKS}


def _signature(path: str) -> tuple[int, ...]:
    try:
        status = Path(path).stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsFilesError(setting, f"cannot read {path}: {error.strerror}") from None


def _check_marks(settings: Tls) -> None:
    for setting, (mark, what) in _MARKS.items():
        path: str = getattr(settings, setting)
        if path and mark not in _read(setting, path):
            raise TlsFilesError(setting, f"there is no {what} in PEM in {path}")


def _context(settings: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[settings.minimum_version]
    context.verify_mode = ssl.CERT_REQUIRED
    # Every connection makes its own handshake (qemu-wire, 5.6): a ticket would only be written.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    _load_identity(context, settings)
    _load_authorities(context, settings)
    if settings.crl:
        _load_crl(context, settings.crl)
    return context


def _load_identity(context: ssl.SSLContext, settings: Tls) -> None:
    def no_passphrase() -> NoReturn:
        raise TlsFilesError("key", f"{settings.key} is encrypted, and nobody is here to decrypt it")

    try:
        context.load_cert_chain(settings.certificate, settings.key, no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            what = f"{settings.key} is not the key of {settings.certificate}"
        else:
            what = f"{settings.certificate} and {settings.key} cannot be used: {error.reason}"
        raise TlsFilesError("key", what) from None


def _load_authorities(context: ssl.SSLContext, settings: Tls) -> None:
    try:
        context.load_verify_locations(settings.ca_certificates)
    except ssl.SSLError as error:
        what = f"{settings.ca_certificates} cannot be used: {error.reason}"
        raise TlsFilesError("ca_certificates", what) from None
    if not context.get_ca_certs(binary_form=True):
        what = f"no certificate in {settings.ca_certificates} is that of a certificate authority"
        raise TlsFilesError("ca_certificates", what)


def _load_crl(context: ssl.SSLContext, path: str) -> None:
    certificates = context.cert_store_stats()["x509"]
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsFilesError("crl", f"{path} cannot be used: {error.reason}") from None
    if context.cert_store_stats()["x509"] != certificates:
        raise TlsFilesError("crl", f"{path} has certificates, which would be trusted, beside CRLs")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _outdated(context: ssl.SSLContext, settings: Tls, role: _Role) -> list[TlsFilesError]:
    found = []
    why = _refusal_of_certificate(settings, role) if settings.certificate else None
    if why is not None:
        found.append(TlsFilesError("certificate", f"{settings.certificate} {why}"))
    now = time.time()
    valid = (
        ssl.cert_time_to_seconds(str(certificate["notBefore"]))
        <= now
        <= ssl.cert_time_to_seconds(str(certificate["notAfter"]))
        for certificate in context.get_ca_certs()
    )
    if not any(valid):
        what = f"no certificate authority in {settings.ca_certificates} is valid today"
        found.append(TlsFilesError("ca_certificates", what))
    return found


def _refusal_of_certificate(settings: Tls, role: _Role) -> str | None:
    """Return why somebody who trusts just this certificate would not accept it; None if he does.

    Tried in a handshake with ourselves: `ssl` tells nothing of a certificate of our own.

    :param role: what it is to be the certificate of.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for each in (server, client):
        each.load_cert_chain(settings.certificate, settings.key)
    judge = client if role == "server" else server
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    judge.load_verify_locations(settings.certificate)
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(here, there), server.wrap_bio(there, here, server_side=True))
    for end in (*ends, *ends):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == _EXPIRED:
                return "has expired"
            if error.verify_code == _NOT_YET_VALID:
                return "is not valid yet"
            return f"will not be accepted: {error.verify_message}"
        except ssl.SSLError as error:
            return f"cannot be used: {error.reason}"
    return None


def _exposed(settings: Tls) -> list[TlsFilesError]:
    if Path(settings.key).stat().st_mode & 0o007:
        what = f"every user can read or replace {settings.key}: chmod o= {settings.key}"
        return [TlsFilesError("key", what)]
    return []


def check_files(path: Path, settings: Tls) -> None:
    """Look into the files that the configuration at `path` names, as the user who asks.

    :raise ConfigurationError: naming everything that is wrong with them.
    """
    if not settings.certificate:
        return
    try:
        files = TlsFiles.load(settings)
        found = [*files.outdated, *files.exposed]
    except TlsFilesError as error:
        found = [error]
    if found:
        lines = Lines(path.read_text(encoding="utf-8"))
        problems = [Problem(lines.of(("tls", each.setting)), str(each)) for each in found]
        raise ConfigurationError(str(path), problems)
