"""From migrations to figures, and the goals that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from tests.bench_vm.setups import Setup
from tests.bench_vm.window import Window


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One thing that is measured of every migration."""

    name: str
    unit: str
    of: Callable[[Window], float]
    better: Callable[[Iterable[float]], float] | None = min
    """Which of QEMU's own two postcopyd is compared with; None where neither is the better one."""
    goal: float | None = None
    """At most this multiple of the better one."""


_QUANTITIES: Final = (
    _Quantity("downtime", "ms", lambda window: window.downtime, goal=1.5),
    _Quantity("window", "ms", lambda window: window.window, goal=1.0),
    _Quantity("mean wait", "ms", lambda window: window.mean_wait, goal=1 / 3),
    _Quantity("longest stall", "ms", lambda window: window.longest_stall, goal=1 / 3),
    _Quantity("waits", "a run", lambda window: window.waits, better=None),
    _Quantity("wait an access", "us", lambda window: window.wait_an_access_us),
    _Quantity("blocked", "ms", lambda window: window.blocked),
    _Quantity("iterations", "a run", lambda window: window.iterations, better=max),
    _Quantity("CPU", "s", lambda window: window.cpu_seconds),
)
MEAN_WAIT: Final = "mean wait"
"""The figure that is given as a multiple of the round trip as well."""
GOALS: Final = {
    quantity.name: quantity.goal for quantity in _QUANTITIES if quantity.goal is not None
}
"""Of postcopyd as a multiple of the better of QEMU's own two, of the same version and run."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one version: medians over the runs and their extremes, by name of the setup."""

    version: str
    figure: str
    unit: str
    medians: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    ratios: dict[str, float]
    """postcopyd's to the better of QEMU's own, from the medians; none if one side is missing."""
    round_trips: dict[str, float]
    """As multiples of the round trip with placing; none if this is no wait for one page."""
    goal: float | None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def figures(runs: Mapping[Setup, list[Window]], round_trip: float) -> list[Figure]:
    """Return the figures of one version from its runs; `round_trip` in milliseconds."""
    return [_figure(quantity, runs, round_trip) for quantity in _QUANTITIES]


def _figure(quantity: _Quantity, runs: Mapping[Setup, list[Window]], round_trip: float) -> Figure:
    values = {setup: [quantity.of(window) for window in runs[setup]] for setup in runs}
    medians = {setup: median(values[setup]) for setup in runs}
    natives = [medians[setup] for setup in runs if setup.receiver == "QEMU"]
    ratios: dict[str, float] = {}
    if natives and quantity.better is not None and (better := quantity.better(natives)):
        ratios = {
            setup.name: medians[setup] / better for setup in runs if setup.receiver == "postcopyd"
        }
    is_wait = quantity.name == MEAN_WAIT
    (version,) = {setup.version for setup in runs}
    return Figure(
        version=version,
        figure=quantity.name,
        unit=quantity.unit,
        medians={setup.name: medians[setup] for setup in runs},
        ranges={setup.name: (min(values[setup]), max(values[setup])) for setup in runs},
        ratios=ratios,
        round_trips={setup.name: medians[setup] / round_trip for setup in runs} if is_wait else {},
        goal=quantity.goal,
    )
