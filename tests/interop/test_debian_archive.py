"""Which sources apt gets for what is fetched: those of this machine, with the backports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.debian_archive import debian_sources, made_whole

MIRROR = "http://mirror.test/debian"


def sources(etc: Path, **files: str) -> list[str]:
    """What is made of sources.list (`list`), and of files beside it (`one`: .list, `new`)."""
    paths = {
        "list": etc / "sources.list",
        "one": etc / "sources.list.d" / "one.list",
        "new": etc / "sources.list.d" / "new.sources",
    }
    (etc / "sources.list.d").mkdir()
    for name, text in files.items():
        paths[name].write_text(text)
    return list(debian_sources(etc))


@pytest.mark.parametrize("file", ["list", "one"])
def test_a_line_is_taken_over_and_its_backports_are_added(tmp_path: Path, file: str) -> None:
    line = f"deb [arch=amd64 signed-by=/usr/key.gpg] {MIRROR} bookworm main contrib\n"
    assert sources(tmp_path, **{file: line}) == [
        f"deb [arch=amd64 signed-by=/usr/key.gpg] {MIRROR} bookworm main",
        f"deb [arch=amd64 signed-by=/usr/key.gpg] {MIRROR} bookworm-backports main",
    ]


def test_the_updates_and_the_security_fixes_have_no_backports(tmp_path: Path) -> None:
    text = f"deb {MIRROR} bookworm-updates main\ndeb {MIRROR}-sec bookworm-security main\n"
    assert sources(tmp_path, list=text) == [
        f"deb {MIRROR} bookworm-updates main",
        f"deb {MIRROR}-sec bookworm-security main",
    ]


@pytest.mark.parametrize(
    "line",
    [
        f"# deb {MIRROR} bookworm main",
        f"deb-src {MIRROR} bookworm main",
        f"deb {MIRROR} trixie main",
        f"deb {MIRROR} bookworm contrib",
        "",
    ],
)
def test_other_lines_are_left_out(tmp_path: Path, line: str) -> None:
    assert sources(tmp_path, list=f"{line}\n") == []


def test_a_stanza_is_read_like_lines(tmp_path: Path) -> None:
    stanza = f"""
# Comments: may stand anywhere
Types: deb deb-src
URIs: {MIRROR}
# Suites: trixie
Suites: bookworm
 bookworm-updates
Components: main non-free-firmware
Signed-By: /usr/key.gpg
"""
    assert sources(tmp_path, new=stanza) == [
        f"deb [signed-by=/usr/key.gpg] {MIRROR} bookworm main",
        f"deb [signed-by=/usr/key.gpg] {MIRROR} bookworm-backports main",
        f"deb [signed-by=/usr/key.gpg] {MIRROR} bookworm-updates main",
    ]


@pytest.mark.parametrize(
    "change",
    [
        ("Types: deb", "Types: deb-src"),
        ("Suites: bookworm", "Suites: trixie"),
        ("Components: main", "Components: contrib"),
        ("Components: main", "Components: main\nEnabled: no"),
    ],
)
def test_other_stanzas_are_left_out(tmp_path: Path, change: tuple[str, str]) -> None:
    good = f"Types: deb\nURIs: {MIRROR}\nSuites: bookworm\nComponents: main\n"
    other = good.replace("mirror", "other").replace(*change)
    assert sources(tmp_path, new=f"{other}\n{good}") == [
        f"deb {MIRROR} bookworm main",
        f"deb {MIRROR} bookworm-backports main",
    ]


def test_an_embedded_key_is_left_to_the_keys_that_apt_trusts(tmp_path: Path) -> None:
    stanza = (
        f"Types: deb\nURIs: {MIRROR}\nSuites: bookworm-updates\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQIN\n"
    )
    assert sources(tmp_path, new=stanza) == [f"deb {MIRROR} bookworm-updates main"]


def test_a_directory_that_could_not_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "qemu"
    with made_whole(target) as directory:
        (directory / "old").touch()
    with pytest.raises(OSError), made_whole(target) as directory:
        (directory / "new").touch()
        raise OSError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]
