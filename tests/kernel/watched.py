"""Memory of this process under a userfaultfd of this process."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.kernel.userfaultfd import Feature, Operation, RegisterMode, Userfaultfd
from tests.support import wait_readable

PAGE = HOST_PAGE_SIZE
HUGE = 2 << 20
NO_FEATURES = Feature(0)


class Watched:
    """A mapping, all of it registered, and a second one to place from: page i is full of i + 1.

    Close it before what waits for its pages is joined: closing lets them go on.
    """

    def __init__(
        self,
        mapping: Mapping,
        features: Feature = NO_FEATURES,
        mode: RegisterMode = RegisterMode.MISSING,
        page_size: int = PAGE,
    ) -> None:
        self.mapping = mapping
        self.address = mapping.address
        self.length = mapping.length
        self.page_size = page_size
        self.source = Mapping.anonymous(mapping.length)
        for page in range(mapping.length // page_size):
            self.source.view[page * page_size : (page + 1) * page_size] = self.content(page)
        self.userfaultfd = Userfaultfd.open()
        self.userfaultfd.handshake(features)
        self.operations = self.userfaultfd.register(self.address, self.length, mode, Operation.WAKE)

    @classmethod
    def anonymous(cls, pages: int = 8, features: Feature = NO_FEATURES) -> Self:
        """Make private memory of ordinary pages, registered for missing ones."""
        return cls(Mapping.anonymous(pages * PAGE), features)

    def page(self, number: int) -> int:
        """Return the address of a page."""
        return self.address + number * self.page_size

    def content(self, number: int) -> bytes:
        """Return what the source has for a page."""
        return bytes([number % 255 + 1]) * self.page_size

    def copy(self, first: int, count: int = 1) -> int:
        """Place pages from the source."""
        offset = first * self.page_size
        return self.userfaultfd.copy(
            self.address + offset, self.source.address + offset, count * self.page_size
        )

    def events(self) -> list[tuple[int, int, int, int]]:
        """Wait until there is an event, read what one read gives."""
        wait_readable(self.userfaultfd.fileno())
        return list(self.userfaultfd.read_events())

    def event(self) -> tuple[int, int, int, int]:
        """Wait for one event; there must not be another one."""
        (event,) = self.events()
        return event

    def close(self) -> None:
        """Let go of everything."""
        self.userfaultfd.close()
        self.mapping.close()
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
