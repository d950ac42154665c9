"""The bench itself: that it compiles, that it can see wrong memory, that it measures everything."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postcopyd.kernel.memory import Mapping
from tests.bench import programs
from tests.bench.cases import Case, cases
from tests.bench.figures import GOALS
from tests.bench.runs import RunFailed, run_floor
from tests.support import ROOT

PAGE = 4096
LATENCIES = {"p50", "p99", "p99.9"}
SMALL = Case("small", "contiguous", 64 * PAGE)


def bench(*words: str, seconds: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_the_c_programs_compile_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = programs.compiled()
    assert sorted(path.name for path in directory.iterdir()) == [
        "floor",
        "guest.so",
        "round_trip",
        "source",
    ]
    assert capfd.readouterr().err == ""


def test_a_floor_with_all_pages_right_verifies_every_one(tmp_path: Path) -> None:
    for order in ("contiguous", "scattered", "zero"):
        run = run_floor(programs.compiled(), tmp_path, Case(order, order, 64 * PAGE, faults=8))
        assert run.verified == 64
        assert 0 <= len(run.latencies) <= 8


def test_a_source_that_sends_other_pages_than_it_should_is_found_out(tmp_path: Path) -> None:
    """The floor waits for zeros, the source sends data."""
    sources = tmp_path / "programs"
    shutil.copytree(programs.compiled(), sources)
    floor = sources / "floor"
    floor.rename(sources / "floor-of-zeros")
    floor.write_text(
        f'#!/bin/sh\nexec "{sources}/floor-of-zeros" "$1" "$2" "$3" "$4" "$5" 1 "$7"\n'
    )
    floor.chmod(0o755)
    with pytest.raises(RunFailed, match="64 pages were wrong"):
        run_floor(sources, tmp_path, SMALL)


def test_one_wrong_byte_anywhere_in_a_page_is_found() -> None:
    guest = ctypes.CDLL(str(programs.compiled() / "guest.so"))
    guest.verify.restype = ctypes.c_uint64

    def wrong_pages(expect_zero: int) -> int:
        count: int = guest.verify(
            ctypes.c_void_p(memory.address), ctypes.c_uint64(3), ctypes.c_int(expect_zero)
        )
        return count

    with Mapping.anonymous(3 * PAGE) as memory:
        assert wrong_pages(1) == 0
        memory.view[PAGE + 1234] = 1
        assert wrong_pages(1) == 1
        for page in range(3):
            stamp = (page + 1) * 0x9E3779B97F4A7C15 % 2**64
            content = stamp.to_bytes(8, sys.byteorder) + b"\x5a" * (PAGE - 8)
            memory.view[page * PAGE : (page + 1) * PAGE] = content
        assert wrong_pages(0) == 0
        for place in (0, 7, 8, 2048, PAGE - 1):
            kept = memory.view[PAGE + place]
            memory.view[PAGE + place] = kept ^ 1
            assert wrong_pages(0) == 1
            memory.view[PAGE + place] = kept


def test_a_quick_bench_measures_every_case_and_verifies_the_memory(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    done = bench("--quick", "--runs", "2", "--json", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    found: dict[str, set[str]] = {}
    for figure in result["figures"]:
        found.setdefault(figure["case"], set()).add(figure["figure"])
        for side in ("floor", "postcopyd"):
            least, most = figure[f"{side}_range"]
            assert 0 <= least <= figure[side] <= most
        assert f"{figure['figure']}, {figure['unit']}" in done.stdout
    for case in cases(quick=True):
        if case.name in result["no_huge_pages_for"]:
            assert case.page_size > PAGE
            continue
        expected = {"throughput", "CPU"}
        if case.faults:
            more = "CPU a fault" if case.order == "none" else "throughput"
            expected = LATENCIES | {"the other's throughput" if case.beside else more}
        assert expected <= found[case.name]
        # The source of the idle case sends what is asked for and no more: that alone is looked at.
        all_sent = case.order != "none"
        assert result["verified_pages"][case.name] == (case.pages if all_sent else 0)
        assert case.name in done.stdout
    goals = {(figure["case"], figure["figure"]) for figure in result["figures"] if figure["goal"]}
    assert goals == set(GOALS)
    assert 0 < result["round_trip"]["p50"] <= result["round_trip"]["p99"]
    assert 0 < result["resident_mib"]["idle"] <= result["resident_mib"]["most"]


def test_only_one_case_can_be_asked_for_with_its_figures_on_standard_output() -> None:
    done = bench("--quick", "--runs", "1", "--only", "idle", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert {figure["case"] for figure in json.loads(done.stdout)["figures"]} == {"fault, idle"}


def test_a_case_that_is_not_there_is_refused_with_the_names_of_those_that_are() -> None:
    done = bench("--only", "nonsense", seconds=20)
    assert done.returncode == 2
    assert "no case is called 'nonsense'" in done.stderr
    assert "'scattered 4 KiB'" in done.stderr
