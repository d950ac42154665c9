"""The client against a daemon that follows a script, right or wrong."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from postcopyd.kernel import memory_file
from postcopyd.vmm.client import Block, Destination, MigrationFailed
from tests.vmm.handoffs import LIMIT, PAGE, open_descriptors

REGISTERED = {"event": "registered", "name": "vm0", "listen": []}


class Script:
    """A daemon that accepts one VMM, says its lines at once, and listens until the VMM is done.

    With `hang_up` it does not listen, but closes with all that the VMM has sent unread.
    """

    def __init__(
        self, path: Path, lines: Sequence[object], device_state: int | None, hang_up: bool
    ) -> None:
        self.received = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._lines = lines
        self._device_state = device_state
        self._hang_up = hang_up
        self._thread = threading.Thread(target=self._play)
        self._thread.start()

    def _play(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(LIMIT)
        with connection:
            for line in self._lines:
                data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
                if b'"run"' in data and self._device_state is not None:
                    socket.send_fds(connection, [data], [self._device_state])
                else:
                    connection.sendall(data)
            if self._lines and self._lines[-1] == b"":
                connection.shutdown(socket.SHUT_WR)
            if self._hang_up:
                return
            with contextlib.suppress(ConnectionResetError):
                while received := connection.recv(65536):
                    self.received += received

    @property
    def answers(self) -> list[dict[str, Any]]:
        """What the VMM has said since its handoff. Only when it is done."""
        self._thread.join(LIMIT)
        return [json.loads(line) for line in self.received.splitlines()[1:]]

    def close(self) -> None:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        self._listener.close()


@contextmanager
def scripted(
    path: Path, *lines: object, device_state: int | None = None, hang_up: bool = False
) -> Iterator[Script]:
    script = Script(path, lines, device_state, hang_up)
    try:
        yield script
    finally:
        script.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "handoff.sock"


@pytest.fixture
def block() -> Iterator[Block]:
    block = Block.anonymous("pc.ram", 8 * PAGE)
    yield block
    block.close()


@pytest.fixture
def device_state() -> Iterator[int]:
    descriptor = memory_file.create("state", 5)
    os.pwrite(descriptor, b"state", 0)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def test_the_handoff_says_what_the_blocks_are(path: Path, block: Block) -> None:
    with (
        scripted(path, REGISTERED) as script,
        Destination(path, "vm0", [block], listen="tcp:127.0.0.1:0") as destination,
    ):
        assert destination.name == "vm0"
    assert json.loads(script.received) == {
        "postcopyd": 1,
        "name": "vm0",
        "blocks": [
            {
                "name": "pc.ram",
                "address": block.address,
                "length": 8 * PAGE,
                "page_size": PAGE,
                "memory_file": None,
                "file_offset": 0,
            }
        ],
        "listen": "tcp:127.0.0.1:0",
    }


def test_blocks_in_one_memory_file_share_its_descriptor(path: Path) -> None:
    whole = Block.memory_file("whole", 8 * PAGE)
    halves = [
        Block.at(
            name,
            whole.address + offset,
            4 * PAGE,
            descriptor=whole.descriptor,
            file_offset=offset,
        )
        for name, offset in (("low", 0), ("high", 4 * PAGE))
    ]
    with scripted(path, REGISTERED) as script, Destination(path, "vm0", halves):
        pass
    whole.close()
    blocks = json.loads(script.received)["blocks"]
    assert [(block["memory_file"], block["file_offset"]) for block in blocks] == [
        (1, 0),
        (1, 4 * PAGE),
    ]


def test_the_whole_conversation(path: Path, block: Block, device_state: int) -> None:
    balloon: list[bool] = []
    with scripted(
        path,
        REGISTERED,
        {"event": "inhibit-balloon"},
        {"event": "advise"},
        {"event": "discard"},
        {"event": "listening"},
        {"event": "run", "length": 5},
        {"event": "allow-balloon"},
        {"event": "complete"},
        device_state=device_state,
    ) as script:
        with Destination(path, "vm0", [block], on_balloon=balloon.append) as destination:
            assert destination.wait_for_device_state(LIMIT) == b"state"
            assert balloon == [True]
            destination.loaded()
            destination.wait_for_completion(LIMIT)
            destination.wait_for_completion(LIMIT)
            assert destination.completed
            assert balloon == [True, False]
        assert script.answers == [{"event": "advised"}, {"event": "discarded"}, {"event": "loaded"}]


def test_memory_is_empty_when_advise_is_answered(path: Path, block: Block) -> None:
    block.view[:] = b"x" * block.length
    advise = {"event": "advise"}
    with (
        scripted(path, REGISTERED, advise, {"event": "failed", "reason": "enough"}),
        Destination(path, "vm0", [block]) as destination,
        pytest.raises(MigrationFailed, match="enough"),
    ):
        destination.wait_for_device_state(LIMIT)
    assert bytes(block.view) == bytes(block.length)


def test_the_vmm_may_refuse_the_device_state(path: Path, block: Block, device_state: int) -> None:
    run = {"event": "run", "length": 5}
    with scripted(path, REGISTERED, run, device_state=device_state) as script:
        with Destination(path, "vm0", [block]) as destination:
            destination.wait_for_device_state(LIMIT)
            destination.refuse("no such device")
            destination.close()
        assert script.answers == [{"event": "refused", "reason": "no such device"}]


def test_a_vmm_that_cannot_do_its_part_tells_why(path: Path, block: Block) -> None:
    not_mapped = Block.at("gone", block.address, block.length)
    with scripted(path, REGISTERED, {"event": "advise"}) as script:
        with Destination(path, "vm0", [not_mapped]) as destination:
            block.close()
            with pytest.raises(MigrationFailed, match="could not do its part"):
                destination.wait_for_device_state(LIMIT)
        (answer,) = script.answers
    assert answer["event"] == "refused"
    assert "MADV_DONTNEED" in answer["reason"] or "madvise" in answer["reason"]


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_refusal_raises_with_the_reason(path: Path, block: Block) -> None:
    with (
        scripted(path, {"event": "failed", "reason": "migration 'vm0' has a VMM"}),
        pytest.raises(MigrationFailed, match="migration 'vm0' has a VMM"),
    ):
        Destination(path, "vm0", [block])


def test_a_refusal_that_comes_before_the_handoff_was_sent_is_read(path: Path, block: Block) -> None:
    too_much_for_the_socket = [
        Block.at(f"{number:0128}", block.address, block.length) for number in range(4096)
    ]
    with (
        scripted(path, {"event": "failed", "reason": "not allowed"}, hang_up=True),
        pytest.raises(MigrationFailed, match="not allowed"),
    ):
        Destination(path, "vm0", too_much_for_the_socket, timeout=LIMIT)


@contextmanager
def hanging_up(path: Path, times: int) -> Iterator[None]:
    """A daemon that hangs up so many times before it says anything, and then takes the handoff."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(LIMIT)

        def take() -> None:
            for _ in range(times):
                listener.accept()[0].close()
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.settimeout(LIMIT)
                connection.sendall(json.dumps(REGISTERED).encode() + b"\n")
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=take)
        thread.start()
        yield
        if thread.is_alive():  # it is still waiting for who has given up
            with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(ConnectionError):
                last.connect(str(path))
        thread.join(LIMIT)


def test_a_daemon_that_dies_before_it_has_accepted_is_tried_again(path: Path, block: Block) -> None:
    with hanging_up(path, 2):
        destination = Destination(path, "vm0", [block], timeout=LIMIT)
        assert destination.name == "vm0"
        destination.close()


def test_a_daemon_that_hangs_up_each_time_is_given_up(path: Path, block: Block) -> None:
    with hanging_up(path, 7), pytest.raises(MigrationFailed, match="closed the connection"):
        Destination(path, "vm0", [block], timeout=LIMIT)


def test_a_device_state_that_nobody_waits_for_is_closed(
    path: Path, block: Block, device_state: int
) -> None:
    run = {"event": "run", "length": 5}
    with (
        scripted(path, REGISTERED, run, device_state=device_state),
        Destination(path, "vm0", [block]) as destination,
        pytest.raises(MigrationFailed, match="'run' out of order"),
    ):
        destination.wait_for_completion(LIMIT)


WRONG: dict[str, tuple[list[object], str]] = {
    "the end": ([b""], "closed the connection"),
    "the end in a line": ([b'{"event":', b""], "closed the connection"),
    "what is no event": ([b"hello\n"], "what is no event"),
    "an event of another kind": ([{"event": "registered"}], "what is no event"),
    "complete before all": ([{"event": "complete"}], "'complete' out of order"),
    "run without device state": ([{"event": "run", "length": 5}], "without its device state"),
    "a failure": ([{"event": "failed", "reason": "the source has gone"}], "the source has gone"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_migration_ends_with(path: Path, block: Block, what: str) -> None:
    lines, expected = WRONG[what]
    with (
        scripted(path, REGISTERED, *lines),
        Destination(path, "vm0", [block]) as destination,
    ):
        with pytest.raises(MigrationFailed, match=expected):
            destination.wait_for_device_state(LIMIT)
        # And it stays ended.
        with pytest.raises(MigrationFailed, match=expected):
            destination.wait_for_completion(LIMIT)
        with pytest.raises(MigrationFailed, match=expected):
            destination.loaded()


def test_a_device_state_of_another_length(path: Path, block: Block, device_state: int) -> None:
    run = {"event": "run", "length": 6}
    with (
        scripted(path, REGISTERED, run, device_state=device_state),
        Destination(path, "vm0", [block]) as destination,
        pytest.raises(MigrationFailed, match="5 bytes of device state for 6"),
    ):
        destination.wait_for_device_state(LIMIT)


@pytest.mark.parametrize("question", ["advise", "discard"])
def test_memory_is_not_touched_once_the_vmm_runs(
    path: Path, block: Block, device_state: int, question: str
) -> None:
    lines = [REGISTERED, {"event": "run", "length": 5}, {"event": question}]
    with scripted(path, *lines, device_state=device_state):
        with Destination(path, "vm0", [block]) as destination:
            destination.wait_for_device_state(LIMIT)
            block.view[0] = 7
            destination.loaded()
            with pytest.raises(MigrationFailed, match=f"'{question}' out of order"):
                destination.wait_for_completion(LIMIT)
            assert block.view[0] == 7
        destination.close()


def test_leaving_before_completion_keeps_the_userfaultfd_until_it_is_closed(
    path: Path, block: Block, device_state: int
) -> None:
    before = open_descriptors()
    run = {"event": "run", "length": 5}
    with scripted(path, REGISTERED, run, device_state=device_state) as script:
        with Destination(path, "vm0", [block]) as destination:
            destination.wait_for_device_state(LIMIT)
        assert script.answers == []
        assert "anon_inode:[userfaultfd]" in set(open_descriptors()) - set(before)
        destination.close()
        destination.close()
        assert script is not None
    assert open_descriptors() == before


def test_a_wait_that_times_out_can_be_waited_again(path: Path, block: Block) -> None:
    with (
        scripted(path, REGISTERED, b'{"event":"advi'),
        Destination(path, "vm0", [block]) as destination,
    ):
        for _ in range(2):
            with pytest.raises(TimeoutError, match="has not said in time"):
                destination.wait_for_device_state(0.02)


def test_a_daemon_that_does_not_answer(path: Path, block: Block) -> None:
    with scripted(path), pytest.raises(TimeoutError, match="has not said in time"):
        Destination(path, "vm0", [block], timeout=0.05)


def test_a_daemon_that_is_not_there(path: Path, block: Block) -> None:
    with pytest.raises(FileNotFoundError, match="is it running") as caught:
        Destination(path, "vm0", [block])
    assert caught.value.filename == str(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nobody_listens:
        nobody_listens.bind(str(path))
        with pytest.raises(ConnectionRefusedError, match="is it running"):
            Destination(path, "vm0", [block])


def test_a_daemon_whose_backlog_is_full(path: Path, block: Block) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first,
    ):
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with pytest.raises(TimeoutError, match="accepts no connection"):
            Destination(path, "vm0", [block], timeout=0.05)


def test_a_block_that_is_not_mapped_is_refused_here_already(path: Path) -> None:
    with pytest.raises(OSError, match="1000"):
        Destination(path, "vm0", [Block.at("nowhere", PAGE, PAGE)])


# -- blocks --------------------------------------------------------------------------------------


def test_memory_that_was_mapped_by_others_has_no_view_and_is_not_unmapped(block: Block) -> None:
    other = Block.at("at", block.address, block.length)
    with pytest.raises(ValueError, match="'at' was not mapped"):
        _ = other.view
    other.close()
    block.view[0] = 1
    assert ctypes.string_at(block.address, 1) == b"\x01"


def test_closing_a_block_twice_closes_once() -> None:
    for block in (Block.anonymous("a", PAGE), Block.memory_file("b", PAGE)):
        block.close()
        block.close()
        assert block.descriptor is None
