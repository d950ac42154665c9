"""What an operator may set for an incoming migration."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True):
    """Limits and deadlines of one incoming migration. Times are seconds, sizes bytes."""

    package_limit: int = 16 << 20
    """Largest device package that is accepted."""
    memory_limit: int = 4 << 40
    """Most memory of one VMM: the accounts take 1/8192 of it."""
    staging_limit: int = 0
    """Most that is kept of what comes before the switchover for private memory; 0 for no limit."""
    staging_limit_together: int = 0
    """Most that is kept of it by all migrations of one event loop; 0 for no limit."""
    first_byte_timeout: float = 30.0
    """How long a source that has connected may stay silent before its first byte."""
    idle_timeout: float = 60.0
    """How long a source may be silent before its package has come; after it there is no limit."""
    vmm_timeout: float = 60.0
    """How long a source waits for the VMM that its stream is for."""
    alarm_after: float = 30.0
    """How long nothing may come of memory that is missing, once the guest is here, or a fault wait,
    before there is an alarm. It ends nothing."""
    close_timeout: float = 10.0
    """How long the source has to close its connection after it was told that all is well."""
    break_after: int = 10
    """After how long a TCP stream is broken whose other end does not answer; whole seconds, 2 or
    more, as the kernel keeps them. As long a connection that does not say what it is is waited for
    behind the end of the stream, when pages are missing."""
    path_grace: float = 1.0
    """How long the network path of a stream may be gone when it may come back by itself."""
    fault_window: int = 192 << 10
    """SO_RCVBUF of a TCP stream (the kernel doubles it): what may queue before a page that a fault
    waits for. It also bounds the throughput of a long network: twice this much a round trip."""
