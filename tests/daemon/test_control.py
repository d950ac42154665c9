"""The control API over its real socket: what it answers, whom it lets in, how it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from postcopyd.cli.control_client import ControlClient, ControlError
from postcopyd.daemon import sockets
from postcopyd.daemon.control import ControlApi
from postcopyd.daemon.event_log import INTERNAL_ERROR_ID
from postcopyd.daemon.logging import configured
from postcopyd.daemon.registry import allowed_peers
from postcopyd.incoming.states import State
from postcopyd.vmm.peer import AllowedPeers
from tests.daemon.hosted import LENGTH, Hosted, closed, held
from tests.support import LIMIT


class Api:
    """A control API on a socket, and a client of it."""

    def __init__(self, hosted: Hosted, allowed: AllowedPeers) -> None:
        self.path = hosted.directory / "control.sock"
        listener = sockets.open_unix_listener(str(self.path), 0o600, "")
        self.api = ControlApi(listener, hosted.registry, allowed)
        self._client = ControlClient(str(self.path))

    async def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the client in a thread."""
        return await asyncio.to_thread(getattr(self._client, method), *arguments, **options)

    async def raw(self, request: bytes) -> tuple[int, dict[str, Any]]:
        """Send bytes, return the status and the JSON of what comes until the connection closes."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            writer.write(request)
            async with asyncio.timeout(LIMIT):
                answer = await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    async def request(self, line: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        """Send one request and return status and JSON."""
        head = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        return await self.raw(head.encode() + b"\r\n" + body)


@pytest.fixture
async def api(hosted: Hosted) -> AsyncIterator[Api]:
    api = Api(hosted, allowed_peers((), ""))
    await api.api.start()
    yield api
    await api.api.close()


def error_of(answer: dict[str, Any]) -> dict[str, str]:
    """The error, which must have the one form."""
    assert list(answer) == ["error"]
    error: dict[str, str] = answer["error"]
    assert list(error) == ["code", "message", "hint"]
    return error


# -- what it does ------------------------------------------------------------------------------


async def test_a_migration_is_created_shown_and_listed(api: Api, hosted: Hosted) -> None:
    assert await api.ask("list") == []
    created = await api.ask("create", "vm0")
    assert created["name"] == "vm0" and created["state"] == "none"
    assert created["listen"] == list(hosted.registry.get("vm0").listen)
    assert await api.ask("show", "vm0") == created
    del created["missing"]  # of all it may be much
    assert await api.ask("list") == [created]


async def test_a_report_shows_all_that_the_engine_tells(api: Api, hosted: Hosted) -> None:
    vmm, entry, source = await hosted.listening("vm0")
    assert entry.migration is not None
    shown = await api.ask("show", "vm0")
    beside = {"listen", "security", "allowed_sources", "handoff", "missing_list"}
    beside |= {"missing_list_failure", "refused", "worker"}
    assert set(shown) == set(entry.migration.report().__struct_fields__) | beside
    assert shown["state"] == "listening"
    assert shown["blocks"][0]["length"] == LENGTH
    assert shown["counters"]["faults"] == 0
    source.close()
    await vmm.leave()


async def test_creating_takes_address_and_handoff(api: Api, tmp_path: Path) -> None:
    created = await api.ask("create", "vm0", f"unix:{tmp_path}/s", f"{tmp_path}/h")
    assert created["listen"] == [f"unix:{tmp_path}/s"]
    assert created["handoff"] == f"{tmp_path}/h"


async def test_what_never_came_can_be_given_up(api: Api, hosted: Hosted) -> None:
    vmm, entry, source = await hosted.listening("vm0")
    await asyncio.to_thread(vmm.destination.loaded)
    await hosted.reach(entry, "running")
    status, answer = await api.request("POST /v1/migrations/vm0/abandon", b"{}")
    assert (status, error_of(answer)["code"]) == (409, "cannot-abandon")
    source.close()
    await hosted.reach(entry, "paused")
    status, answer = await api.request("POST /v1/migrations/vm0/abandon", b"{}")
    assert (status, error_of(answer)["code"]) == (409, "cannot-abandon")
    assert "let 'records' in the configuration" in error_of(answer)["hint"]
    assert entry.state is State.PAUSED
    hosted.records.mkdir()
    status, answer = await api.request("POST /v1/migrations/vm0/abandon", b"{}")
    assert (status, answer["state"]) == (200, "abandoned")
    assert answer["missing"] == [{"block": "pc.ram", "offset": 0, "length": LENGTH}]
    await asyncio.to_thread(vmm.destination.wait_for_completion, LIMIT)
    await vmm.leave()


async def test_creating_answers_201(api: Api) -> None:
    status, answer = await api.request("POST /v1/migrations", b'{"name":"vm0"}')
    assert (status, answer["name"]) == (201, "vm0")


async def test_cancelling_then_forgetting(api: Api) -> None:
    await api.ask("create", "vm0")
    assert (await api.ask("cancel", "vm0"))["state"] == "failed"
    assert [entry["state"] for entry in await api.ask("list")] == ["failed"]
    await api.ask("cancel", "vm0")
    assert await api.ask("list") == []


async def test_after_the_package_cancelling_needs_force(api: Api, hosted: Hosted) -> None:
    vmm, _, source = await hosted.listening("vm0")
    with pytest.raises(ControlError, match="cancelling loses the guest") as caught:
        await api.ask("cancel", "vm0")
    assert caught.value.code == "past-the-package"
    assert "force" in caught.value.hint
    assert (await api.ask("cancel", "vm0", force=True))["state"] == "failed"
    source.close()
    await vmm.leave()


async def test_waiting_ends_with_the_migration(api: Api, hosted: Hosted) -> None:
    await api.ask("create", "vm0")
    waiting = asyncio.create_task(api.ask("wait", "vm0"))
    await asyncio.to_thread(lambda: None)
    assert not waiting.done()
    await hosted.registry.remove("vm0", force=False)
    assert (await asyncio.wait_for(waiting, LIMIT))["state"] == "failed"
    assert (await api.ask("wait", "vm0", LIMIT))["state"] == "failed"


async def test_waiting_ends_when_the_time_is_up(api: Api) -> None:
    await api.ask("create", "vm0")
    assert (await api.ask("wait", "vm0", 0.05))["state"] == "none"
    assert (await api.ask("wait", "vm0", 0))["state"] == "none"


async def test_a_client_that_goes_away_leaves_no_wait_behind(api: Api, hosted: Hosted) -> None:
    hosted.registry.create("vm0")
    before, tasks = held(), len(asyncio.all_tasks())
    _, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(b"GET /v1/migrations/vm0/wait HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(LIMIT):
        while len(asyncio.all_tasks()) == tasks:
            await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
        while len(asyncio.all_tasks()) > tasks or held() != before:
            await asyncio.sleep(0)


async def test_the_host_check_runs_in_a_process_of_its_own(api: Api) -> None:
    answer = await api.ask("check")
    assert answer["can_postcopy"] is True
    assert {finding["key"] for finding in answer["findings"]} >= {"userfaultfd", "copy"}


async def test_a_host_check_that_breaks_is_an_error(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ControlError, match="the host check ended with status 1") as caught:
        await api.ask("check")
    assert caught.value.code == "check-failed"


# -- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "body", "status", "code"),
    [
        ("GET /v1/migrations/none", b"", 404, "no-such-migration"),
        ("GET /v1/migrations/none/wait", b"", 404, "no-such-migration"),
        ("DELETE /v1/migrations/none", b"", 404, "no-such-migration"),
        ("GET /v1/migrations/known/wait?timeout=x", b"", 400, "invalid-request"),
        ("GET /v1/migrations/known/wait?timeout=-1", b"", 400, "invalid-request"),
        ("GET /v1/migrations/known/wait?timeout=nan", b"", 400, "invalid-request"),
        ("GET /v1/migrations/known/wait?timout=1", b"", 400, "invalid-request"),
        ("DELETE /v1/migrations/known?force=maybe", b"", 400, "invalid-request"),
        ("POST /v1/migrations", b"", 400, "invalid-request"),
        ("POST /v1/migrations", b"{", 400, "invalid-request"),
        ("POST /v1/migrations", b"\xff", 400, "invalid-request"),
        ("POST /v1/migrations", b'{"name":1}', 400, "invalid-request"),
        ("POST /v1/migrations", b'{"name":"a","nmae":"b"}', 400, "invalid-request"),
        ("POST /v1/migrations", b'{"name":"a b"}', 400, "invalid-name"),
        ("POST /v1/migrations", b'{"name":"a","listen":"x"}', 400, "invalid-address"),
        ("POST /v1/migrations", b'{"name":"known"}', 409, "name-taken"),
        ("POST /v1/migrations", b'{"name":"a","handoff":"/no/s"}', 409, "address-unusable"),
        ("POST /v1/migrations", b'{"name":"a","handoff":"relative"}', 400, "invalid-address"),
        ("POST /v1/migrations", b" " * (65 << 10), 413, "request-entity-too-large"),
        ("POST /v1/qemu", b"{}", 400, "invalid-request"),
        ("POST /v1/qemu", b'{"qmp":"/no/s","name":"a b"}', 400, "invalid-name"),
        ("POST /v1/qemu", b'{"qmp":"/no/s","name":"known"}', 409, "name-taken"),
        ("POST /v1/qemu", b'{"qmp":"/no/s"}', 409, "vmm-refused"),
        ("POST /v1/migrations/none/retry", b'{"qmp":"/no/s"}', 404, "no-such-migration"),
        ("POST /v1/migrations/known/retry", b'{"qmp":"/no/s"}', 409, "waits-for-no-vmm"),
        ("POST /v1/migrations/known/retry", b"{}", 400, "invalid-request"),
        ("POST /v1/migrations/known/retry", b'{"qmp":"/no/s","force":1}', 400, "invalid-request"),
        ("GET /v1/nothing", b"", 404, "not-found"),
        ("PUT /v1/migrations", b"", 405, "method-not-allowed"),
        ("GET /v1/migrations/" + "x" * 9000, b"", 400, "invalid-request"),
        ("nonsense", b"", 400, "invalid-request"),
    ],
)
async def test_every_refusal_has_the_one_form(
    api: Api, hosted: Hosted, line: str, body: bytes, status: int, code: str
) -> None:
    hosted.registry.create("known")
    before = held()
    with configured("info", "json", stream=(log := StringIO())):
        answered, answer = await api.request(line, body)
    error = error_of(answer)
    assert (answered, error["code"]) == (status, code)
    assert error["message"]
    assert log.getvalue() == ""
    assert held() == before
    assert [entry.name for entry in hosted.registry] == ["known"]


async def test_a_mistake_of_ours_is_logged_once_and_told_without_details(
    api: Api, hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(hosted.registry, "get", broken)
    with configured("info", "json", stream=(log := StringIO())):
        status, answer = await api.request("GET /v1/migrations/vm0")
    assert (status, error_of(answer)["code"]) == (500, "internal-error")
    assert "secret" not in json.dumps(answer)
    (line,) = log.getvalue().splitlines()
    assert "ZeroDivisionError: secret" in json.loads(line)["exception"]
    assert len(INTERNAL_ERROR_ID) == 32


async def test_only_who_is_allowed_gets_an_answer(hosted: Hosted) -> None:
    api = Api(hosted, AllowedPeers([65534]))
    await api.api.start()
    try:
        with (
            configured("info", "json", stream=(log := StringIO())),
            pytest.raises(ControlError, match=f"user {os.geteuid()} is not allowed") as caught,
        ):
            await api.ask("create", "vm0")
        (line,) = log.getvalue().splitlines()
        assert json.loads(line)["peer"] == f"pid {os.getpid()}, uid {os.geteuid()}"
        assert "is not allowed to control postcopyd here" in json.loads(line)["reason"]
        assert caught.value.code == "not-allowed"
        assert "control_users" in caught.value.hint
        assert list(hosted.registry) == []
    finally:
        await api.api.close()


async def test_closing_ends_connections_and_waits(hosted: Hosted) -> None:
    before = held()
    hosted.registry.create("vm0")
    api = Api(hosted, allowed_peers((), ""))
    await api.api.start()
    with socket.socket(socket.AF_UNIX) as waits, socket.socket(socket.AF_UNIX) as idles:
        waits.connect(str(api.path))
        idles.connect(str(api.path))
        tasks = len(asyncio.all_tasks())
        waits.sendall(b"GET /v1/migrations/vm0/wait HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(LIMIT):
            while len(asyncio.all_tasks()) <= tasks:
                await asyncio.sleep(0)
            await api.api.close()
            await closed(waits)
            await closed(idles)
    await hosted.registry.remove("vm0", force=False)
    assert held() == before
