"""The memory image of the demo: content that tells of every page which one it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

PAGE = 4096
_CHUNK = 1 << 20
_SEED = 20260


def make_image(path: Path, length: int, progress: Callable[[int], None] | None = None) -> None:
    """Write a sparse file of `length` bytes: one page in four is zero, no two others are alike.

    :raise OSError: if there is no room.
    """
    numbers = random.Random(_SEED)  # noqa: S311 - a picture of memory, not a secret
    chunk = bytearray(numbers.randbytes(_CHUNK))
    with path.open("wb") as file:
        file.truncate(length)
        for start in range(0, length, _CHUNK):
            end = min(start + _CHUNK, length)
            for page in range(start, end, PAGE):
                chunk[page - start : page - start + 8] = page.to_bytes(8, "big")
            if progress is not None:
                progress(end)
            if start // _CHUNK % 4 == 3:
                continue  # a hole: nothing was ever written here
            file.seek(start)
            file.write(chunk[: end - start])
