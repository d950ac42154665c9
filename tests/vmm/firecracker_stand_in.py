"""A VMM that does towards postcopyd what Firecracker does when it loads a snapshot with UFFD.

It maps its regions, opens and registers a userfaultfd, sends one message, and runs: its "vCPUs" are
threads that read memory through ctypes, which leaves the interpreter's lock free while they wait.
"""

from __future__ import annotations

import array
import ctypes
import json
import random
import socket
import threading
from collections.abc import Sequence
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Feature, Operation, RegisterMode, Userfaultfd
from tests.vmm.content import PAGE, content_of

_VCPUS = 3

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_DONTNEED = 4


class Generation(Enum):
    """Firecracker versions, by the fields that tell the page size."""

    # Words, not tuples: the enum of Python 3.11.2 makes something else of an empty tuple.
    V1_1 = ""
    V1_7 = "page_size_kib"
    V1_12 = "page_size page_size_kib"


class FirecrackerStandIn:
    """One VMM with a region of guest memory for each of `lengths`, bytes."""

    def __init__(
        self,
        lengths: Sequence[int],
        generation: Generation = Generation.V1_12,
        features: Feature = Feature.EVENT_REMOVE,
        page_size: int = PAGE,
    ) -> None:
        huge = page_size if page_size > PAGE else None
        if huge:
            features |= Feature.MISSING_HUGETLBFS
        self.regions = [Mapping.anonymous(length, huge) for length in lengths]
        self.userfaultfd = Userfaultfd.open()
        self.userfaultfd.handshake(features)
        self.descriptors = [self.userfaultfd.fileno()]
        for region in self.regions:
            self.userfaultfd.register(
                region.address, region.length, RegisterMode.MISSING, Operation.COPY
            )
        offset = 0
        self.message: list[dict[str, int | bool]] = []
        for region in self.regions:
            self.message.append(
                {
                    "base_host_virt_addr": region.address,
                    "size": region.length,
                    "offset": offset,
                    **dict.fromkeys(generation.value.split(), page_size),
                }
            )
            offset += region.length

    @property
    def text(self) -> bytes:
        """The message as Firecracker's serializer writes it."""
        return json.dumps(self.message, separators=(",", ":")).encode()

    def hand_over(self, path: Path, pieces: int = 1) -> socket.socket:
        """Connect and send the message, all descriptors with its first byte."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(path))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.descriptors))]
        size = -(-len(self.text) // pieces)
        for start in range(0, len(self.text), size):
            connection.sendmsg([self.text[start : start + size]], rights if start == 0 else [])
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.userfaultfd.close()
        for region in self.regions:
            region.close()


def run(
    path: Path, pipe: Connection, lengths: Sequence[int], generation: Generation, page_size: int
) -> None:
    """Be a whole VMM: hand over, run, tell through `pipe` which pages were wrong.

    The socket is closed at once, as versions up to 1.11 do. When every vCPU has seen its pages, a
    balloon takes the first half of each region back, and those pages must read as zeros.
    """
    with FirecrackerStandIn(lengths, generation, page_size=page_size) as vmm:
        vmm.hand_over(path).close()
        pages = [
            (f"region{number}", page, region.address + page * PAGE)
            for number, region in enumerate(vmm.regions)
            for page in range(region.length // PAGE)
        ]
        random.Random(1).shuffle(pages)
        wrong: list[str] = []
        vcpus = [
            threading.Thread(target=_compare, args=(pages[place::_VCPUS], wrong), daemon=True)
            for place in range(_VCPUS)
        ]
        for vcpu in vcpus:
            vcpu.start()
        for vcpu in vcpus:
            vcpu.join()
        for region in vmm.regions:
            _libc.madvise(region.address, region.length // 2, _MADV_DONTNEED)
            copy = ctypes.create_string_buffer(region.length)
            _libc.memcpy(copy, region.address, region.length)
            if any(copy.raw[: region.length // 2]) or not any(copy.raw[region.length // 2 :]):
                wrong.append("after the balloon")
        pipe.send(wrong)
        pipe.recv()  # lives on until it is told, or is killed


def _compare(pages: list[tuple[str, int, int]], wrong: list[str]) -> None:
    copy = ctypes.create_string_buffer(PAGE)
    for region, page, address in pages:
        _libc.memcpy(copy, address, PAGE)
        if copy.raw != content_of(region, page):
            wrong.append(f"{region} page {page}")
