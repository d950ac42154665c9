"""The host check: whether post-copy can run here, found out by doing what it does.

Every finding about memory comes from a trial on real memory (`host_trials`), none from a version
number or a configuration file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from postcopyd.incoming import host_trials as trials
from postcopyd.incoming.trial_memory import Missing
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.kernel.userfaultfd import Feature, UserfaultfdUnavailable


class Finding(msgspec.Struct, frozen=True):
    """One thing that this host has or has not."""

    key: str
    """Stable name, for programs."""
    title: str
    """What it is, for people."""
    available: bool
    required: bool
    """Whether post-copy cannot run at all without it."""
    why: str
    """Why it matters."""
    remedy: str
    """What to do about a no; empty when it is available."""
    detail: str
    """What was seen, in figures or in the kernel's words."""


class HostReport(msgspec.Struct, frozen=True):
    """What the host check has found, in the order of its trials."""

    findings: tuple[Finding, ...]
    can_postcopy: bool
    """Whether everything that is required is available."""


class _Check(msgspec.Struct, frozen=True):
    key: str
    title: str
    why: str
    trial: Callable[[], str]
    remedy: str
    """For when the kernel refuses, and `Missing` does not know better."""
    required: bool = False


def _newer(features: Feature) -> str:
    return f"Use Linux {features.since} or newer, with CONFIG_USERFAULTFD"


_SECCOMP = (
    "Allow the ioctls of userfaultfd in the seccomp filter of the container or service, "
    "or use another kernel"
)
_RIGHTS = (
    "Run VMMs as root, give their user access to /dev/userfaultfd, or set "
    "sysctl vm.unprivileged_userfaultfd=1"
)

# In the order in which one builds on the other.
_CHECKS = (
    _Check(
        "userfaultfd",
        "userfaultfd",
        "A thread of the guest that touches missing memory waits until its page has come",
        trials.opening,
        _RIGHTS,
        required=True,
    ),
    _Check(
        "kernel-faults",
        "Faults of the kernel",
        "KVM, vhost and system calls touch guest memory from within the kernel; "
        "where that may not wait, it fails with EFAULT",
        trials.kernel_faults,
        _RIGHTS,
    ),
    _Check(
        "api",
        "API version",
        "The kernel and postcopyd must speak of the same thing",
        trials.interface,
        _SECCOMP,
        required=True,
    ),
    _Check(
        "register",
        "REGISTER and UNREGISTER",
        "Guest memory is watched from the switchover until all of it is there",
        trials.registering,
        _SECCOMP,
        required=True,
    ),
    _Check(
        "copy",
        "COPY",
        "Puts a page where the guest waits for it, at once and whole",
        trials.copying,
        _SECCOMP,
        required=True,
    ),
    _Check(
        "zeropage",
        "ZEROPAGE",
        "Gives a page of zeros without taking memory for it",
        trials.zero_pages,
        _SECCOMP,
        required=True,
    ),
    _Check(
        "wake",
        "WAKE",
        "Lets a thread go on whose page has come meanwhile",
        trials.waking,
        _SECCOMP,
        required=True,
    ),
    _Check(
        "shared-memory",
        "Shared memory",
        "Guests whose memory is a memory file, for vhost-user and for adoption",
        trials.shared_memory,
        _newer(Feature.MISSING_SHMEM),
    ),
    _Check(
        "huge-pages",
        "Huge pages",
        "Guests whose memory is of huge pages",
        trials.huge_pages,
        _newer(Feature.MISSING_HUGETLBFS),
    ),
    _Check(
        "removals",
        "Removal events",
        "What a balloon gives back must not be filled again from the source",
        trials.removals,
        _newer(Feature.EVENT_REMOVE | Feature.EVENT_UNMAP),
    ),
    _Check(
        "minor-faults",
        "Minor faults in shared memory",
        "Pages can be written into the memory file first and be mapped then",
        trials.minor_faults_shared,
        _newer(Feature.MINOR_SHMEM),
    ),
    _Check(
        "minor-faults-huge",
        "Minor faults in huge pages",
        "As minor faults, for guests whose memory is of huge pages",
        trials.minor_faults_huge,
        _newer(Feature.MINOR_HUGETLBFS),
    ),
    _Check(
        "write-protect",
        "Write protection",
        "Writes of a running guest can be noticed, as for a snapshot of it",
        trials.write_protection,
        _newer(Feature.PAGEFAULT_FLAG_WP),
    ),
    _Check(
        "write-protect-shared",
        "Write protection of shared memory",
        "As write protection, for guests whose memory is a memory file",
        trials.write_protection_shared,
        _newer(Feature.WP_HUGETLBFS_SHMEM),
    ),
    _Check(
        "poison",
        "POISON",
        "A page that the source has lost to a hardware error is one for the guest as well",
        trials.poison,
        _newer(Feature.POISON),
    ),
    _Check(
        "move",
        "MOVE",
        "A page that lies elsewhere in the VMM's memory is placed without copying it",
        trials.moving,
        _newer(Feature.MOVE),
    ),
    _Check(
        "exact-address",
        "Exact addresses",
        "The report tells which byte was waited for, not only which page",
        trials.exact_address,
        _newer(Feature.EXACT_ADDRESS),
    ),
    _Check(
        "thread-id",
        "Thread ids",
        "The report tells which virtual CPU waited, and for how long",
        trials.thread_id,
        _newer(Feature.THREAD_ID),
    ),
    _Check(
        "memory-locks",
        "Memory locks",
        "A VMM that locks its memory has to let go while it is empty, and to lock it again",
        trials.memory_locks,
        "Give the VMM's user the right CAP_IPC_LOCK, or raise RLIMIT_MEMLOCK "
        "(LimitMEMLOCK=infinity); only VMMs that lock their memory need it",
    ),
)


def check_host(
    target_page_size: int = 4096, block_lengths: Iterable[tuple[int, int]] = ()
) -> HostReport:
    """Find out whether post-copy can run on this host, as the user and with the limits of now.

    It takes some ten milliseconds; where the kernel does not answer, each trial ends after two
    seconds. Memory that this process has locked is unlocked for a moment, so this is not for a
    process that others depend on. Nothing is left behind.

    :param target_page_size: bytes of a page on the wire.
    :param block_lengths: of each RAM block that is to come its length and its page size, bytes.
    """
    findings = [
        *(_carry_out(check) for check in _CHECKS),
        _target_page_size(target_page_size),
        _block_lengths(block_lengths),
    ]
    return HostReport(
        tuple(findings), all(finding.available for finding in findings if finding.required)
    )


def _carry_out(check: _Check) -> Finding:
    available = False
    remedy = check.remedy
    try:
        detail = check.trial()
        available = True
        remedy = ""
    except (Missing, UserfaultfdUnavailable) as error:
        detail, remedy = error.detail, error.remedy
    except OSError as error:
        detail = str(error.strerror)
    return Finding(check.key, check.title, available, check.required, check.why, remedy, detail)


def _target_page_size(size: int) -> Finding:
    available = 0 < size <= HOST_PAGE_SIZE and size.bit_count() == 1
    return Finding(
        "target-page-size",
        "Target page size",
        available,
        True,
        "A page that has come is placed at once, so it must not be a part of a page on the wire",
        "" if available else f"Migrate to a host whose pages are of {size} bytes or more",
        f"{size} bytes on the wire, {HOST_PAGE_SIZE} bytes here",
    )


def _block_lengths(blocks: Iterable[tuple[int, int]]) -> Finding:
    wrong = [
        f"{length} bytes are not whole pages of {page_size}"
        for length, page_size in blocks
        if length <= 0 or page_size <= 0 or length % page_size
    ]
    return Finding(
        "block-lengths",
        "Block lengths",
        not wrong,
        True,
        "Memory is watched and placed in whole pages only",
        "Give the guest memory that is a multiple of its page size" if wrong else "",
        "; ".join(wrong) or "all blocks are made of whole pages",
    )
