"""Names in certificates: how they are written, and which patterns take them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.daemon.certificate_names import AllowedNames, CertificateName, name_in

NODE = CertificateName("CN=node7,OU=Rack 3,O=Example", ("node7.example.org", "n7.example.org"))


def certificate(*parts: tuple[tuple[str, str], ...], dns: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `ssl` returns of a certificate, whose parts are in the order of its bytes."""
    return {"subject": parts, "subjectAltName": tuple(("DNS", name) for name in dns)}


def test_a_subject_is_written_with_its_most_specific_part_first() -> None:
    shown = certificate(
        (("countryName", "DE"),),
        (("organizationName", "Example"),),
        (("commonName", "node7"), ("userId", "7")),
        dns=("node7.example.org",),
    )
    shown["subjectAltName"] += (("IP Address", "192.0.2.1"),)
    name = name_in(shown)
    assert name == CertificateName("CN=node7+UID=7,O=Example,C=DE", ("node7.example.org",))


def test_a_certificate_without_a_subject_is_called_by_its_dns_names() -> None:
    assert str(name_in(certificate(dns=("a.example.org", "b.example.org")))) == (
        "a.example.org, b.example.org"
    )
    assert str(name_in({})) == "nobody"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a,O=b", r"a\,O=b"),
        ("a+UID=0", r"a\+UID=0"),
        ('"quoted"', r"\"quoted\""),
        ("back\\slash", r"back\\slash"),
        ("#1", r"\#1"),
        (" a b ", r"\ a b\ "),
        ("<a;b>", r"\<a\;b\>"),
        ("line\nline", r"line\0aline"),
        ("\u202eeman", r"\e2\80\aeeman"),
        ("Müller", "Müller"),
    ],
)
def test_a_value_cannot_be_taken_for_two_or_spoil_a_log(value: str, written: str) -> None:
    assert name_in(certificate((("commonName", value),))).subject == f"CN={written}"


@given(
    st.text(st.characters(min_codepoint=1, exclude_categories=["C", "Z"]), min_size=1, max_size=16)
)
def test_a_subject_is_written_as_others_write_it(value: str) -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value, _validate=False)])
    assert name_in(certificate((("commonName", value),))).subject == subject.rfc4514_string()


@pytest.mark.parametrize(
    "pattern",
    [
        "node7.example.org",
        "NODE7.Example.ORG",
        "node*.example.org",
        "*.example.org",
        "*.*.org",
        "CN=node7,OU=Rack 3,O=Example",
        "CN=node*,OU=*,O=Example",
    ],
)
def test_a_pattern_takes(pattern: str) -> None:
    assert AllowedNames(["nobody.example.org", pattern]).allow(NODE)


@pytest.mark.parametrize(
    "pattern",
    [
        "node7",
        "*",
        "*.org",
        "node7.example.org.evil.example",
        "node7xexample.org",
        "CN=node7",
        "CN=node7,O=Example",
        "CN=node7,*=Rack 3,O=Example",
        "CN=Node7,OU=Rack 3,O=Example",
        "O=Example,OU=Rack 3,CN=node7",
    ],
)
def test_a_pattern_does_not_take(pattern: str) -> None:
    try:
        allowed = AllowedNames([pattern])
    except ValueError:
        return
    assert not allowed.allow(NODE)


@given(
    st.lists(st.text("ab", max_size=2), min_size=1, max_size=5).map("*".join),
    st.text("ab", max_size=12),
)
def test_a_star_stands_for_any_characters(pattern: str, name: str) -> None:
    expected = re.fullmatch(".*".join(pattern.split("*")), name) is not None
    allowed = AllowedNames([f"CN={pattern}"])
    assert allowed.allow(CertificateName(f"CN={name}", ())) is expected


def test_a_pattern_of_many_stars_does_not_hold_anybody_up() -> None:
    allowed = AllowedNames(["CN=" + "*a" * 40 + "*b"])
    assert not allowed.allow(CertificateName("CN=" + "a" * 2000, ()))


def test_without_a_pattern_everybody_is_taken() -> None:
    assert AllowedNames([]).allow(NODE)
    assert AllowedNames([]).allow(CertificateName("", ()))


def test_a_common_name_with_a_comma_is_no_organization() -> None:
    evil = name_in(certificate((("commonName", "node7,O=Example"),)))
    assert not AllowedNames(["CN=*,O=Example"]).allow(evil)
    assert not AllowedNames(["CN=node7,O=Example"]).allow(evil)
    assert AllowedNames([r"CN=node7\,O=Example"]).allow(evil)


def test_a_common_name_is_no_dns_name() -> None:
    assert not AllowedNames(["node7"]).allow(name_in(certificate((("commonName", "node7"),))))


@pytest.mark.parametrize(
    "pattern", ["", "node 7", "a..b", "node7/", "CN=a,", "=a", "CN=a,b", "CN=a\\", "CN=a,,O=b"]
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is neither a DNS name|is not the subject"):
        AllowedNames([pattern])
