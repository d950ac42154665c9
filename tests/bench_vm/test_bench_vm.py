"""The bench itself: that it measures everything and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench_vm.figures import GOALS, MEAN_WAIT
from tests.bench_vm.setups import setups
from tests.support import ROOT


def bench_vm(*words: str, seconds: float = 110) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench_vm", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_a_quick_run_measures_every_setup_and_compares_them(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    done = bench_vm("--quick", "--version", "10.0", "--json", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    names = [setup.name for setup in setups("10.0")]
    assert list(result["windows"]["10.0"]) == names
    for runs in result["windows"]["10.0"].values():
        (window,) = runs
        assert window["downtime"] > 0
        assert window["window"] > 0
        assert window["iterations"] >= 0
        assert window["cpu_seconds"] > 0
    assert {figure["figure"] for figure in result["figures"] if figure["goal"]} == set(GOALS)
    for figure in result["figures"]:
        assert list(figure["medians"]) == names
        assert f"{figure['figure']}, {figure['unit']}" in done.stdout
        assert bool(figure["round_trips"]) == (figure["figure"] == MEAN_WAIT)
    assert result["round_trip"]["bare"] > 0
    assert result["round_trip"]["placed"] > 0
    for name in names:
        assert f"QEMU 10.0, run 1 of 1, {name}: window " in done.stderr


def test_a_receiver_that_is_not_there_is_refused() -> None:
    done = bench_vm("--only", "nonsense", seconds=20)
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
