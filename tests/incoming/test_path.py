"""What a migration does when it is told that the network does not carry its stream."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from postcopyd.incoming import events
from postcopyd.incoming.path import StreamPath, path_of
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.wire.return_path import Shut
from tests.incoming.engine import Engine, image
from tests.incoming.guest import PAGE
from tests.silent import make_forgotten, tcp_pair

MakeEngine = Callable[..., Engine]
PAGES = 4
CONTENT = image(PAGES)
REASON = "link eth0 is down"
AT_ONCE = Settings(path_grace=0.0)
PATIENT = Settings(path_grace=3600.0)


async def running(engine: Engine) -> None:
    engine.attach()
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)


async def finish(engine: Engine) -> None:
    await engine.source.postcopy("pc.ram", CONTENT, range(0, PAGES * PAGE, PAGE))
    await engine.source.end()
    assert await engine.source.wait_for_shut() == Shut(0)


@pytest.mark.parametrize(
    ("settings", "for_good"), [(PATIENT, True), (AT_ONCE, False)], ids=["for good", "for too long"]
)
async def test_a_stream_whose_path_is_gone_is_broken(
    make_engine: MakeEngine, settings: Settings, for_good: bool
) -> None:
    engine = make_engine(settings, pages=PAGES)
    await running(engine)
    engine.migration.path_lost(REASON, for_good)
    await engine.reach(State.PAUSED)
    report = engine.migration.report()
    assert report.failure == f"the network path to the source at the test is gone: {REASON}"
    assert report.network == REASON
    engine.migration.path_back()
    assert engine.migration.report().network is None
    assert [type(event) for event in engine.events][-4:] == [
        events.PathLost,
        *(events.StateChanged, events.Paused),
        events.PathBack,
    ]


async def test_before_the_package_it_fails_and_the_source_is_told(make_engine: MakeEngine) -> None:
    engine = make_engine(pages=PAGES)
    engine.attach()
    await engine.source.advise()
    await engine.reach(State.ADVISE)
    engine.migration.path_lost(REASON, for_good=True)
    assert await engine.source.wait_for_shut() == Shut(1)
    await engine.finish()
    report = engine.migration.report()
    assert (report.state, report.guest_lost, report.network) == ("failed", False, None)
    assert REASON in (report.failure or "")
    engine.migration.path_lost(REASON, for_good=True)  # it is too late for that
    engine.migration.path_back()


async def test_a_path_that_is_back_in_time_has_done_no_harm(make_engine: MakeEngine) -> None:
    engine = make_engine(PATIENT, pages=PAGES)
    await running(engine)
    engine.migration.path_lost(REASON, for_good=False)
    assert engine.migration.report().network == REASON
    engine.migration.path_back()
    await finish(engine)
    told = [event for event in engine.events if isinstance(event, events.PathLost)]
    assert told == [events.PathLost(REASON)]


async def test_what_turns_out_to_be_for_good_is_not_waited_for(make_engine: MakeEngine) -> None:
    engine = make_engine(PATIENT, pages=PAGES)
    await running(engine)
    engine.migration.path_lost(REASON, for_good=False)
    engine.migration.path_lost("link eth0 has been removed", for_good=True)
    await engine.reach(State.PAUSED)
    assert "link eth0 has been removed" in (engine.migration.failure or "")


async def test_a_source_that_has_gone_meanwhile_is_noticed_when_the_path_is_back(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(Settings(path_grace=3600.0, break_after=3600), pages=PAGES)
    engine.use_no_stream()
    engine.source.connection.close()
    ours, engine.source.connection = tcp_pair()
    engine.migration.attach_vmm(engine.vmm)
    engine.migration.attach_stream(ours, "the test")
    await engine.source.advise()
    await engine.source.switch_over({"pc.ram": [(0, PAGES * PAGE)]})
    await engine.reach(State.RUNNING)
    engine.migration.path_lost(REASON, for_good=False)
    make_forgotten(engine.source.connection)
    engine.migration.path_back()
    await engine.reach(State.PAUSED)


def test_only_a_stream_over_ip_has_a_path() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert path_of(ours) is None
    ours, theirs = tcp_pair()
    with ours, theirs:
        home = ip_address("127.0.0.1")
        assert path_of(ours) == StreamPath(home, home)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_listener_for_both_families_has_paths_of_either(address: str) -> None:
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        socket.create_connection((address, listener.getsockname()[1])),
    ):
        ours, _ = listener.accept()
        with ours:
            assert path_of(ours) == StreamPath(ip_address(address), ip_address(address))
    assert path_of(ours) is None
