"""The demo: three real processes, and a verdict that can also be no."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from postcopyd.cli import demo_result
from postcopyd.cli.demo_image import make_image
from postcopyd.cli.postcopyctl import main
from tests.support import ROOT


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "postcopyd.cli.postcopyctl", "demo", "--size", "16M", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def command_lines() -> list[str]:
    """What runs on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return found


def as_result(told: dict[str, Any], **changes: Any) -> demo_result.DemoResult:
    made = demo_result.DemoResult(
        report=told["report"],
        guest=told["guest"],
        source=told["source"],
        seconds=told["seconds"],
        expected=told["sha256"],
        device_state=told["guest"]["device_state"],
    )
    return dataclasses.replace(made, **changes)


def test_every_page_is_checked_and_every_block_agrees(result: dict[str, Any]) -> None:
    assert result["verified"] is True
    assert result["guest"]["wrong"] == []
    assert result["guest"]["checked"] * 4096 == result["report"]["length"]
    assert result["guest"]["sha256"] == result["sha256"]
    assert set(result["sha256"]) == {"pc.ram", "pc.rom"}


def test_the_guest_ran_before_its_memory(result: dict[str, Any]) -> None:
    counters = result["report"]["counters"]
    assert counters["faults"] > 0
    assert counters["pages_by_fault"] > 0
    assert counters["pages_by_fault"] + counters["pages_by_background"] == (
        result["report"]["length"] // 4096
    )
    assert result["guest"]["waits"]["count"] > 0
    assert result["report"]["downtime_seconds"] < result["report"]["window_seconds"]


def test_the_table_says_what_was_seen(result: dict[str, Any]) -> None:
    screen = io.StringIO()
    demo_result.show(as_result(result), Console(file=screen, width=100))
    text = screen.getvalue()
    for promised in (
        "switchover",
        "faults",
        "p50",
        "p99",
        "max",
        "pages by fault",
        "pages by background",
        "throughput",
        "up to",
        "memory verified",
    ):
        assert promised in text


@pytest.mark.parametrize(
    "change",
    [
        {"guest": {"wrong": ["pc.ram+0x3000"]}},
        {"guest": {"sha256": {"pc.ram": "0" * 64, "pc.rom": "0" * 64}}},
        {"guest": {"sha256": {}}},
        {"guest": {"device_state": "0" * 64}},
        {"report": {"state": "failed"}},
    ],
    ids=["a wrong byte", "another hash", "no hash", "another device state", "not at its end"],
)
def test_one_thing_wrong_is_enough_for_a_no(
    result: dict[str, Any], change: dict[str, dict[str, Any]]
) -> None:
    assert as_result(result).verified
    changed = {member: {**result[member], **members} for member, members in change.items()}
    verdict = as_result(result, **changed)
    if "device_state" in change.get("guest", {}):
        verdict = dataclasses.replace(verdict, device_state=result["guest"]["device_state"])
    assert not verdict.verified
    screen = io.StringIO()
    demo_result.show(verdict, Console(file=screen, width=100))
    assert "memory NOT verified" in screen.getvalue()


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "postcopyd.cli.postcopyctl", "demo", "--size", "4M", "--json"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert not [words for words in command_lines() if str(tmp_path) in words]


@pytest.mark.parametrize("size", ["100", "1000001"])
def test_a_size_that_is_no_memory_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--size", size]) == 2
    assert "--size must be at least 1M and whole pages" in capsys.readouterr().err


def test_no_two_pages_of_the_image_are_alike_but_the_zero_ones(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make_image(path, 8 << 20)
    content = path.read_bytes()
    pages = [content[place : place + 4096] for place in range(0, len(content), 4096)]
    others = [page for page in pages if any(page)]
    assert len(set(others)) == len(others) == len(pages) * 3 // 4
