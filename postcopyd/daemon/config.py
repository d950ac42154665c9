"""Every setting of the daemon, its type, its default and what it may be: all of them are here.

`config/postcopyd.toml` shows each with its default, and postcopyd.toml(5) explains it; the tests
hold the three together. How a mistake is found and told is in `config_problems.py`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from postcopyd.daemon import paths
from postcopyd.daemon.certificate_names import AllowedNames
from postcopyd.daemon.config_problems import (
    Check,
    ConfigurationError,
    Key,
    Lines,
    Problem,
    find_problems,
    line_of_syntax_error,
)
from postcopyd.daemon.sockets import (
    PlainTcp,
    check_listen,
    check_path,
    listen_address,
    takes_plain_tcp,
)
from postcopyd.incoming.settings import Settings
from postcopyd.vmm.peer import AllowedPeers

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
NAME_RULE: Final = "1 to 64 of the letters A-Z and a-z, digits, '.', '_' and '-'"

_ENGINE: Final = Settings()


def check_name(name: str) -> None:
    """Check the name of a migration.

    :raise ValueError: if it is not legal.
    """
    if not _NAME.match(name):
        raise ValueError(f"{name!r} is not a name for a migration, which is {NAME_RULE}")


def _unless_empty(check: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: check(text) if text else None


def _check_users(users: tuple[str, ...]) -> None:
    AllowedPeers(users)


def _check_group(group: str) -> None:
    AllowedPeers((), (group,))


def _check_file(path: str) -> None:
    if not Path(path).is_absolute():
        raise ValueError(f"{path!r} is not an absolute path")


def _check_sources(names: tuple[str, ...]) -> None:
    AllowedNames(names)


_Name = Annotated[
    str, Meta(description='the name of a migration in quotes, such as "vm0"'), Check(check_name)
]
_SocketPath = Annotated[
    str, Meta(description="the path of a Unix socket in quotes"), Check(check_path)
]
_OptionalSocketPath = Annotated[
    str,
    Meta(description="the path of a Unix socket in quotes"),
    Check(_unless_empty(check_path)),
]
_Mode = Annotated[
    int, Meta(ge=0, le=0o777, description="the permissions of a file in octal, such as 0o660")
]
_Group = Annotated[
    str, Meta(description="the name of a group in quotes"), Check(_unless_empty(_check_group))
]
_Users = Annotated[
    tuple[str, ...],
    Meta(description='a list of users, such as ["root", "qemu"]'),
    Check(_check_users),
]
_Listen = Annotated[
    str,
    Meta(description='an address in quotes, such as "tcp:127.0.0.1:0"'),
    Check(check_listen),
]
_OptionalListen = Annotated[
    str,
    Meta(description='an address in quotes, such as "tcp:127.0.0.1:0"'),
    Check(_unless_empty(check_listen)),
]
_OptionalFile = Annotated[
    str, Meta(description="the path of a PEM file in quotes"), Check(_unless_empty(_check_file))
]
_Directory = Annotated[
    str, Meta(description="the path of a directory in quotes"), Check(_check_file)
]
_Sources = Annotated[
    tuple[str, ...],
    Meta(description='a list of names in certificates, such as ["*.example.org", "CN=node7,O=X"]'),
    Check(_check_sources),
]
_MOST_WORKERS: Final = 8
"""Of "auto": they place more than a network brings."""
_Workers = Annotated[
    Annotated[int, Meta(ge=1, le=256)] | Literal["auto"],
    Meta(description='"auto" or a number from 1 to 256'),
]
_YesNo = Annotated[bool, Meta(description="true or false")]
_Seconds = Annotated[float, Meta(ge=0.1, le=86400.0, description="seconds, 0.1 to 86400")]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one daemon takes on."""

    migrations: Annotated[int, Meta(ge=1, le=4096, description="a number from 1 to 4096")] = 64
    """Migrations at a time, those that have ended not counted."""
    ended: Annotated[int, Meta(ge=0, le=10000, description="a number from 0 to 10000")] = 100
    """Migrations that stay listed after their end."""
    package_mib: Annotated[int, Meta(ge=1, le=1024, description="MiB, 1 to 1024")] = (
        _ENGINE.package_limit >> 20
    )
    """Largest device package that is accepted, MiB."""
    memory_gib: Annotated[int, Meta(ge=1, le=65536, description="GiB, 1 to 65536")] = (
        _ENGINE.memory_limit >> 30
    )
    """Most memory of one VMM, GiB."""
    staging_mib: Annotated[int, Meta(ge=0, le=1 << 26, description="MiB, 0 for no limit")] = (
        _ENGINE.staging_limit >> 20
    )
    """Most that is kept of one VMM's private memory before the switchover, MiB."""
    worker_staging_mib: Annotated[
        int, Meta(ge=0, le=1 << 26, description="MiB, 0 for no limit")
    ] = _ENGINE.staging_limit_together >> 20
    """Most that one worker keeps of it for all its migrations, MiB."""
    fault_window_kib: Annotated[int, Meta(ge=16, le=65536, description="KiB, 16 to 65536")] = (
        _ENGINE.fault_window >> 10
    )
    """What may queue in a TCP stream before a page that a fault waits for, KiB."""
    descriptors: Annotated[
        int, Meta(ge=256, le=1 << 20, description="a number from 256 to 1048576")
    ] = 4096
    """Descriptors that the daemon may have open."""


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Deadlines, in seconds. None of them ends a migration whose package has come."""

    vmm: _Seconds = _ENGINE.vmm_timeout
    """How long a source waits for its VMM."""
    first_byte: _Seconds = _ENGINE.first_byte_timeout
    """How long a source that has connected may stay silent."""
    idle: _Seconds = _ENGINE.idle_timeout
    """How long a source may stay silent later on."""
    alarm: _Seconds = _ENGINE.alarm_after
    """After how long without progress there is an alarm, once the package has come."""
    close: _Seconds = _ENGINE.close_timeout
    """How long a source has to close its connection when all is done."""
    handoff: _Seconds = 10.0
    """How long a VMM that has connected has to send its whole handoff."""
    break_after: Annotated[
        int, Meta(ge=2, le=3600, description="a whole number of seconds, 2 to 3600")
    ] = _ENGINE.break_after
    """After how long a TCP stream is broken whose other end does not answer."""
    path_grace: _Seconds = _ENGINE.path_grace
    """How long a link or route of a stream may be gone before it is broken."""
    handshake: _Seconds = 10.0
    """How long a source that has connected has for its TLS handshake."""


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TLS for streams over TCP. Without a certificate there is none."""

    certificate: _OptionalFile = ""
    """Our own, with those that lead to its authority."""
    key: _OptionalFile = ""
    ca_certificates: _OptionalFile = ""
    """The authorities whose certificates sources have."""
    crl: _OptionalFile = ""
    """Certificates that count no more; empty for none."""
    minimum_version: Annotated[Literal["1.2", "1.3"], Meta(description='one of "1.2", "1.3"')] = (
        "1.2"
    )
    allowed_sources: _Sources = ()
    """Names of which a source's certificate must have one; empty for no matter which."""


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is logged, and in which form."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description='one of "debug", "info", "warning", "error"'),
    ] = "info"
    format: Annotated[
        Literal["auto", "console", "json", "journal"],
        Meta(description='one of "auto", "console", "json", "journal"'),
    ] = "auto"


class StaticMigration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A migration that is there from the daemon's start."""

    name: _Name
    listen: _OptionalListen = ""
    """Where its source connects; empty for the daemon's own `listen`."""
    handoff: _OptionalSocketPath = ""
    """A handoff socket of its own, for a VMM that cannot name its migration; empty for none."""
    allowed_sources: _Sources = ()
    """Names of which its source's certificate must have one, beside those of [tls]."""


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration."""

    control: _SocketPath = paths.CONTROL
    control_mode: _Mode = 0o660
    control_group: _Group = ""
    control_users: _Users = ()
    handoff: _SocketPath = paths.HANDOFF
    handoff_mode: _Mode = 0o660
    handoff_group: _Group = ""
    handoff_users: _Users = ()
    listen: _Listen = "tcp:127.0.0.1:0"
    plain_tcp: Annotated[PlainTcp, Meta(description='one of "loopback", "always", "never"')] = (
        "loopback"
    )
    source_mode: _Mode = 0o660
    source_group: _Group = ""
    source_users: _Users = ()
    records: _Directory = paths.RECORDS
    workers: _Workers = "auto"
    memory_lock: _YesNo = True
    wait_at_shutdown: _YesNo = True
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    tls: Tls = Tls()
    log: Log = Log()
    migration: tuple[StaticMigration, ...] = ()

    def number_of_workers(self) -> int:
        """Return how many processes share the work."""
        if self.workers != "auto":
            return self.workers
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)

    def engine_settings(self) -> Settings:
        """Return what concerns a single migration."""
        return Settings(
            package_limit=self.limits.package_mib << 20,
            memory_limit=self.limits.memory_gib << 30,
            staging_limit=self.limits.staging_mib << 20,
            staging_limit_together=self.limits.worker_staging_mib << 20,
            alarm_after=self.timeouts.alarm,
            first_byte_timeout=self.timeouts.first_byte,
            idle_timeout=self.timeouts.idle,
            vmm_timeout=self.timeouts.vmm,
            close_timeout=self.timeouts.close,
            break_after=self.timeouts.break_after,
            path_grace=self.timeouts.path_grace,
            fault_window=self.limits.fault_window_kib << 10,
        )


def load(path: Path) -> Configuration:
    """Read a configuration file.

    :raise OSError: if it cannot be read.
    :raise ConfigurationError: naming every mistake, with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(str(path), [Problem(None, f"not UTF-8: {error}")]) from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Configuration:
    """Return the configuration that `text` is; `source` names it in errors.

    :raise ConfigurationError: naming every mistake, with its line.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line, what = line_of_syntax_error(error)
        raise ConfigurationError(source, [Problem(line, f"not TOML: {what}")]) from None
    lines = Lines(text)
    problems = find_problems(Configuration, table, lines)
    if not problems:
        configuration = msgspec.convert(table, Configuration)
        problems = [*_find_duplicates(configuration, lines), *_find_insecure(configuration, lines)]
        if not problems:
            return configuration
    raise ConfigurationError(source, problems)


def _find_duplicates(configuration: Configuration, lines: Lines) -> list[Problem]:
    problems = []
    names: set[str] = set()
    taken = {configuration.control}
    if configuration.handoff in taken:
        problems.append(Problem(lines.of(("handoff",)), "handoff is the control socket's path"))
    taken.add(configuration.handoff)
    for number, entry in enumerate(configuration.migration):
        if entry.name in names:
            line = lines.of(("migration", number, "name"))
            problems.append(Problem(line, f"there are two migrations named {entry.name!r}"))
        if entry.handoff and entry.handoff in taken:
            line = lines.of(("migration", number, "handoff"))
            problems.append(Problem(line, f"{entry.handoff!r} is the path of another socket"))
        names.add(entry.name)
        taken.add(entry.handoff)
    return problems


def _find_insecure(configuration: Configuration, lines: Lines) -> list[Problem]:
    """Return what would have the daemon wait for sources of which it can know nothing."""
    tls = configuration.tls
    missing = [name for name in ("certificate", "key", "ca_certificates") if not getattr(tls, name)]
    if missing and tls != Tls():
        return [Problem(lines.of(("tls",)), f"[tls] has no {' and no '.join(missing)}")]
    if not missing and configuration.plain_tcp == "always":
        what = '[tls] is of no use with plain_tcp = "always"'
        return [Problem(lines.of(("plain_tcp",)), what)]
    problems = []
    wishes: list[tuple[Key, str]] = [(("listen",), configuration.listen)]
    for number, entry in enumerate(configuration.migration):
        if entry.listen:
            wishes.append((("migration", number, "listen"), entry.listen))
        if entry.allowed_sources:
            address = listen_address(entry.listen or configuration.listen)
            if address.kind == "unix" or takes_plain_tcp(address, configuration.plain_tcp):
                line = lines.of(("migration", number, "allowed_sources"))
                what = f"no source shows a certificate at {address}, so none can be allowed by name"
                problems.append(Problem(line, what))
    for key, listen in wishes:
        address = listen_address(listen)
        secure = address.kind == "unix" or takes_plain_tcp(address, configuration.plain_tcp)
        if missing and not secure:
            what = f"no source can come to {listen}: there is no [tls], and plain_tcp asks for it"
            problems.append(Problem(lines.of(key), what))
    return problems
