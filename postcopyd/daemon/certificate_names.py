"""The names in a certificate, and the patterns that say which of them may be a source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

_SHORT: Final = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
"""RFC 4514, 3. Any other attribute keeps the name that OpenSSL gives it."""

_ESCAPED: Final = frozenset(',+"\\<>;')
_DNS_PATTERN: Final = re.compile(r"[A-Za-z0-9*_-]+(?:\.[A-Za-z0-9*_-]+)*\Z")
_RDN: Final = re.compile(r"(?:[^\\,]|\\.)+", re.DOTALL)
_RDN_PATTERN: Final = re.compile(r"[A-Za-z0-9.-]+=", re.ASCII)


class CertificateName(msgspec.Struct, frozen=True):
    """Whose certificate it is."""

    subject: str
    """The subject as RFC 4514 writes it, the most specific part first, as QEMU's `tls-authz` is
    given it: ``CN=node7,O=Example,C=DE``. Empty if it has none."""
    dns: tuple[str, ...]
    """The DNS names among its subject alternative names."""

    def __str__(self) -> str:
        return self.subject or ", ".join(self.dns) or "nobody"


def name_in(certificate: Mapping[str, Any]) -> CertificateName:
    """Return the names in a certificate of `ssl.SSLSocket.getpeercert`."""
    parts = [
        "+".join(f"{_SHORT.get(key, key)}={_escape(value)}" for key, value in part)
        for part in reversed(certificate.get("subject", ()))
    ]
    alternatives = certificate.get("subjectAltName", ())
    return CertificateName(
        ",".join(parts), tuple(name for kind, name in alternatives if kind == "DNS")
    )


def _escape(value: str) -> str:
    """Write an attribute's value so that it cannot be taken for two (RFC 4514, 2.4)."""
    last = len(value) - 1
    return "".join(
        f"\\{character}"
        if character in _ESCAPED
        or (character == " " and place in (0, last))
        or (character == "#" and place == 0)
        else character
        if character.isprintable()
        else "".join(f"\\{byte:02x}" for byte in character.encode(errors="surrogatepass"))
        for place, character in enumerate(value)
    )


class AllowedNames:
    """Patterns of names: a certificate of which one name matches one pattern is allowed.

    A pattern with ``=`` is for the whole subject, any other for a DNS name. ``*`` stands for any
    characters within one part: between two commas of a subject, two dots of a DNS name.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        """Take the patterns; without any every certificate is allowed.

        :raise ValueError: naming the first that is none.
        """
        self._dns: list[re.Pattern[str]] = []
        self._subjects: list[tuple[re.Pattern[str], ...]] = []
        for pattern in patterns:
            if "=" in pattern:
                self._subjects.append(_subject_pattern(pattern))
            elif _DNS_PATTERN.match(pattern):
                self._dns.append(_with_wildcards(pattern, r"[^.]*", re.IGNORECASE))
            else:
                raise ValueError(
                    f"{pattern!r} is neither a DNS name, such as node7.example.org, nor the "
                    "subject of a certificate, such as CN=node7,O=Example"
                )

    def allow(self, name: CertificateName) -> bool:
        """Tell whether the owner of a certificate is one of them."""
        if not (self._dns or self._subjects):
            return True
        parts = _RDN.findall(name.subject)
        return any(pattern.fullmatch(dns) for pattern in self._dns for dns in name.dns) or any(
            len(patterns) == len(parts)
            and all(pattern.fullmatch(part) for pattern, part in zip(patterns, parts, strict=True))
            for patterns in self._subjects
        )


def _subject_pattern(pattern: str) -> tuple[re.Pattern[str], ...]:
    parts = _RDN.findall(pattern)
    if ",".join(parts) != pattern or not all(map(_RDN_PATTERN.match, parts)):
        raise ValueError(
            f"{pattern!r} is not the subject of a certificate, which is written as in "
            "CN=node7,O=Example,C=DE"
        )
    return tuple(_with_wildcards(part, ".*", re.DOTALL) for part in parts)


def _with_wildcards(text: str, anything: str, flags: re.RegexFlag) -> re.Pattern[str]:
    first, *others = map(re.escape, text.split("*"))
    if not others:
        return re.compile(first, flags)
    # Each piece is taken where it comes first, and that is not tried again (an atomic group): else
    # a name of many pieces that almost fits takes longer than anybody waits for a handshake.
    *between, last = others
    pieces = "".join(f"(?>{anything}?{piece})" for piece in between)
    return re.compile(f"{first}{pieces}{anything}{last}", flags)
