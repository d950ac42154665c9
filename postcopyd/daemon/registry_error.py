"""What a request for a migration can be refused with."""

from __future__ import annotations

from typing import Literal

ErrorCode = Literal[
    "invalid-name",
    "invalid-address",
    "invalid-source",
    "no-such-migration",
    "name-taken",
    "too-many-migrations",
    "address-unusable",
    "not-secure",
    "out-of-resources",
    "past-the-package",
    "vmm-refused",
    "waits-for-no-vmm",
    "guest-may-have-run",
    "cannot-abandon",
    "stopping",
    "unavailable",
    "unreadable",
]


class RegistryError(Exception):
    """What was asked for cannot be done; `code` is for programs, the rest for people."""

    def __init__(self, code: ErrorCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.hint = hint
