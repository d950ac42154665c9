"""The host check: on this host, and on this host with something taken away."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from postcopyd.incoming.host_check import Finding, HostReport, check_host
from postcopyd.kernel.huge_pages import free_huge_pages
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.kernel.userfaultfd import _IOC_REGISTER, _IOC_WAKE
from tests.support import run_python

pytestmark = pytest.mark.usefixtures("assert_nothing_left")

HUGE = 2 << 20

WHAT_THE_CHECK_IS_FOR = {
    *("userfaultfd", "kernel-faults", "api", "register", "copy", "zeropage", "wake"),
    *("huge-pages", "shared-memory", "target-page-size", "block-lengths", "memory-locks"),
    *("minor-faults", "write-protect", "poison", "move", "exact-address", "thread-id", "removals"),
}

# Takes something away from itself (argument 1), checks, and says what it has found and what the
# check has left behind.
TAKE_AWAY = """
import errno, json, resource, sys
import msgspec
from postcopyd.incoming.host_check import check_host
from postcopyd.kernel import memory_lock
from tests.kernel.rights import answer_ioctl, drop_rights, forbid_userfaultfd
from tests.support import belongings

check_host()  # for what is imported and allocated once
exec(sys.argv[1])
before = belongings()
locked_before = memory_lock.locked_bytes()
report = check_host()
left = belongings() - before
print(json.dumps({
    "findings": {finding.key: msgspec.to_builtins(finding) for finding in report.findings},
    "can_postcopy": report.can_postcopy,
    "left": left,
    "locked": [locked_before, memory_lock.locked_bytes()],
}))
"""


def check_without(what: str) -> Any:
    return json.loads(run_python(TAKE_AWAY, what))


def finding_of(report: HostReport, key: str) -> Finding:
    (finding,) = (finding for finding in report.findings if finding.key == key)
    return finding


def test_here_everything_is_there(huge_pages: Callable[[int], None]) -> None:
    huge_pages(2)
    report = check_host()
    assert [finding for finding in report.findings if not finding.available] == []
    assert report.can_postcopy
    keys = [finding.key for finding in report.findings]
    assert len(keys) == len(set(keys))
    assert set(keys) >= WHAT_THE_CHECK_IS_FOR
    for finding in report.findings:
        assert finding.title
        assert finding.why
        assert finding.detail
        assert finding.remedy == ""


def test_a_report_can_be_sent_as_json() -> None:
    report = check_host()
    assert json.loads(msgspec.json.encode(report)) == json.loads(
        json.dumps(msgspec.to_builtins(report))
    )


def test_without_a_free_huge_page_that_is_said_and_post_copy_can_run(
    huge_pages: Callable[[int], None],
) -> None:
    huge_pages(1)
    with Mapping.anonymous(free_huge_pages(HUGE) * HUGE, HUGE):
        report = check_host()
    for key in ("huge-pages", "minor-faults-huge"):
        finding = finding_of(report, key)
        assert not finding.available
        assert not finding.required
        assert "no huge page is free" in finding.detail
        assert "2048 KiB" in finding.detail
        assert "vm.nr_hugepages" in finding.remedy
    assert report.can_postcopy


def test_a_user_without_rights_can_run_post_copy_but_not_wait_in_the_kernel() -> None:
    report = check_without("drop_rights()")
    findings = report["findings"]
    unavailable = {key for key, finding in findings.items() if not finding["available"]}
    assert unavailable - {"huge-pages", "minor-faults-huge"} == {"kernel-faults", "memory-locks"}
    assert "Operation not permitted" in findings["kernel-faults"]["detail"]
    assert "Permission denied" in findings["kernel-faults"]["detail"]
    assert "vm.unprivileged_userfaultfd=1" in findings["kernel-faults"]["remedy"]
    assert "CAP_IPC_LOCK" in findings["memory-locks"]["remedy"]
    assert report["can_postcopy"]
    assert report["left"] == {}


def test_without_any_userfaultfd_every_no_has_a_remedy() -> None:
    report = check_without("drop_rights(); forbid_userfaultfd(errno.EPERM)")
    findings = report["findings"]
    assert not report["can_postcopy"]
    assert not findings["userfaultfd"]["available"]
    assert "seccomp" in findings["userfaultfd"]["remedy"]
    available = {key for key, finding in findings.items() if finding["available"]}
    assert available == {"target-page-size", "block-lengths"}
    for key in findings.keys() - available:
        assert findings[key]["remedy"]
        assert findings[key]["detail"]
    assert report["left"] == {}


def test_a_kernel_without_userfaultfd_is_told_so() -> None:
    report = check_without("drop_rights(); forbid_userfaultfd(errno.ENOSYS)")
    assert "CONFIG_USERFAULTFD" in report["findings"]["userfaultfd"]["remedy"]
    assert not report["can_postcopy"]


def test_what_a_filter_refuses_is_a_no_in_the_kernels_words() -> None:
    report = check_without(f"answer_ioctl({_IOC_REGISTER}, errno.EACCES)")
    findings = report["findings"]
    assert findings["api"]["available"]
    assert findings["kernel-faults"]["available"] is False
    assert "UFFDIO_REGISTER" in findings["register"]["detail"]
    assert "Permission denied" in findings["register"]["detail"]
    assert "seccomp" in findings["register"]["remedy"]
    assert not report["can_postcopy"]
    assert report["left"] == {}


def test_a_wake_that_does_nothing_is_noticed_in_time_and_leaves_nothing() -> None:
    report = check_without(f"answer_ioctl({_IOC_WAKE}, 0)")
    unavailable = {key for key, finding in report["findings"].items() if not finding["available"]}
    assert unavailable - {"huge-pages", "minor-faults-huge"} == {"wake"}
    assert "still waits" in report["findings"]["wake"]["detail"]
    assert report["findings"]["wake"]["remedy"]
    assert not report["can_postcopy"]
    assert report["left"] == {}


@pytest.mark.parametrize("on_fault", [False, True])
def test_a_process_whose_memory_is_locked_can_check_and_stays_locked(on_fault: bool) -> None:
    report = check_without(f"memory_lock.lock_all(on_fault={on_fault})")
    unavailable = {key for key, finding in report["findings"].items() if not finding["available"]}
    assert unavailable <= {"huge-pages", "minor-faults-huge"}
    before, after = report["locked"]
    assert after >= before > 0


def test_a_process_whose_memory_is_not_locked_stays_so() -> None:
    assert check_without("pass")["locked"] == [0, 0]


@pytest.mark.parametrize("size", [2 * HOST_PAGE_SIZE, 0, -4096, 3000])
def test_a_target_page_size_that_does_not_fit_the_hosts_is_a_no(size: int) -> None:
    report = check_host(target_page_size=size)
    finding = finding_of(report, "target-page-size")
    assert not finding.available
    assert finding.required
    assert f"{size} bytes on the wire" in finding.detail
    assert finding.remedy
    assert not report.can_postcopy


def test_target_pages_smaller_than_the_hosts_are_no_hindrance() -> None:
    assert check_host(target_page_size=1024).can_postcopy


def test_blocks_that_are_not_whole_pages_are_a_no_that_names_them() -> None:
    report = check_host(block_lengths=[(HUGE, HUGE), (5000, 4096), (HUGE + 4096, HUGE), (0, 4096)])
    finding = finding_of(report, "block-lengths")
    assert finding.detail == (
        "5000 bytes are not whole pages of 4096; 2101248 bytes are not whole pages of 2097152; "
        "0 bytes are not whole pages of 4096"
    )
    assert finding.required
    assert finding.remedy
    assert not report.can_postcopy
    assert check_host(block_lengths=[(HUGE, HUGE), (HUGE, 4096)]).can_postcopy
