"""An authority of the tests, and the certificates that it gives."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SERVER: Final = "destination.test"
"""The name in the daemon's certificate."""

SERVER_AUTH: Final = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_AUTH: Final = ExtendedKeyUsageOID.CLIENT_AUTH

_DAY: Final = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path
    serial_number: int


class Authority:
    """A certificate authority whose files are in `directory`."""

    def __init__(
        self, directory: Path, name: str = "authority", days: tuple[float, float] = (-1, 30)
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.file = directory / f"{name}.pem"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        public = self._key.public_key()
        certificate = (
            _builder(self._name, self._name, public, days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self._identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        subject: x509.Name | None = None,
        *,
        dns: Sequence[str] = (),
        days: tuple[float, float] = (-1, 30),
        directory: Path | None = None,
        passphrase: bytes = b"",
        purposes: Sequence[x509.ObjectIdentifier] = (SERVER_AUTH, CLIENT_AUTH),
        more: Sequence[x509.ExtensionType] = (),
    ) -> Issued:
        """Give a certificate, for both ends of TLS if `purposes` does not narrow that.

        :param name: of its files, and in its subject, ``CN=NAME,O=Tests``, unless that is given.
        :param dns: further names.
        :param days: from when until when it is valid, counted from now.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        if subject is None:
            subject = x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
                    x509.NameAttribute(NameOID.COMMON_NAME, name),
                ]
            )
        builder = (
            _builder(subject, self._name, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(self._identifier, critical=False)
        )
        if dns:
            names = x509.SubjectAlternativeName([x509.DNSName(each) for each in dns])
            builder = builder.add_extension(names, critical=False)
        for extension in more:
            builder = builder.add_extension(extension, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        into = directory or self.directory
        issued = Issued(into / f"{name}.pem", into / f"{name}.key", certificate.serial_number)
        issued.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        issued.key.touch(0o600)
        issued.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(passphrase)
                if passphrase
                else serialization.NoEncryption(),
            )
        )
        return issued

    def revoke(self, *issued: Issued) -> Path:
        """Return a list that says that these certificates count no more."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - _DAY)
            .next_update(now + _DAY)
        )
        for each in issued:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(each.serial_number)
                .revocation_date(now - _DAY)
                .build()
            )
        path = self.directory / "crl.pem"
        crl = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(crl.public_bytes(serialization.Encoding.PEM))
        return path


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: tuple[float, float]
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * _DAY)
        .not_valid_after(now + days[1] * _DAY)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=not authority,  # of no use to ECDSA, but QEMU 10.0 insists on it
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def tls_settings(authority: Authority, server: Issued, more: str = "") -> str:
    """The table [tls] of a configuration, to stand behind everything that belongs to no table."""
    return (
        f'[tls]\ncertificate = "{server.certificate}"\nkey = "{server.key}"\n'
        f'ca_certificates = "{authority.file}"\n{more}'
    )


def client_context(authority: Authority, issued: Issued | None) -> ssl.SSLContext:
    """What a source with that certificate, or with none, connects with."""
    context = ssl.create_default_context(cafile=str(authority.file))
    if issued is not None:
        context.load_cert_chain(issued.certificate, issued.key)
    return context
