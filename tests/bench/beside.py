"""A run beside a migration of somebody else that comes at full rate.

Into the same worker with postcopyd; beside the floor it is another floor, with a processor of its
own where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

from tests.bench.cases import Case
from tests.bench.runs import Run

_MEASURED, _NAME = "bench", "beside"


def run_beside(run: Callable[[Case, str], Run], case: Case, other: Case) -> Run:
    """Run `case` while `other` runs again and again.

    :param run: runs a case under a name.
    :return: the run of `case`, and at which rate the other one came.
    :raise RunFailed: if one of them does not end well.
    """
    over = Event()

    def again_and_again() -> float:
        runs = [run(other, _NAME)]
        while not over.is_set():
            runs.append(run(other, _NAME))
        return len(runs) * other.length / sum(one.seconds for one in runs)

    with ThreadPoolExecutor(1) as pool:
        rate = pool.submit(again_and_again)
        try:
            found = run(case, _MEASURED)
        finally:
            over.set()
        return replace(found, rate_beside=rate.result())
