"""What is said over a channel whose other end does not read all the time: in order, all of it."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from postcopyd.daemon.channel import Channel, Message


class _Unsaid(NamedTuple):
    message: Message
    descriptor: int | None
    is_copy: bool


class Outbox:
    """What waits until the other end reads on. To be used within a running event loop."""

    def __init__(self, channel: Channel, failed: Callable[[OSError], None]) -> None:
        """Begin with nothing to say.

        :param channel: stays the caller's, who closes it behind this.
        :param failed: called when something cannot be said, and is left out.
        """
        self._channel = channel
        self._failed = failed
        self._unsaid: deque[_Unsaid] = deque()
        self.moved = 0.0
        """When the other end was last seen to read on, by the event loop's clock."""

    def __len__(self) -> int:
        """Return how much waits."""
        return len(self._unsaid)

    def say(self, message: Message, descriptor: int | None = None, *, copy: bool = False) -> None:
        """Say something, later if the other end has much to read now.

        :param descriptor: stays the caller's, who keeps it open until it was sent.
        :param copy: send a copy of the descriptor, so that it may be closed at once.
        :raise OSError: if there is no descriptor for that.
        """
        is_copy = copy and descriptor is not None
        if is_copy:
            assert descriptor is not None
            descriptor = os.dup(descriptor)
        self._unsaid.append(_Unsaid(message, descriptor, is_copy))
        if len(self._unsaid) == 1:
            self._say_on()
            if self._unsaid:
                asyncio.get_running_loop().add_writer(self._channel.fileno(), self._go_on)

    def close(self) -> None:
        """Say nothing more. Idempotent."""
        if self._unsaid:
            asyncio.get_running_loop().remove_writer(self._channel.fileno())
        while self._unsaid:
            _close(self._unsaid.popleft())

    def _go_on(self) -> None:
        self.moved = asyncio.get_running_loop().time()
        self._say_on()
        if not self._unsaid and self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_writer(self._channel.fileno())

    def _say_on(self) -> None:
        while self._unsaid:
            first = self._unsaid[0]
            try:
                self._channel.send(first.message, first.descriptor, at_once=True)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error)
            if self._unsaid:  # who heard of the failure may have closed us
                _close(self._unsaid.popleft())


def _close(unsaid: _Unsaid) -> None:
    if unsaid.is_copy and unsaid.descriptor is not None:
        os.close(unsaid.descriptor)
