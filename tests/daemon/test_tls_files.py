"""The files of TLS: what is wrong with them is told, with the setting that names them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopyd.daemon import tls_files
from postcopyd.daemon.config import Tls
from postcopyd.daemon.tls_files import TlsFiles, TlsFilesError, client_context, signature
from tests.certificates import CLIENT_AUTH, SERVER_AUTH, Authority, Issued


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings(authority: Authority, issued: Issued, **more: str) -> Tls:
    return Tls(
        **{
            "certificate": str(issued.certificate),
            "key": str(issued.key),
            "ca_certificates": str(authority.file),
            **more,
        }  # type: ignore[arg-type]
    )


def wrong(tls: Tls) -> str:
    with pytest.raises(TlsFilesError) as caught:
        TlsFiles.load(tls)
    return str(caught.value)


def test_good_files_are_all_right(authority: Authority) -> None:
    issued = authority.issue("server")
    revoked = authority.revoke(authority.issue("other"))
    files = TlsFiles.load(settings(authority, issued, crl=str(revoked), minimum_version="1.3"))
    assert files.outdated == files.exposed == ()
    assert files.context.verify_mode is ssl.CERT_REQUIRED
    assert files.context.minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("setting", ["certificate", "key", "ca_certificates", "crl"])
def test_a_file_that_is_not_there_is_named(authority: Authority, setting: str) -> None:
    tls = settings(authority, authority.issue("server"), **{setting: "/no/such/file"})
    assert wrong(tls) == f"tls.{setting}: cannot read /no/such/file: No such file or directory"


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("certificate", "certificate"),
        ("key", "private key"),
        ("ca_certificates", "certificate"),
        ("crl", "certificate revocation list"),
    ],
)
def test_a_file_with_something_else_is_named(
    authority: Authority, tmp_path: Path, setting: str, what: str
) -> None:
    (tmp_path / "other").write_text("something else")
    tls = settings(authority, authority.issue("server"), **{setting: f"{tmp_path}/other"})
    assert wrong(tls) == f"tls.{setting}: there is no {what} in PEM in {tmp_path}/other"


def test_a_key_of_another_certificate_is_told(authority: Authority) -> None:
    server, other = authority.issue("server"), authority.issue("other")
    tls = settings(authority, server, key=str(other.key))
    assert wrong(tls) == f"tls.key: {other.key} is not the key of {server.certificate}"


def test_a_key_that_is_encrypted_is_told_and_nobody_is_asked(authority: Authority) -> None:
    server = authority.issue("server", passphrase=b"secret")
    assert "is encrypted, and nobody is here to decrypt it" in wrong(settings(authority, server))


def test_a_damaged_file_is_told(authority: Authority, tmp_path: Path) -> None:
    server = authority.issue("server")
    lines = authority.file.read_text().splitlines()
    authority.file.write_text("\n".join([lines[0], "AAAA" + lines[1][4:], *lines[2:]]))
    assert wrong(settings(authority, server)).startswith("tls.ca_certificates: ")


def test_a_certificate_that_is_no_authority_is_told(authority: Authority) -> None:
    server = authority.issue("server")
    tls = settings(authority, server, ca_certificates=str(server.certificate))
    assert "is that of a certificate authority" in wrong(tls)


def test_certificates_beside_a_revocation_list_are_refused(
    authority: Authority, tmp_path: Path
) -> None:
    revoked = authority.revoke()
    revoked.write_bytes(revoked.read_bytes() + Authority(tmp_path, "other").file.read_bytes())
    tls = settings(authority, authority.issue("server"), crl=str(revoked))
    assert "has certificates, which would be trusted" in wrong(tls)


@pytest.mark.parametrize(
    ("days", "expected"), [((-9, -1), "has expired"), ((1, 9), "is not valid yet")]
)
def test_a_certificate_of_another_time_is_told(
    authority: Authority, days: tuple[float, float], expected: str
) -> None:
    server = authority.issue("server", days=days)
    (doubt,) = TlsFiles.load(settings(authority, server)).outdated
    assert str(doubt) == f"tls.certificate: {server.certificate} {expected}"


def test_each_side_has_a_certificate_for_its_side(authority: Authority) -> None:
    for_clients = settings(authority, authority.issue("client", purposes=[CLIENT_AUTH]))
    for_servers = settings(authority, authority.issue("server", purposes=[SERVER_AUTH]))
    client_context(for_clients)
    assert TlsFiles.load(for_servers).outdated == ()
    (doubt,) = TlsFiles.load(for_clients).outdated
    with pytest.raises(TlsFilesError) as caught:
        client_context(for_servers)
    for said in (str(doubt), str(caught.value)):
        assert "will not be accepted: unsuitable certificate purpose" in said


def test_an_authority_of_another_time_is_told(tmp_path: Path) -> None:
    old = Authority(tmp_path, days=(-9, -1))
    (doubt,) = TlsFiles.load(settings(old, old.issue("server"))).outdated
    assert doubt.setting == "ca_certificates"
    assert "is valid today" in str(doubt)


def test_a_key_that_everybody_can_read_is_told(authority: Authority) -> None:
    server = authority.issue("server")
    server.key.chmod(0o644)
    (doubt,) = TlsFiles.load(settings(authority, server)).exposed
    assert str(doubt).startswith(f"tls.key: every user can read or replace {server.key}: chmod")


@pytest.mark.parametrize("load", [TlsFiles.load, client_context])
def test_a_file_that_vanishes_while_they_are_read_is_told(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, load: Callable[[Tls], object]
) -> None:
    tls = settings(authority, authority.issue("server"))

    def checked_and_gone(tls: Tls) -> None:
        Path(tls.key).unlink()

    monkeypatch.setattr(tls_files, "_check_marks", checked_and_gone)
    with pytest.raises(TlsFilesError, match="the files change while they are read: No such file"):
        load(tls)


def test_a_replaced_file_changes_the_signature(authority: Authority) -> None:
    tls = settings(authority, authority.issue("server"))
    before = signature(tls)
    assert signature(tls) == before
    authority.issue("new").certificate.rename(tls.certificate)
    assert signature(tls) != before
    Path(tls.certificate).unlink()
    assert signature(tls) != before
