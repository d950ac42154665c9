"""The configuration: what is shipped, the defaults, and what reaches the engine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from postcopyd.daemon.config import Configuration, StaticMigration, load, parse
from postcopyd.incoming.settings import Settings
from tests.support import ROOT

SHIPPED = ROOT / "config" / "postcopyd.toml"


def test_the_shipped_file_is_what_counts_without_a_file() -> None:
    assert load(SHIPPED) == Configuration() == parse("", "nothing")


def test_the_shipped_file_has_every_setting_and_no_other() -> None:
    defaults = msgspec.to_builtins(Configuration())
    del defaults["migration"]
    assert tomllib.loads(SHIPPED.read_text()) == _lists(defaults)


def test_the_example_of_the_shipped_file_has_every_setting_of_a_migration() -> None:
    text = SHIPPED.read_text()
    example = re.sub(r"^#(?=\[\[migration|\w+ = )", "", text, flags=re.MULTILINE)
    (migration,) = tomllib.loads(example)["migration"]
    assert set(migration) == set(StaticMigration.__struct_fields__)
    assert parse(example, "example").migration == (msgspec.convert(migration, StaticMigration),)


def test_the_engine_gets_its_own_defaults() -> None:
    assert Configuration().engine_settings() == Settings()


def test_every_setting_of_the_engine_can_be_changed() -> None:
    changed = parse(
        "[limits]\npackage_mib = 3\nfault_window_kib = 64\n"
        "[timeouts]\nvmm = 1\nfirst_byte = 2.5\nidle = 3\nclose = 4\n",
        "test",
    )
    assert changed.engine_settings() == Settings(
        package_limit=3 << 20,
        fault_window=64 << 10,
        vmm_timeout=1.0,
        first_byte_timeout=2.5,
        idle_timeout=3.0,
        close_timeout=4.0,
    )


def test_migrations_are_read_in_their_order() -> None:
    text = '[[migration]]\nname = "b"\n[[migration]]\nname = "a"\nlisten = "unix:/run/a"\n'
    assert parse(text, "test").migration == (
        StaticMigration("b"),
        StaticMigration("a", "unix:/run/a"),
    )


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.toml")


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` as TOML has them: arrays are lists."""
    return {
        key: _lists(value)
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in values.items()
    }
