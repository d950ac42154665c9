"""TLS between a QEMU and the daemon: the files of both, and what QEMU has to be told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.certificates import SERVER, Authority
from tests.interop.qemu import Qemu
from tests.interop.qemu_machine import Machine

_CREDENTIALS = "tls0"


def with_credentials(machine: Machine, authority: Authority, name: str, directory: Path) -> Machine:
    """The machine with a certificate of that name, in the files that QEMU looks for."""
    directory.mkdir()
    issued = authority.issue(name, directory=directory)
    issued.certificate.rename(directory / "client-cert.pem")
    issued.key.rename(directory / "client-key.pem")
    (directory / "ca-cert.pem").write_bytes(authority.file.read_bytes())
    words = f"tls-creds-x509,id={_CREDENTIALS},endpoint=client,verify-peer=on,dir={directory}"
    return replace(machine, extra=(*machine.extra, "-object", words))


async def speak_tls(source: Qemu) -> None:
    """Have the source migrate over TLS, to a destination whose certificate has the right name."""
    await source.execute("migrate-set-parameters", tls_creds=_CREDENTIALS, tls_hostname=SERVER)
