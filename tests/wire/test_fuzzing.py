"""Any bytes at all: only the protocol error, no endless loop; and a short coverage-guided run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopyd.wire.stream_reader import ResumeState, StreamReader
from tests.fuzz.targets import TARGETS, check
from tests.wire.streams import BLOCKS, PAGE, SECTION_ID, head, put, receive, until_pages

FRONTS = {
    "nothing": b"",
    "the head": head(),
    "everything up to the pages": until_pages(),
    "a resumed connection": None,
}
bits = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        (
            bytes.fromhex("0000000000000010 7e 00000002"),
            bytes.fromhex("0000000000001022 00") * 9,
            bytes.fromhex("0000000000000008 06") + b"pc.ram" + bytes(PAGE),
            (bytes.fromhex("0000000000002028") + bytes(PAGE)) * 3,
            bytes.fromhex("02 00000002"),
            bytes.fromhex("08 0002 0004 00000007"),
            bytes.fromhex("08 0007 0004 0000000a 08 0004 0000 08 0005 0000"),
        )
    ),
)


@pytest.mark.parametrize("front", FRONTS)
@settings(max_examples=150, deadline=None)
@given(
    st.lists(bits, max_size=12).map(b"".join),
    st.lists(st.integers(1, 9000), max_size=20),
    st.integers(-1, 200),
)
def test_any_bytes_are_read_or_refused_with_the_protocol_error(
    front: str, data: bytes, sizes: list[int], read_ahead: int
) -> None:
    before = FRONTS[front]
    resume = ResumeState(BLOCKS, SECTION_ID, PAGE) if before is None else None
    reader = StreamReader(resume=resume)
    reader.read_ahead_pages = read_ahead
    stream = (before or b"") + data
    # `receive` lets through anything but ProtocolError, and asserts that each step takes bytes.
    outcome = receive(reader, stream, sizes)
    if outcome.error is None:
        assert 0 <= len(stream) - reader.position <= PAGE + 264 + 0xFFFF
        assert put(reader, memoryview(b"x")) == 1
    else:
        assert outcome.error.position is not None
        assert outcome.error.position <= len(stream)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_what_is_nearly_right_is_accepted_or_refused(target: str, numbers: Random) -> None:
    check(target, TARGETS[target].hostile(numbers))


@pytest.mark.parametrize("target", ["stream", "return-path", "handoff"])
def test_a_short_coverage_guided_run_finds_nothing(target: str, tmp_path: Path) -> None:
    seconds = 2
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", target),
            *("--seconds", str(seconds), "--artifacts", str(tmp_path)),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []
    done = re.search(r"Done (\d+) runs", run.stderr)
    assert done is not None, run.stderr[-4000:]
    assert int(done[1]) > 100
