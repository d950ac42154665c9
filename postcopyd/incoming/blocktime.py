"""How long each thread of the VMM was blocked on missing pages."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class ThreadReport(msgspec.Struct, frozen=True):
    """One thread of the VMM, such as a vCPU."""

    name: str
    """Such as ``vcpu0``; ``others`` for all threads that have no name."""
    faults: int
    """How often it was blocked."""
    seconds: float
    """How long in all, from reading its fault to placing the page."""
    longest: float
    """How long at most, seconds."""


class _Account(msgspec.Struct):
    faults: int = 0
    total: int = 0
    longest: int = 0


class Blocktime:
    """Times by thread, nanoseconds of one clock. Needs a userfaultfd that tells the thread ids."""

    __slots__ = ("_accounts", "_at", "_others", "_threads")

    def __init__(self, names: Mapping[int, str]) -> None:
        """Keep an account for each thread of `names` (thread id -> name), one for all others."""
        self._others = _Account()
        self._accounts = {name: _Account() for name in names.values()}
        self._threads = {thread: self._accounts[name] for thread, name in names.items()}
        self._at: dict[int, list[tuple[int, int]]] = {}

    def blocked(self, address: int, thread: int, now: int) -> None:
        """Note that a thread waits for the page at `address`."""
        self._at.setdefault(address, []).append((thread, now))

    def released(self, address: int, now: int) -> None:
        """Note that whoever waits for the page at `address` goes on."""
        for thread, since in self._at.pop(address, ()):
            account = self._threads.get(thread, self._others)
            elapsed = now - since
            account.faults += 1
            account.total += elapsed
            account.longest = max(account.longest, elapsed)

    def rename(self, names: Mapping[int, str]) -> None:
        """Take the threads of another VMM, which go on with the accounts of the same names."""
        self._at.clear()
        self._threads = {
            thread: self._accounts.setdefault(name, _Account()) for thread, name in names.items()
        }

    def reports(self) -> list[ThreadReport]:
        """Tell of each thread, those without a name last and only if there are any."""
        accounts = dict(self._accounts)
        if self._others.faults:
            accounts["others"] = self._others
        return [
            ThreadReport(name, account.faults, account.total / 1e9, account.longest / 1e9)
            for name, account in accounts.items()
        ]
