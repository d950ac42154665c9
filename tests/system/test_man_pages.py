"""The manual pages know every command, option, setting, exit status and log event."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from typing import get_args, get_type_hints

import msgspec
import pytest

from postcopyd.cli import postcopyctl, postcopyd
from postcopyd.daemon import control, event_log
from postcopyd.daemon.config import Configuration, StaticMigration, parse
from tests.support import ROOT

PAGES = ("postcopyd.8", "postcopyctl.1", "postcopyd.toml.5")


def text_of(page: str) -> str:
    """The page without its markup."""
    text = (ROOT / "docs" / "man" / page).read_text()
    text = re.sub(r"\\f[BRI]", "", text)
    text = re.sub(r"^\.(BR|BI|RB|RI|B|I) (.*)$", _joined, text, flags=re.MULTILINE)
    return text.replace(r"\-", "-").replace(r"\(dq", '"').replace("\\ ", " ")


def _joined(line: re.Match[str]) -> str:
    """The arguments of a macro as they are set, without the quotes."""
    words = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', line[2])]
    return (" " if len(line[1]) == 1 else "").join(words)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_sections_that_a_page_has(page: str) -> None:
    sections = re.findall(r"^\.SH (.*)$", text_of(page), re.MULTILINE)
    assert sections[0] == "NAME" and sections[-1] == "SEE ALSO"
    assert "DESCRIPTION" in sections


def settings(kind: type[msgspec.Struct]) -> Iterator[tuple[str, object]]:
    """The settings that are no tables, with their defaults."""
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        default = None if field.required else field.default
        if isinstance(default, msgspec.Struct):
            yield from settings(type(default))
        elif StaticMigration not in get_args(hints[field.name]):
            yield field.name, default


def test_every_setting_is_explained_with_its_default() -> None:
    text = text_of("postcopyd.toml.5")
    for name, default in settings(Configuration):
        if name.startswith("handoff_"):
            assert default == getattr(Configuration(), name.replace("handoff", "control"))
            assert "\nhandoff_mode, handoff_group, handoff_users\nAs for the control" in text
            continue
        assert f"\n{name} (default {_written(name, default)})\n" in text, name
    for name, _ in settings(StaticMigration):
        assert re.search(rf"^{name}(?: \(default: .*\))?$", text, re.MULTILINE), name


def _written(name: str, value: object) -> str:
    if name.endswith("_mode"):
        return f"0o{value:o}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if value == ():
        return "[]"
    return str(value) or '""'


def test_the_example_of_a_configuration_is_right() -> None:
    example = text_of("postcopyd.toml.5").partition(".nf\n.RS\n")[2].partition("\n.RE\n")[0]
    users = '"qemu", "firecracker"'
    assert users in example
    assert parse(example.replace(users, '"root"'), "example").migration[0].name == "vm0"


def commands_of_postcopyctl() -> dict[str, argparse.ArgumentParser]:
    """The parsers of its commands, by name."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for module in dict.fromkeys(postcopyctl.MODULES.values()):
        importlib.import_module(module).register(subparsers)
    return dict(subparsers.choices)


def test_every_command_and_option_of_postcopyctl_is_explained() -> None:
    text = text_of("postcopyctl.1")
    commands = commands_of_postcopyctl()
    assert list(commands) == list(postcopyctl.MODULES)
    for name, parser in commands.items():
        assert re.search(rf"^{name}\b", text, re.MULTILINE), name
        for action in parser._actions:
            for option in action.option_strings:
                assert option in text, f"{name} {option}"


@pytest.mark.parametrize(
    ("page", "statuses"),
    [
        (
            "postcopyctl.1",
            {
                0,
                2,
                postcopyctl.FAILED,
                postcopyctl.REFUSED,
                postcopyctl.UNREACHABLE,
                postcopyctl.INTERRUPTED,
            },
        ),
        ("postcopyd.8", {0, postcopyd.FAILED, postcopyd.WRONG}),
    ],
)
def test_every_exit_status_is_explained(page: str, statuses: set[int]) -> None:
    section = text_of(page).partition("\n.SH EXIT STATUS\n")[2].partition("\n.SH")[0]
    assert {int(number) for number in re.findall(r"^\d+$", section, re.MULTILINE)} == statuses


def test_every_log_event_is_listed_with_its_identifier() -> None:
    listed = re.findall(r"^[0-9a-f]{32}$", text_of("postcopyd.8"), re.MULTILINE)
    assert sorted(listed) == sorted(event_log.MESSAGE_IDS)


def test_every_error_code_and_path_of_the_control_api_is_listed() -> None:
    section = text_of("postcopyd.8").partition("\n.SH THE CONTROL API\n")[2].partition("\n.SH")[0]
    for code in control.ERROR_STATUSES:
        assert code in section, code
    table = control.__doc__ or ""
    for method, path in re.findall(r"^(GET|POST|DELETE) (/v1/[^?\s]*)", table, re.MULTILINE):
        assert f"{method} {path}" in section, path
