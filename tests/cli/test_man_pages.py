"""The man pages: each names all that its program or file takes, and is sound roff."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from postcopyd.cli import postcopyctl, postcopyd
from postcopyd.daemon import control, event_log
from postcopyd.daemon.config import Configuration, StaticMigration, parse
from tests.support import ROOT

PAGES = ("postcopyd.8", "postcopyctl.1", "postcopyd.toml.5")
ALTERNATING = frozenset((".BR", ".BI", ".IB", ".IR", ".RB", ".RI"))
MACROS = ALTERNATING | {
    *(".TH", ".SH", ".SS", ".TP", ".TQ", ".PP", ".IP", ".RS", ".RE", ".B", ".I", ".br"),
    *(".nf", ".fi", ".EX", ".EE", ".UR", ".UE", ".MT", ".ME"),
}
PAIRS = ((".nf", ".fi"), (".RS", ".RE"), (".EX", ".EE"), (".UR", ".UE"), (".MT", ".ME"))
PROGRAMS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "postcopyd": (postcopyd.main, "postcopyd.8"),
    "postcopyctl": (postcopyctl.main, "postcopyctl.1"),
}


def source(page: str) -> str:
    return (ROOT / "docs" / "man" / page).read_text(encoding="ascii")


def plain(line: str) -> str:
    """Return a line as a reader sees it."""
    name, _, rest = line.partition(" ")
    if name in MACROS:
        words = re.findall(r'"([^"]*)"|(\S+)', rest.replace("\\ ", "\0"))
        # What alternates between two fonts is set without spaces.
        line = ("" if name in ALTERNATING else " ").join(quoted or word for quoted, word in words)
    line = re.sub(r"\\f[BIRP]", "", line)
    return line.replace("\\-", "-").replace("\\(dq", '"').replace("\\ ", " ").replace("\0", " ")


def tags(page: str) -> dict[str, list[str]]:
    """Return what each section explains: the lines under .TP and .TQ, by the section's title."""
    sections: dict[str, list[str]] = {}
    title, tag_follows = "", False
    for line in source(page).splitlines():
        if line.startswith(".SH "):
            title = plain(line)
        elif tag_follows:
            sections.setdefault(title, []).append(plain(line))
        tag_follows = line in (".TP", ".TQ")
    return sections


def names_of(page: str) -> list[str]:
    """Return every command and option that has an explanation of its own."""
    return [
        re.split(r"[ ,=\[]", part)[0]
        for section in tags(page).values()
        for tag in section
        for part in tag.split(", ")
    ]


def shown(program: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    run, _ = PROGRAMS[program]
    with pytest.raises(SystemExit) as ended:
        run([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def commands(program: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    return re.findall(r"^    ([a-z][a-z-]*)\b", shown(program, [], capsys), re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_and_option_is_explained(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PROGRAMS[program][1]
    explained = names_of(page)
    # An option of a command may stand in the tag of that command.
    in_tags = " ".join(tag for section in tags(page).values() for tag in section)
    found = commands(program, capsys)
    assert len(found) >= 2
    assert set(found) <= set(explained)
    for words in ([], *([command] for command in found)):
        options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", shown(program, words, capsys), re.M))
        assert "--help" in options
        for option in options - {"--json"}:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", in_tags), (words, option)
        assert all(option in plain_text(page) for option in options)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_command_or_option_is_explained_that_there_is_not(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PROGRAMS[program][1]
    helps = [shown(program, [], capsys)]
    helps += [shown(program, [command], capsys) for command in commands(program, capsys)]
    there_are = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(helps)))
    in_tags = " ".join(tag for section in tags(page).values() for tag in section)
    if program == "postcopyd":
        in_tags = in_tags.replace("--handoff", "")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", in_tags)) <= there_are


@pytest.mark.parametrize(
    ("page", "statuses"),
    [
        (
            "postcopyctl.1",
            {
                *(0, 2),
                postcopyctl.FAILED,
                postcopyctl.REFUSED,
                postcopyctl.UNREACHABLE,
                postcopyctl.INTERRUPTED,
            },
        ),
        ("postcopyd.8", {0, postcopyd.FAILED, postcopyd.WRONG, postcopyd.TO_BE_STARTED_AGAIN}),
    ],
)
def test_every_exit_status_is_explained(page: str, statuses: set[int]) -> None:
    assert {int(tag) for tag in tags(page)["EXIT STATUS"]} == statuses


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_exit_status_that_the_help_names_is_explained(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = re.findall(r"[:,]\s+(\d+) ", shown(program, [], capsys).partition("exit status")[2])
    assert len(told) >= 3
    assert set(told) <= set(tags(PROGRAMS[program][1])["EXIT STATUS"])


def test_every_log_event_is_listed_with_its_identifier() -> None:
    listed = re.findall(r"^[0-9a-f]{32}$", plain_text("postcopyd.8"), re.MULTILINE)
    assert sorted(listed) == sorted(event_log.MESSAGE_IDS)


def test_every_error_code_and_path_of_the_control_api_is_listed() -> None:
    section = plain_text("postcopyd.8").partition("\nTHE CONTROL API\n")[2]
    for code in control.ERROR_STATUSES:
        assert code in section, code
    table = control.__doc__ or ""
    calls = re.findall(r"^(GET|POST|DELETE) (/v1/[^?\s]*)", table, re.MULTILINE)
    assert calls
    for method, path in calls:
        assert f"{method} {path}" in section, path


def test_the_example_of_a_configuration_is_right() -> None:
    lines = source("postcopyd.toml.5").partition("\n.nf\n.RS\n")[2].partition("\n.RE\n")[0]
    example = "\n".join(map(plain, lines.splitlines()))
    users = '"qemu", "firecracker"'
    assert users in example
    assert parse(example.replace(users, '"root"'), "example").migration[0].name == "vm0"


def plain_text(page: str) -> str:
    return "\n".join(map(plain, source(page).splitlines()))


def settings() -> list[tuple[str, str, str]]:
    """Return (section, name, default as the page writes it) of every setting."""
    found = []
    for field in msgspec.structs.fields(Configuration):
        value = getattr(Configuration(), field.name)
        if field.name == "migration":
            found += [("[[migration]]", name, "") for name in StaticMigration.__struct_fields__]
        elif isinstance(value, msgspec.Struct):
            found += [
                (f"[{field.name}]", name, written(name, getattr(value, name)))
                for name in value.__struct_fields__
            ]
        else:
            found.append(("", field.name, written(field.name, value)))
    return found


def written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if name.endswith("_mode"):
        return f"0o{value:o}"
    if isinstance(value, float):
        return f"{value:g}"
    return "[]" if value == () else '""' if value == "" else str(value)


@pytest.mark.parametrize(("section", "name", "default"), settings())
def test_every_setting_is_explained_with_its_default(section: str, name: str, default: str) -> None:
    sections = tags("postcopyd.toml.5")
    explained = (
        sections[section]
        if section
        else [tag for title, some in sections.items() if title[0] != "[" for tag in some]
    )
    lines = [tag for tag in explained if tag.split(" ")[0] == name]
    assert len(lines) == 1
    assert f"(default {default})" in lines[0] or not default


def test_no_setting_is_explained_that_there_is_not() -> None:
    explained = {
        tag.split(" ")[0]
        for title, some in tags("postcopyd.toml.5").items()
        if title != "FILES"
        for tag in some
    }
    assert explained == {name for _, name, _ in settings()}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_its_sections_each_once(page: str) -> None:
    titles = [plain(line) for line in source(page).splitlines() if line.startswith(".SH ")]
    assert titles[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert titles[-1] == "SEE ALSO"
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_its_name(page: str) -> None:
    name, _, number = page.rpartition(".")
    first, *rest = source(page).splitlines()
    assert first.startswith(f".TH {name.upper()} {number} ")
    assert rest[0] == ".SH NAME"
    assert rest[1].startswith(f"{name} \\- ")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_uses_only_macros_that_there_are(page: str) -> None:
    lines = source(page).splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{page}:{number}: {line}"
        assert not line.startswith("'"), where
        assert line == line.rstrip(), where
        filled = lines[:number].count(".nf") == lines[:number].count(".fi")
        assert line or not filled, where
        if line.startswith("."):
            assert line.split(" ")[0] in MACROS, where
            assert line.count('"') % 2 == 0, where
    for begin, end in PAIRS:
        depth = 0
        for line in lines:
            depth += (line.split(" ")[0] == begin) - (line == end)
            assert depth >= 0
        assert depth == 0, (begin, end)


@pytest.mark.parametrize("page", PAGES)
def test_every_tag_has_an_explanation(page: str) -> None:
    lines = source(page).splitlines()
    for number, line in enumerate(lines):
        if line in (".TP", ".TQ"):
            _, _, follows = lines[number : number + 3]
            assert follows == ".TQ" or follows.split(" ")[0] not in {".TP", ".SH", ".SS"}, number


@pytest.mark.parametrize("page", PAGES)
def test_every_escape_is_one_that_there_is(page: str) -> None:
    for escape in re.findall(r"\\(?:f.|\(..|.)", source(page)):
        assert escape in {"\\-", "\\ ", "\\(dq", "\\fB", "\\fI", "\\fR"}, escape


def test_a_page_sends_readers_to_the_others() -> None:
    for page in PAGES:
        see_also = source(page).partition(".SH SEE ALSO\n")[2]
        for other in set(PAGES) - {page}:
            name, _, number = other.rpartition(".")
            assert f"{name}({number})" in "\n".join(map(plain, see_also.splitlines()))
