"""What an operator may set for an incoming migration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and deadlines of one incoming migration. Times are seconds, sizes bytes."""

    package_limit: int = 16 << 20
    """Largest device package that is accepted."""
    first_byte_timeout: float = 30.0
    """How long a source that has connected may stay silent before its first byte."""
    idle_timeout: float = 60.0
    """How long a source may be silent before its package has come; after it there is no limit."""
    vmm_timeout: float = 60.0
    """How long a source waits for the VMM that its stream is for."""
    close_timeout: float = 10.0
    """How long the source has to close its connection after it was told that all is well."""
    fault_window: int = 192 << 10
    """SO_RCVBUF of a TCP stream (the kernel doubles it): what may queue before a page that a fault
    waits for. It also bounds the throughput of a long network: twice this much a round trip."""
