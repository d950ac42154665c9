"""A tmpfs of a few pages that is mounted nowhere: fsopen(2), fsconfig(2), fsmount(2)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postcopyd.kernel.system_calls import system_call

_FSOPEN = 430
_FSCONFIG = 431
_FSMOUNT = 432
_SET_STRING = 1
_CREATE = 6


def _text(value: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value or 0


def _mount(pages: int) -> int:
    """Return the descriptor of its directory, with which it goes away."""
    name, key, value = b"tmpfs", b"nr_blocks", str(pages).encode()
    context = system_call("fsopen", _FSOPEN, _text(name), 1)
    system_call("fsconfig", _FSCONFIG, context, _SET_STRING, _text(key), _text(value), 0)
    system_call("fsconfig", _FSCONFIG, context, _CREATE, 0, 0, 0)
    mount = system_call("fsmount", _FSMOUNT, context, 1, 0)
    os.close(context)
    return mount


@contextmanager
def directory_on_small_tmpfs(pages: int) -> Iterator[Path]:
    """Give a directory in whose files there is room for `pages` pages."""
    mount = _mount(pages)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{mount}")
    finally:
        os.close(mount)


@contextmanager
def file_on_small_tmpfs(pages: int, length: int) -> Iterator[int]:
    """Give the descriptor of a file of `length` bytes for which there are only `pages` pages."""
    mount = _mount(pages)
    descriptor = os.open("memory", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=mount)
    os.close(mount)
    try:
        os.ftruncate(descriptor, length)
        yield descriptor
    finally:
        os.close(descriptor)
