"""The C programs of the bench, compiled when their source has changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parent
_FLAGS = ["-O2", "-Wall", "-Wextra"]
_PROGRAMS = {
    "source": ["source.c"],
    "round_trip": ["round_trip.c"],
    "floor": ["floor.c", "guest.c", "-lpthread"],
    "guest.so": ["-shared", "-fPIC", "guest.c"],
}


def compiled() -> Path:
    """Return the directory with all programs.

    :raise subprocess.CalledProcessError: if one does not compile.
    """
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "postcopyd" / "bench" / digest.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    for program, words in _PROGRAMS.items():
        target = directory / program
        if not target.exists():
            partial = directory / f"{program}.{os.getpid()}"
            subprocess.run(["gcc", *_FLAGS, "-o", str(partial), *words], cwd=_SOURCES, check=True)
            partial.rename(target)
    return directory
