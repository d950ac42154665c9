"""Which worker something is for: decided by the front from what the supervisor tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Placements:
    """The migrations that are being created, of which the supervisor may not know yet.

    Whoever asks for one of them meanwhile, such as its VMM, is sent to the same worker.
    """

    def __init__(self) -> None:
        self._workers: dict[str, int] = {}
        self._users: Counter[str] = Counter()

    @contextmanager
    def placed(self, name: str, worker: int) -> Iterator[None]:
        """Have a migration belong to a worker until the block is left."""
        self._workers[name] = worker
        self._users[name] += 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._workers[name]

    def worker_for(self, name: str, known: int | None, ready: Mapping[int, int]) -> int | None:
        """Return the worker for a migration that is there, or is to be created.

        :param known: who has it.
        :param ready: the workers that work -> how many migrations each has.
        :return: None if there is nobody to create it.
        """
        if known is not None:
            return known
        if name in self._workers:
            return self._workers[name]
        coming = Counter(self._workers.values())
        return min(ready, key=lambda worker: (ready[worker] + coming[worker], worker), default=None)
