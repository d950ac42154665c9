"""Which worker something is for, and which migration a VMM that names none.

The front decides it from what the supervisor tells it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from postcopyd.vmm.checks import HandoffRefused


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


def check_only_one_waits(names: Sequence[str], number: int) -> None:
    """Check that it is clear for which migration a VMM is that does not name its own.

    :param names: of those that wait for a VMM, or of some of them.
    :param number: how many there are.
    :raise HandoffRefused: if it is not, with the reason.
    """
    if number == 0:
        raise HandoffRefused(
            "no migration waits for a VMM: create one (postcopyctl create NAME) first, for a "
            "VMM that does not name its migration"
        )
    if number > 1:
        more = "" if number == len(names) else f" and {number - len(names)} more"
        raise HandoffRefused(
            f"{number} migrations wait for a VMM ({', '.join(names)}{more}) and this VMM does not "
            "name its own: give each a handoff socket (postcopyctl create NAME --handoff PATH)"
        )
