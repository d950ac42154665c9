"""A VMM that uses the client, in a process of its own: memory that is missing blocks it whole."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from postcopyd.kernel import memory_lock
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import UserfaultfdUnavailable
from postcopyd.vmm.client import Block, Destination, MigrationFailed
from tests.vmm.content import PAGE, content_of
from tests.vmm.handoffs import LIMIT, open_descriptors

NOBODY = 65534


@dataclass(frozen=True)
class Plan:
    """What kind of VMM it is."""

    kind: str = "anonymous"
    """anonymous, memory-file, or at: memory that the client did not map."""
    pages: int = 32
    page_size: int = PAGE
    locked: bool = False
    unprivileged: bool = False

    @property
    def length(self) -> int:
        return self.pages * self.page_size

    def make_block(self) -> Block:
        """Map the memory and write over all of it, as the boot of a VMM may."""
        match self.kind:
            case "anonymous":
                block = Block.anonymous("pc.ram", self.length, self.page_size)
            case "memory-file":
                block = Block.memory_file("pc.ram", self.length, self.page_size)
            case _:
                _mappings.append(Mapping.anonymous(self.length))
                block = Block.at("pc.ram", _mappings[-1].address, self.length)
        ctypes.memset(block.address, 0xFF, block.length)
        return block


_mappings: list[Mapping] = []


def vm_flags(block: Block) -> set[str]:
    """Return the flags that the kernel keeps of a block's mapping (proc_pid_smaps(5))."""
    smaps = Path("/proc/self/smaps").read_text()
    for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        start, end = (int(part, 16) for part in area.split(" ", 1)[0].split("-"))
        if start <= block.address < end:
            flags = re.search(r"^VmFlags: (.*)$", area, re.MULTILINE)
            assert flags
            return set(flags[1].split())
    raise AssertionError("the block is not mapped")


def migrate(path: Path, pipe: Connection, plan: Plan) -> None:
    """Live through a whole migration; tell through `pipe` what was seen at each stage."""
    block = plan.make_block()
    if plan.locked:
        memory_lock.lock_all(on_fault=False)
    if plan.unprivileged and os.geteuid() == 0:
        os.seteuid(NOBODY)
    balloon: list[bool] = []
    before = open_descriptors()
    with Destination(
        path, "vm0", [block], locked=plan.locked, on_balloon=balloon.append, timeout=LIMIT
    ) as destination:
        pipe.send({"listen": destination.listen, "user_mode_only": destination.user_mode_only})
        state = destination.wait_for_device_state(LIMIT)
        pipe.send(
            {
                "state": state,
                "locked": memory_lock.locked_bytes(),
                "flags": vm_flags(block),
                "balloon": tuple(balloon),
            }
        )
        destination.loaded()
        pipe.send([page for page in range(block.length // PAGE) if not _is_right(block, page)])
        destination.wait_for_completion(LIMIT)
        pipe.send(
            {
                "completed": destination.completed,
                "locked": memory_lock.locked_bytes(),
                "flags": vm_flags(block),
                "balloon": tuple(balloon),
            }
        )
    pipe.send([open_descriptors() == before, _is_right(block, 0)])
    block.close()


def _is_right(block: Block, page: int) -> bool:
    return ctypes.string_at(block.address + page * PAGE, PAGE) == content_of(block.name, page)


def run_and_fail(path: Path, pipe: Connection, plan: Plan) -> None:
    """Run, and have the migration fail; then tell what a thread that touches memory gets."""
    block = plan.make_block()
    try:
        with Destination(path, "vm0", [block], timeout=LIMIT) as destination:
            destination.wait_for_device_state(LIMIT)
            destination.loaded()
            destination.wait_for_completion(LIMIT)
    except MigrationFailed as error:
        pipe.send(str(error))
    seen = ctypes.create_string_buffer(PAGE)
    touch = ctypes.CDLL(None).memcpy
    touch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    thread = threading.Thread(target=touch, args=(seen, block.address, PAGE), daemon=True)
    thread.start()
    # The kernel counts who waits; nobody is left who could answer.
    deadline = threading.Event()
    timer = threading.Timer(LIMIT, deadline.set)
    timer.start()
    while _waiting_threads() == 0 and thread.is_alive() and not deadline.is_set():
        pass
    timer.cancel()
    pipe.send({"waits": thread.is_alive(), "waiting": _waiting_threads()})
    destination.close()
    thread.join(LIMIT)
    pipe.send({"waits": thread.is_alive(), "zeros": seen.raw == bytes(PAGE)})


def _waiting_threads() -> int:
    """Return how many faults wait on the userfaultfds of this process (their fdinfo)."""
    total = 0
    for entry in Path("/proc/self/fdinfo").iterdir():
        try:
            match = re.search(r"^total:\s*(\d+)", entry.read_text(), re.MULTILINE)
        except FileNotFoundError:
            continue
        total += int(match[1]) if match else 0
    return total


def open_without_descriptors(path: Path, pipe: Connection, plan: Plan) -> None:
    """Try to hand over when no descriptor can be opened; tell the error."""
    block = plan.make_block()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        Destination(path, "vm0", [block])
    except UserfaultfdUnavailable as error:
        pipe.send(str(error))


class Child:
    """A process that runs one of the functions above."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
        self.process = process
        self._pipe = pipe

    async def said(self) -> Any:
        """Return what it tells next, while the event loop goes on."""
        assert await asyncio.to_thread(self._pipe.poll, 2 * LIMIT), "the process says nothing"
        return self._pipe.recv()


@contextmanager
def running(target: Any, path: Path, plan: Plan) -> Iterator[Child]:
    """Run `target` in a process of its own; kill what is left of it at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(path, theirs, plan))
    process.start()
    theirs.close()
    try:
        yield Child(process, ours)
    finally:
        process.kill()
        process.join(LIMIT)
        process.close()
        ours.close()
