"""What a migration does that takes time, and who is told when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from postcopyd.incoming.vmm import VmmFailure
from postcopyd.wire.errors import ProtocolError


class Tasks:
    """The tasks of one migration. None outlives `end`; some end with the VMM that they are for."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        vmm_failed: Callable[[VmmFailure], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Begin with none.

        :param vmm_failed: told when the VMM has not done its part in one of them.
        :param failed: told of a `ProtocolError`, an `OSError`, or a mistake of ours.
        """
        self._loop = loop
        self._vmm_failed = vmm_failed
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()
        self._for_vmm: list[asyncio.Task[None]] = []

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do `work`."""

        async def guarded() -> None:
            try:
                await work
            except VmmFailure as error:
                self._vmm_failed(error)
            except (ProtocolError, OSError) as error:
                self._failed(error)
            except Exception as error:
                # A mistake of ours. Whoever waits for this work would wait for ever.
                self._loop.call_exception_handler(
                    {"message": "unexpected error in a migration", "exception": error}
                )
                self._failed(RuntimeError(f"a mistake of postcopyd's, see its log: {error!r}"))

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step never looks at its work.
        task.add_done_callback(lambda _: work.close())
        return task

    def begin_for_vmm(self, work: Coroutine[Any, Any, None]) -> None:
        """As `begin`, for work that ends with the VMM."""
        self._for_vmm.append(self.begin(work))

    def end_with_vmm(self) -> None:
        """End what is for the VMM; but the task that calls this goes on."""
        _cancel(self._for_vmm)
        self._for_vmm.clear()

    def end(self) -> None:
        """End all; but the task that calls this goes on."""
        _cancel(self._tasks)


def _cancel(tasks: set[asyncio.Task[None]] | list[asyncio.Task[None]]) -> None:
    current = asyncio.current_task()
    for task in tasks:
        if task is not current:
            task.cancel()
