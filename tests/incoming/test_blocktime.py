"""How long each thread of the VMM was blocked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from postcopyd.incoming.blocktime import Blocktime
from postcopyd.incoming.states import State
from tests.incoming.engine import Engine, image
from tests.incoming.guest import PAGE

MakeEngine = Callable[..., Engine]


def test_each_thread_has_an_account_of_its_own() -> None:
    blocktime = Blocktime({7: "vcpu0", 8: "vcpu1"})
    blocktime.blocked(0x1000, 7, 1_000)
    blocktime.blocked(0x1000, 8, 2_000)
    blocktime.blocked(0x2000, 9, 2_000)
    blocktime.released(0x1000, 5_000)
    blocktime.blocked(0x3000, 7, 6_000)
    blocktime.released(0x3000, 7_000)
    first, second = blocktime.reports()
    assert (first.name, first.faults, first.seconds, first.longest) == ("vcpu0", 2, 5e-6, 4e-6)
    assert (second.name, second.faults, second.seconds) == ("vcpu1", 1, 3e-6)
    blocktime.released(0x2000, 4_000)
    assert [report.name for report in blocktime.reports()] == ["vcpu0", "vcpu1", "others"]


def test_a_page_that_nobody_waits_for_releases_nobody() -> None:
    blocktime = Blocktime({7: "vcpu0"})
    blocktime.released(0x1000, 5_000)
    assert blocktime.reports()[0].faults == 0


def test_the_threads_of_another_vmm_go_on_with_the_accounts_of_the_same_names() -> None:
    blocktime = Blocktime({7: "vcpu0"})
    blocktime.blocked(0x1000, 7, 0)
    blocktime.released(0x1000, 1_000)
    blocktime.blocked(0x2000, 7, 1_000)  # never released: its process has gone
    blocktime.rename({17: "vcpu0"})
    blocktime.blocked(0x2000, 17, 5_000)
    blocktime.released(0x2000, 7_000)
    (report,) = blocktime.reports()
    assert (report.faults, report.seconds) == (2, 3e-6)


async def test_the_report_tells_the_threads_of_a_real_vmm_apart(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=4)
    content = image(4)
    ready, go_on = threading.Event(), threading.Event()
    threads: list[int] = []

    def vcpu() -> None:
        threads.append(threading.get_native_id())
        ready.set()
        go_on.wait()
        engine.guest.read(2)

    thread = threading.Thread(target=vcpu)
    thread.start()
    await asyncio.to_thread(ready.wait)
    engine.vmm.thread_names = {threads[0]: "vcpu0"}
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, 4 * PAGE)]})
    await engine.reach(State.RUNNING)
    go_on.set()
    await engine.source.wait_for_request()
    other = engine.guest.touch(3)
    await engine.source.wait_for_request()
    await engine.source.postcopy("pc.ram", content, range(0, 4 * PAGE, PAGE))
    await asyncio.to_thread(thread.join)
    await asyncio.to_thread(other.result)
    await engine.source.end()
    await engine.source.wait_for_shut()
    vcpu0, others = engine.migration.report().threads
    assert (vcpu0.name, vcpu0.faults) == ("vcpu0", 1)
    assert (others.name, others.faults) == ("others", 1)
    assert 0 < vcpu0.seconds == vcpu0.longest
