"""What one migration may take of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from tests.incoming.engine import Engine, image
from tests.incoming.guest import PAGE
from tests.incoming.test_recovery import seen

MakeEngine = Callable[..., Engine]
PAGES = 1024


async def test_a_vmm_with_more_memory_than_is_allowed_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=2, settings=Settings(memory_limit=PAGE))
    with pytest.raises(Refused, match="more than 0 GiB: raise memory_gib"):
        engine.attach()
    assert engine.migration.state is State.NONE
    engine.use_no_stream()


async def precopied(engine: Engine, pages: int) -> None:
    engine.attach()
    await engine.source.advise()
    content = bytes([7]) * (pages * PAGE)
    await engine.source.precopy("pc.ram", content, range(0, pages * PAGE, PAGE))


async def test_a_pre_copy_that_brings_more_than_may_be_kept_ends_and_the_source_goes_on(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pages=PAGES, settings=Settings(staging_limit=1 << 20))
    with contextlib.suppress(BrokenPipeError):  # it may be refused before all is sent
        await precopied(engine, 512)
    await engine.finish()
    report = engine.migration.report()
    assert report.state == "failed" and not report.guest_lost
    assert report.failure is not None
    assert "more than 1 MiB for private memory" in report.failure
    assert "raise staging_mib" in report.failure


async def test_pre_copies_that_together_bring_more_than_may_be_kept_end_one_of_them(
    make_engine: MakeEngine,
) -> None:
    settings = Settings(staging_limit_together=3 << 20)
    first, second = (make_engine(pages=PAGES, settings=settings) for _ in range(2))
    await precopied(first, 512)
    await seen(first.source)
    with contextlib.suppress(BrokenPipeError):
        await precopied(second, 512)
    await second.finish()
    report = second.migration.report()
    assert report.state == "failed" and not report.guest_lost
    assert report.failure is not None
    assert "all pre-copies have brought more than 3 MiB for private memory" in report.failure
    assert "raise worker_staging_mib" in report.failure
    await first.source.switch_over({"pc.ram": [(512 * PAGE, (PAGES - 512) * PAGE)]})
    await first.reach(State.RUNNING)


async def test_who_takes_nothing_of_what_all_may_have_does_not_end_for_those_who_take_it(
    make_engine: MakeEngine,
) -> None:
    """That one has more than all may have by now is seen by the other one first."""
    first = make_engine(pages=PAGES)
    await precopied(first, 512)
    await seen(first.source)
    settings = Settings(staging_limit_together=1 << 20)
    second = make_engine(pages=PAGES, shared=True, settings=settings)
    await precopied(second, 512)
    await second.source.switch_over({"pc.ram": [(512 * PAGE, (PAGES - 512) * PAGE)]})
    await second.reach(State.RUNNING)


async def test_what_has_ended_leaves_room_for_others(make_engine: MakeEngine) -> None:
    settings = Settings(staging_limit_together=3 << 20)
    first, second = (make_engine(pages=PAGES, settings=settings) for _ in range(2))
    await precopied(first, 512)
    await seen(first.source)
    first.migration.cancel("the test makes room")
    await first.finish()
    await precopied(second, 512)
    await second.source.switch_over({"pc.ram": [(512 * PAGE, (PAGES - 512) * PAGE)]})
    await second.reach(State.RUNNING)


@pytest.mark.parametrize("shared", [False, True], ids=["the same pages again", "shared memory"])
async def test_what_takes_no_more_memory_is_not_limited(
    make_engine: MakeEngine, shared: bool
) -> None:
    """Neither a page that comes again, nor one that goes straight to the VMM's own memory file."""
    engine = make_engine(pages=PAGES, shared=shared, settings=Settings(staging_limit=1 << 20))
    if shared:
        await precopied(engine, 512)
    else:
        await precopied(engine, 200)
        for _ in range(4):
            await engine.source.precopy("pc.ram", image(200), range(0, 200 * PAGE, PAGE))
    await engine.source.switch_over({"pc.ram": [(512 * PAGE, (PAGES - 512) * PAGE)]})
    await engine.reach(State.RUNNING)
