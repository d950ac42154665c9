"""Coverage-guided fuzzing, with atheris, of what reads something from outside (`targets.py`).

    python -m tests.fuzz stream --seconds 60
    python -m tests.fuzz return-path --corpus DIRECTORY

What counts as a failure: any exception but the one that the reader documents, an answer that
depends on how the bytes are split or differs from that of the plain reference parser, one input
that takes 10 seconds, one allocation above 64 MiB. Without `--seconds` it runs until it is
interrupted. The input that failed is left in the directory `--artifacts`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(
    include=[
        "postcopyd.wire",
        "postcopyd.vmm.handoff",
        "postcopyd.vmm.checks",
        "postcopyd.incoming.journal",
        "postcopyd.daemon.channel",
        "postcopyd.daemon.sockets",
        "postcopyd.daemon.certificate_names",
    ]
):
    from tests.fuzz.targets import TARGETS

_LONGEST_INPUT = 22_000
"""Five pages: a few that are expected, a guess that is wrong, and something behind it."""
_MADE_ANEW = 0.2
"""How many inputs are not mutations but nearly right ones: bytes that are changed blindly seldom
remain JSON, and what decodes that tells nothing of how far it came."""


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
            itself = [sys.executable, "-m", "tests.fuzz"]
            sys.exit(subprocess.call([*itself, *sys.argv[1:], "--corpus", directory]))
    target = TARGETS[arguments.target]

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        numbers = Random(seed)
        if numbers.random() < _MADE_ANEW:
            return target.hostile(numbers)[:most]
        mutated: bytes = atheris.Mutate(data, most)
        return mutated

    arguments.corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
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
        target.one_input,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
