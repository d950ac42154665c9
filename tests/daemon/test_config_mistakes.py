"""Every mistake in a configuration is told, with its line and what to write instead."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.daemon.config import load, parse
from postcopyd.daemon.config_problems import ConfigurationError, Lines

TLS = "[tls]\ncertificate = '/c'\nkey = '/k'\nca_certificates = '/a'\n"


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parse(text, "postcopyd.toml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'contol = "/run/c"',
            "postcopyd.toml:1: there is no setting 'contol'; did you mean 'control'?",
        ),
        (
            "# limits\n[limits]\n\npakage_mib = 1",
            "postcopyd.toml:4: there is no setting 'pakage_mib' in [limits]; "
            "did you mean 'package_mib'?",
        ),
        (
            "level = 'info'",
            "postcopyd.toml:1: there is no setting 'level'; there is log.level",
        ),
        (
            "[log]\nzzz = 1",
            "postcopyd.toml:2: there is no setting 'zzz' in [log]; there are: level, format",
        ),
        ("[limts]\nmigrations = 1", "postcopyd.toml:1: there is no setting 'limts'; did you"),
        (
            "limits.migrations = 0",
            "postcopyd.toml:1: limits.migrations must be a number from 1 to 4096; it is 0",
        ),
        (
            "\n[timeouts]\nvmm = '60'",
            "postcopyd.toml:3: timeouts.vmm must be seconds, 0.1 to 86400; it is '60'",
        ),
        ("[timeouts]\nvmm = nan", "postcopyd.toml:2: timeouts.vmm must be seconds"),
        ("[timeouts]\nvmm = inf", "postcopyd.toml:2: timeouts.vmm must be seconds"),
        ("control_mode = 660", "postcopyd.toml:1: control_mode must be the permissions of a file"),
        ("memory_lock = 1", "postcopyd.toml:1: memory_lock must be true or false; it is 1"),
        ("limits.migrations = true", "postcopyd.toml:1: limits.migrations must be a number from"),
        ("handoff_users = 'root'", "postcopyd.toml:1: handoff_users must be a list of users"),
        ("log = 'info'", "postcopyd.toml:1: log is a table, written [log]"),
        (
            "[migration]\nname = 'vm0'",
            "postcopyd.toml:1: migration is a list of tables, each written [[migration]]",
        ),
        ("[[migration]]\nlisten = ''", "postcopyd.toml:1: migration has no 'name'"),
        (
            "[[migration]]\nname = 'vm 0'",
            "postcopyd.toml:2: migration.name: 'vm 0' is not a name for a migration, which is 1 to",
        ),
        (
            "[[migration]]\nname = 'a'\n\n[[migration]]\nname = 'b'\nlisten = 'tcp:1.2.3.4'",
            "postcopyd.toml:6: migration.listen: 'tcp:1.2.3.4' has no port",
        ),
        (
            "listen = 'tcp:host.example:1'",
            "postcopyd.toml:1: listen: 'tcp:host.example:1': 'host.example' is a name",
        ),
        ("listen = 'unix:relative'", "postcopyd.toml:1: listen: 'unix:relative': the path must"),
        ("control = 'relative'", "postcopyd.toml:1: control: 'relative' is not an absolute path"),
        (f"control = '/{'x' * 107}'", "postcopyd.toml:1: control: '/xxx"),
        (
            "control_users = [\n 'root',\n 'no-such-user'\n]",
            "postcopyd.toml:1: control_users: there is no user 'no-such-user' on this host",
        ),
        (
            "control_group = 'no-such-group'",
            "postcopyd.toml:1: control_group: there is no group 'no-such-group' on this host",
        ),
        ("a = 1\nb = \n", "postcopyd.toml:2: not TOML: Invalid value"),
        ("a = 'x", "postcopyd.toml: not TOML: "),
        (
            "control = '/run/same'\nhandoff = '/run/same'",
            "postcopyd.toml:2: handoff is the control socket's path",
        ),
        (
            "[[migration]]\nname = 'a'\n[[migration]]\nname = 'a'",
            "postcopyd.toml:4: there are two migrations named 'a'",
        ),
        (
            "[[migration]]\nname = 'a'\nhandoff = '/run/postcopyd/control.sock'",
            "postcopyd.toml:3: '/run/postcopyd/control.sock' is the path of another socket",
        ),
        (
            "plain_tcp = 'sometimes'",
            'postcopyd.toml:1: plain_tcp must be one of "loopback", "always", "never"; it is',
        ),
        (
            "\nlisten = 'tcp:0.0.0.0:0'",
            "postcopyd.toml:2: no source can come to tcp:0.0.0.0:0: there is no [tls], and",
        ),
        (
            "plain_tcp = 'never'\nlisten = 'unix:/run/a'\n"
            "[[migration]]\nname = 'a'\n[[migration]]\nname = 'b'\nlisten = 'tcp:[::1]:0'",
            "postcopyd.toml:7: no source can come to tcp:[::1]:0",
        ),
        (
            "plain_tcp = 'never'\n[[migration]]\nname = 'a'",
            "postcopyd.toml: no source can come to tcp:127.0.0.1:0",
        ),
        (
            "[tls]\ncertificate = '/c'",
            "postcopyd.toml:1: [tls] has no key and no ca_certificates",
        ),
        (
            "[tls]\nallowed_sources = ['CN=a']",
            "postcopyd.toml:1: [tls] has no certificate and no key and no ca_certificates",
        ),
        ("[tls]\nkey = 'k'", "postcopyd.toml:2: tls.key: 'k' is not an absolute path"),
        (
            f"plain_tcp = 'always'\n{TLS}",
            'postcopyd.toml:1: [tls] is of no use with plain_tcp = "always"',
        ),
        (
            f"{TLS}allowed_sources = ['node 7']",
            "postcopyd.toml:5: tls.allowed_sources: 'node 7' is neither a DNS name",
        ),
        (
            f"{TLS}[[migration]]\nname = 'a'\nallowed_sources = ['CN=a']",
            "postcopyd.toml:7: no source shows a certificate at tcp:127.0.0.1:0",
        ),
    ],
)
def test_a_mistake_names_its_line_and_what_is_right(text: str, expected: str) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith(expected)


def test_all_mistakes_are_told_at_once() -> None:
    told = mistakes('contrl = ""\n[limits]\nended = -1\n[log]\nformat = "xml"\n')
    assert [line.partition(": ")[0] for line in told] == [
        "postcopyd.toml:1",
        "postcopyd.toml:3",
        "postcopyd.toml:5",
    ]


def test_a_file_that_is_not_text_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"binary\.toml: not UTF-8"):
        load(path)


names = st.sampled_from(["a", "b", "log", "x-y"])
values = st.sampled_from(["1", "'text # a'", "[1,\n 2]", "'''\nb = 1\n'''", "{a = 1}"])
statements = st.lists(
    st.tuples(st.sampled_from(["", "# a = 1\n", "\n"]), names, values), unique_by=lambda s: s[1]
)


@given(statements, st.sampled_from(["", "[table]\n", "[[array]]\n"]))
def test_the_line_of_a_key_is_where_its_statement_begins(
    statements: list[tuple[str, str, str]], header: str
) -> None:
    text = header
    expected = {}
    for before, name, value in statements:
        text += before
        expected[name] = text.count("\n") + 1
        text += f"{name} = {value}\n"
    tomllib.loads(text)
    where: Any = {"": (), "[table]\n": ("table",), "[[array]]\n": ("array", 0)}[header]
    lines = Lines(text)
    assert {name: lines.of((*where, name)) for name in expected} == expected
    assert lines.of((*where, "absent")) is None
