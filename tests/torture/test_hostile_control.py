"""Hostile clients of the control API: requests that are nearly right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any

import pytest

from postcopyd.daemon.control import ERROR_STATUSES
from postcopyd.daemon.registry import allowed_peers
from tests.daemon.hosted import Hosted, held
from tests.daemon.test_control import Api
from tests.fuzz.mutating import changed_bytes, changed_json
from tests.torture.sampling import Sampling, Tally
from tests.torture.test_hostile_engine import no_mistake_of_ours

_CREATE = {"name": "vm0", "listen": "tcp:127.0.0.1:0", "allowed_sources": ["CN=node*,O=Example"]}
_QEMU = {"qmp": "/no/such/monitor", "listen": "tcp:127.0.0.1:0", "name": "vm1"}
_REQUESTS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("POST /v1/migrations", _CREATE),
    ("POST /v1/migrations", _CREATE),
    ("POST /v1/qemu", _QEMU),
    ("POST /v1/migrations/known/retry", {"qmp": "/no/such/monitor"}),
    ("GET /v1/migrations", None),
    ("GET /v1/migrations/known", None),
    ("GET /v1/migrations/known/wait?timeout=0", None),
    ("DELETE /v1/migrations/known?force=1", None),
)
_PATIENCE = 0.2
"""Seconds for an answer; none need come to a request that is shorter than it says."""
_ANSWERS = {HTTPStatus.OK, HTTPStatus.CREATED, *ERROR_STATUSES.values()} - {
    HTTPStatus.INTERNAL_SERVER_ERROR
} | {
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.EXPECTATION_FAILED,
}


@pytest.fixture
async def hosted(tmp_path: Path) -> AsyncIterator[Hosted]:
    """A registry; at the end nothing of it may be left."""
    before = held()
    hosted = Hosted(tmp_path)
    hosted.start()
    yield hosted
    await hosted.stop()
    assert held() == before


def nearly_right(numbers: Random) -> bytes:
    """Return a request of which something is wrong; its connection ends with the answer."""
    line, message = numbers.choice(_REQUESTS)
    body = b"" if message is None else json.dumps(message).encode()
    if message is not None and numbers.random() < 0.7:
        body = changed_json(numbers, message)
    encoded = line.encode()
    if numbers.random() < 0.3:
        encoded = changed_bytes(numbers, encoded).replace(b"check", b"chalk")
    length = len(body) if numbers.random() < 0.9 else numbers.choice((0, 1, len(body) // 2))
    head = b"%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    request = head % (encoded, length)
    if numbers.random() < 0.1:
        place = numbers.randrange(len(request))
        request = request[:place] + changed_bytes(numbers, request[place:])
    return request + body


@pytest.mark.timeout(900)
async def test_a_hostile_request_has_an_answer_of_the_one_form(
    hosted: Hosted, sampling: Sampling, tally: Callable[[str], Tally]
) -> None:
    outcomes = tally("hostile control requests").outcomes
    numbers = sampling.numbers("hostile control requests")
    api = Api(hosted, allowed_peers((), ""))
    await api.api.start()
    with no_mistake_of_ours():
        for _ in range(sampling.count(150, 10_000)):
            if all(entry.name != "known" for entry in hosted.registry):
                hosted.registry.create("known")
            request = nearly_right(numbers)
            status, answer = await answer_to(api, request)
            assert status in _ANSWERS | {0}, (status, answer, request)
            if status >= 400:
                assert list(answer) == ["error"] and list(answer["error"]) == [
                    *("code", "message", "hint")
                ]
            outcomes[f"{status // 100}xx" if status else "hung up"] += 1
            for entry in list(hosted.registry):
                if entry.name != "known" and entry.migration is not None:
                    await hosted.registry.remove(entry.name, force=True)  # now it has ended
                if entry.migration is None:
                    await hosted.registry.remove(entry.name, force=True)
    await api.api.close()


async def answer_to(api: Api, request: bytes) -> tuple[int, dict[str, Any]]:
    """Return status and JSON; status 0 where we hang up, as the other end waits for more."""
    reader, writer = await asyncio.open_unix_connection(str(api.path))
    try:
        writer.write(request)
        async with asyncio.timeout(_PATIENCE):
            answer = await reader.read()
    except TimeoutError:
        return 0, {}
    finally:
        writer.close()
        await writer.wait_closed()
    if not answer:
        return 0, {}
    head, _, body = answer.partition(b"\r\n\r\n")
    values, _ = json.JSONDecoder().raw_decode(body.decode())
    return int(head.split()[1]), values
