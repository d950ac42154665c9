"""Whether the service manager has room for all that migrations leave with it."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest

from postcopyd.daemon import manager_room
from postcopyd.daemon.logging import configured
from tests.daemon.daemon_process import running_daemon


def told(environment: dict[str, str], migrations: int) -> str:
    with configured("info", "json", stream=(log := StringIO())):
        manager_room.check(environment, migrations)
    return log.getvalue()


@pytest.mark.parametrize("environment", [{}, {"FDSTORE": ""}, {"FDSTORE": "x"}, {"FDSTORE": "200"}])
def test_enough_room_or_a_limit_that_is_not_known_is_nothing_to_tell(
    environment: dict[str, str],
) -> None:
    assert told(environment, 10) == ""


def test_a_limit_that_is_too_low_is_told_with_what_to_do() -> None:
    event = json.loads(told({"FDSTORE": "219"}, 11))
    assert event["level"] == "warning"
    assert (event["keeps"], event["may_leave"]) == (219, 220)
    assert "set FileDescriptorStoreMax=220 in the unit" in event["remedy"]
    assert event["remedy"].endswith("lower limits.migrations to 10")


def test_the_daemon_looks_when_it_starts(tmp_path: Path) -> None:
    with running_daemon(tmp_path, environment={"FDSTORE": "100"}) as daemon:
        assert daemon.log.count("FileDescriptorStoreMax=1280") == 1
