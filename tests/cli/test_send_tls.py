"""`postcopyctl send` over TLS, to a daemon that takes nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import SERVER, Authority, Issued, tls_settings
from tests.cutting_relay import Cut, CuttingRelay
from tests.daemon.daemon_process import RunningDaemon, running_daemon
from tests.daemon.whole_migration import Image, assert_sent, running_guest
from tests.support import LIMIT, wait_until

pytestmark = pytest.mark.timeout(60)


@dataclass
class World:
    """A daemon, the authority that it believes, and an image to send."""

    daemon: RunningDaemon
    authority: Authority
    good: Issued
    image: Image

    def options(
        self,
        issued: Issued | None = None,
        name: str = SERVER,
        authority: Authority | None = None,
    ) -> list[str]:
        """With which its source is let in, unless another certificate or name is given."""
        issued = issued or self.good
        return [
            *("--tls-ca-certificates", str((authority or self.authority).file)),
            *("--tls-certificate", str(issued.certificate), "--tls-key", str(issued.key)),
            *("--tls-hostname", name),
        ]


@contextmanager
def running_world(
    tmp_path: Path, more: str = "", days: tuple[float, float] = (-1, 30)
) -> Iterator[World]:
    """`more` is of the table [tls]; `days` is when the daemon's certificate is valid."""
    (tmp_path / "authority").mkdir()
    authority = Authority(tmp_path / "authority")
    server = authority.issue("server", dns=[SERVER], days=days)
    settings = f'plain_tcp = "never"\n{tls_settings(authority, server, more)}'
    (tmp_path / "daemon").mkdir()
    with running_daemon(tmp_path / "daemon", settings) as daemon:
        yield World(daemon, authority, authority.issue("good"), Image(tmp_path / "image", seed=4))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with running_world(tmp_path) as world:
        yield world


def at_most(version: str, directory: Path) -> tuple[str, ...]:
    """What starts a program whose OpenSSL speaks no later version of TLS."""
    path = directory / "openssl.cnf"
    path.write_text(
        "openssl_conf = all\n[all]\nssl_conf = ssl\n[ssl]\nsystem_default = tls\n"
        f"[tls]\nMaxProtocol = {version}\n"
    )
    return ("env", f"OPENSSL_CONF={path}")


async def test_it_comes_back_with_new_certificates_when_the_old_ones_count_no_more(
    world: World,
) -> None:
    rotated = False
    believed = world.authority.directory / "believed.pem"
    shutil.copy(world.authority.file, believed)
    options = [*world.options(), "--tls-ca-certificates", str(believed)]

    def cuts() -> Iterator[Cut]:
        yield Cut(forward=2 << 20)
        while not rotated:
            yield Cut(forward=0)

    with running_guest(world.daemon, "vm0", "anonymous") as guest:
        port = int(guest.says()["listen"][0].rpartition(":")[2])
        async with CuttingRelay(port, cuts()).listening() as relay:
            sending = world.image.start_sending(f"tcp:127.0.0.1:{relay.port}", *options)
            await asyncio.to_thread(
                wait_until, lambda: world.daemon.client.show("vm0")["state"] == "paused"
            )
            new = Authority(world.authority.directory / "new")
            new.file.replace(world.authority.file)
            rotated = True
            await asyncio.to_thread(
                wait_until, lambda: "its certificate is not accepted" in world.daemon.log
            )
            issued = new.issue("good")
            issued.key.replace(world.good.key)
            issued.certificate.replace(world.good.certificate)
            _, errors = await asyncio.to_thread(sending.communicate, timeout=LIMIT)
        assert sending.returncode == 0, errors
        assert guest.says() == {"complete": True, "changed": 0}
    assert guest.memory() == world.image.memory


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_whole_migration_goes_over_tls(world: World, tmp_path: Path, version: str) -> None:
    with running_guest(world.daemon, "vm0", "anonymous") as guest:
        address = guest.says()["listen"][0]
        sending = world.image.start_sending(
            address, *world.options(), wrapper=at_most(version, tmp_path)
        )
        assert_sent(sending)
        assert guest.says() == {"complete": True, "changed": 0}
        assert guest.process.wait(LIMIT) == 0
    assert guest.memory() == world.image.memory
    assert ", CN=good,O=Tests" in world.daemon.log


async def test_it_comes_back_over_tls_after_each_break(world: World) -> None:
    with running_guest(world.daemon, "vm0", "anonymous") as guest:
        port = int(guest.says()["listen"][0].rpartition(":")[2])
        cuts = [Cut(forward=2 << 20), Cut(forward=100), Cut(forward=1 << 20, how="half-close")]
        async with CuttingRelay(port, cuts).listening() as relay:
            sending = world.image.start_sending(f"tcp:127.0.0.1:{relay.port}", *world.options())
            output, errors = await asyncio.to_thread(sending.communicate, timeout=LIMIT)
        assert sending.returncode == 0, errors
        assert relay.connections == 4
        assert json.loads(output)["reconnects"] == 2, "one broke in the middle of its handshake"
        assert guest.says() == {"complete": True, "changed": 0}
    assert guest.memory() == world.image.memory


# -- who is not believed -------------------------------------------------------------------------


NOTHING_SENT = " (phase setup; the package had not been sent: the guest can go on here)"
"""What is said beside the reason, once there has been a connection."""


def refusal(sending: subprocess.Popen[str]) -> str:
    """What is said of a migration that has not begun, and nothing else."""
    output, errors = sending.communicate(timeout=LIMIT)
    assert sending.returncode == 1, errors
    assert not json.loads(output)["completed"]
    assert "Traceback" not in errors
    line, end = errors.split("\n")
    assert not end
    return line.removeprefix("postcopyctl send: ").removesuffix(NOTHING_SENT)


MakeOptions = Callable[[World], list[str]]

REFUSED: dict[str, tuple[MakeOptions, str]] = {
    "another name": (
        lambda world: world.options(name="other.test"),
        "the destination's certificate is not accepted for other.test: Hostname mismatch, "
        "certificate is not valid for 'other.test'.",
    ),
    "another authority": (
        lambda world: world.options(authority=other_authority(world)),
        f"the destination's certificate is not accepted for {SERVER}: "
        "self-signed certificate in certificate chain",
    ),
    "no certificate": (
        lambda world: world.options()[:2] + world.options()[-2:],
        "the destination does not take us as a source: it wants to see a certificate, and was "
        "shown none",
    ),
    "a certificate of another authority": (
        lambda world: world.options(other_authority(world).issue("stranger")),
        "the destination does not take us as a source: it does not know the authority of our "
        "certificate",
    ),
}


def other_authority(world: World) -> Authority:
    directory = world.image.directory / "other"
    directory.mkdir()
    return Authority(directory)


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_who_does_not_believe_the_other_says_so_at_once(
    world: World, options: MakeOptions, reason: str
) -> None:
    world.daemon.client.create("vm0")
    address = world.daemon.client.show("vm0")["listen"][0]
    assert refusal(world.image.start_sending(address, *options(world))) == reason
    assert world.daemon.client.show("vm0")["state"] == "none"


@pytest.mark.parametrize(
    ("days", "reason"),
    [((-30, -1), "certificate has expired"), ((1, 30), "certificate is not yet valid")],
)
def test_a_destination_whose_certificate_is_not_valid_is_not_believed(
    tmp_path: Path, days: tuple[float, float], reason: str
) -> None:
    with running_world(tmp_path, days=days) as world:
        world.daemon.client.create("vm0")
        address = world.daemon.client.show("vm0")["listen"][0]
        said = refusal(world.image.start_sending(address, *world.options()))
    assert said == f"the destination's certificate is not accepted for {SERVER}: {reason}"


def test_versions_that_do_not_meet_are_named(tmp_path: Path) -> None:
    with running_world(tmp_path, 'minimum_version = "1.3"\n') as world:
        world.daemon.client.create("vm0")
        address = world.daemon.client.show("vm0")["listen"][0]
        sending = world.image.start_sending(
            address, *world.options(), wrapper=at_most("TLSv1.2", tmp_path)
        )
        assert refusal(sending) == (
            "the destination does not take us as a source: it speaks no version of TLS that we do"
        )


def test_a_destination_that_speaks_no_tls_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "authority").mkdir()
    authority = Authority(tmp_path / "authority")
    (tmp_path / "daemon").mkdir()
    with running_daemon(tmp_path / "daemon") as daemon:
        world = World(daemon, authority, authority.issue("good"), Image(tmp_path / "image", seed=4))
        daemon.client.create("vm0")
        address = daemon.client.show("vm0")["listen"][0]
        said = refusal(world.image.start_sending(address, *world.options(), "--retry-for", "0"))
    assert said.startswith("the connection was lost in its TLS handshake: ")


# -- what is given -------------------------------------------------------------------------------

FILES: dict[str, tuple[Callable[[Authority, Path], list[str]], str]] = {
    "a file that is not there": (
        lambda authority, there: ["--tls-ca-certificates", str(there / "none")],
        "--tls-ca-certificates: cannot read {0}/none: No such file or directory",
    ),
    "a file of something else": (
        lambda authority, there: ["--tls-ca-certificates", str(authority.issue("a").key)],
        "--tls-ca-certificates: there is no certificate in PEM in {0}/a.key",
    ),
    "the key of another certificate": (
        lambda authority, there: [
            *("--tls-ca-certificates", str(authority.file)),
            *("--tls-certificate", str(authority.issue("a").certificate)),
            *("--tls-key", str(authority.issue("b").key)),
        ],
        "--tls-key: {0}/b.key is not the key of {0}/a.pem",
    ),
    "a certificate that has expired": (
        lambda authority, there: [
            *("--tls-ca-certificates", str(authority.file)),
            *("--tls-certificate", str(authority.issue("a", days=(-3, -1)).certificate)),
            *("--tls-key", str(there / "a.key")),
        ],
        "--tls-certificate: {0}/a.pem has expired",
    ),
    "an encrypted key": (
        lambda authority, there: [
            *("--tls-ca-certificates", str(authority.file)),
            *("--tls-certificate", str(authority.issue("a", passphrase=b"secret").certificate)),
            *("--tls-key", str(there / "a.key")),
        ],
        "--tls-key: {0}/a.key is encrypted, and nobody is here to decrypt it",
    ),
}


@pytest.mark.parametrize(("options", "reason"), FILES.values(), ids=FILES.keys())
def test_a_file_of_no_use_is_named_before_anybody_is_asked(
    tmp_path: Path, options: Callable[[Authority, Path], list[str]], reason: str
) -> None:
    there = tmp_path / "authority"
    there.mkdir()
    image = Image(tmp_path / "image", seed=4)
    sending = image.start_sending("tcp:127.0.0.1:1", *options(Authority(there), there))
    assert refusal(sending) == reason.format(there)


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        (
            "unix:/run/destination",
            ["--tls-ca-certificates", "ca.pem"],
            "TLS is spoken over TCP alone, not at unix:/run/destination",
        ),
        (
            "tcp:node7:7000",
            ["--tls-certificate", "a.pem", "--tls-key", "a.key"],
            "without --tls-ca-certificates nobody can tell the destination from another",
        ),
        (
            "tcp:node7:7000",
            ["--tls-ca-certificates", "ca.pem", "--tls-key", "a.key"],
            "--tls-certificate and --tls-key go together",
        ),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(
    tmp_path: Path, to: str, options: list[str], reason: str
) -> None:
    sending = Image(tmp_path / "image", seed=4).start_sending(to, *options)
    output, errors = sending.communicate(timeout=LIMIT)
    assert (sending.returncode, output, errors) == (2, "", f"postcopyctl send: {reason}\n")
