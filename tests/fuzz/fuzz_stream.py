"""Coverage-guided fuzzing of the readers of stream, preempt channel and return path, with atheris.

    python -m tests.fuzz.fuzz_stream stream --seconds 60
    python -m tests.fuzz.fuzz_stream return-path --corpus DIRECTORY

What counts as a failure: any exception but `ProtocolError`, an answer that differs from that of
the plain reference parser, one input that takes 10 seconds, one allocation above 64 MiB. Without
`--seconds` it runs until it is interrupted. The input that failed is left in the directory
`--artifacts`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["postcopyd.wire"]):
    from postcopyd.wire.errors import ProtocolError
    from postcopyd.wire.preempt_reader import PreemptReader
    from postcopyd.wire.return_path import ReturnMessage, ReturnPathReader
    from postcopyd.wire.stream_reader import StreamReader

from tests.fuzz.corpus import preempt_seeds, return_path_seeds, stream_seeds
from tests.wire.reference_parser import ReferenceParser
from tests.wire.streams import BLOCKS, PAGE, receive, until_pages

_LONGEST_INPUT = 22_000
"""Five pages: a few that are expected, a guess that is wrong, and something behind it."""
_RECEIVES = 300
"""Most receives of the chosen size; what is left then comes at once, to save time."""
_SIZES = (1, 2, 7, 8, 9, 100, 4095, 4104, 4105, 9000, 70_000)
_PREFIX = until_pages()


def one_stream(data: bytes) -> None:
    """Read one stream: the first byte says how it is split and whether a right head is in front.

    :raise AssertionError: if the reader and the reference parser do not agree.
    """
    if not data:
        return
    choice, stream = data[0], data[1:]
    if choice & 0x80:
        stream = _PREFIX + stream
    size = _SIZES[(choice & 0x7F) % len(_SIZES)]
    reader = StreamReader()
    outcome = receive(reader, stream, [size] * min(len(stream) // size, _RECEIVES))
    reference = ReferenceParser(stream)
    if _beyond_the_reference(stream, reference):
        return
    wrong_at = outcome.error.position if outcome.error else None
    assert wrong_at == reference.wrong_at, (outcome.error, reference.wrong_at)
    assert outcome.events == reference.events


def _beyond_the_reference(stream: bytes, reference: ReferenceParser) -> bool:
    """Tell whether the reference stopped at what only the reader knows.

    That is a subsection of the configuration, and ADVISE with other target pages.
    """
    at = reference.wrong_at
    if at is None:
        return False
    subsection = not reference.events and stream[at : at + 1] == b"\x05"
    return subsection or stream[at : at + 3] == b"\x08\0\x03"


def one_preempt_channel(data: bytes) -> None:
    """Read one preempt channel: the first byte says how it is split.

    :raise AssertionError: if the split makes a difference.
    """
    if not data:
        return
    size, said = _SIZES[data[0] % len(_SIZES)], data[1:]
    split = receive(PreemptReader(BLOCKS, PAGE), said, [size] * min(len(said) // size, _RECEIVES))
    whole = receive(PreemptReader(BLOCKS, PAGE), said)
    assert split.events == whole.events
    assert str(split.error) == str(whole.error)


def one_return_path(data: bytes) -> None:
    """Read one return path: the first byte says how it is split.

    :raise AssertionError: if the split makes a difference.
    """
    if not data:
        return
    size, said = data[0] % 32 + 1, data[1:]
    pieces = [said[start : start + size] for start in range(0, len(said), size)]
    assert _messages(pieces) == _messages([said])


def _messages(pieces: list[bytes]) -> tuple[list[ReturnMessage], str]:
    reader = ReturnPathReader(BLOCKS)
    came: list[ReturnMessage] = []
    try:
        for piece in pieces:
            came.extend(reader.feed(piece))
    except ProtocolError as error:
        return came, str(error)
    return came, ""


TARGETS = {
    "stream": (one_stream, stream_seeds),
    "preempt": (one_preempt_channel, preempt_seeds),
    "return-path": (one_return_path, return_path_seeds),
}


def main() -> None:
    """Fuzz what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS), nargs="?", default="stream")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long; 0: never")
    parser.add_argument("--corpus", type=Path, help="keep interesting inputs here")
    parser.add_argument("--artifacts", type=Path, default=Path(), help="leave failures here")
    arguments = parser.parse_args()
    if arguments.corpus is None:
        # libFuzzer ends its process without unwinding, so another one has to clean up.
        with tempfile.TemporaryDirectory() as directory:
            itself = [sys.executable, "-m", "tests.fuzz.fuzz_stream"]
            sys.exit(subprocess.call([*itself, *sys.argv[1:], "--corpus", directory]))
    one_input, seeds = TARGETS[arguments.target]
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (arguments.corpus / f"seed-{number}").write_bytes(seed[:_LONGEST_INPUT])
    atheris.Setup(
        [
            sys.argv[0],
            str(arguments.corpus),
            f"-max_total_time={arguments.seconds}",
            f"-max_len={_LONGEST_INPUT}",
            f"-artifact_prefix={arguments.artifacts}/",
            "-timeout=10",
            "-malloc_limit_mb=64",
            "-rss_limit_mb=1024",
        ],
        one_input,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
