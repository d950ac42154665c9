"""`postcopyctl check`: what it prints of a host, and its exit status."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from postcopyd.cli.check import print_report
from postcopyd.cli.postcopyctl import main
from postcopyd.incoming import host_check
from postcopyd.incoming.host_check import HostReport


def without(report: HostReport, *keys: str) -> HostReport:
    """The report of a host that has not got these."""
    findings = tuple(
        replace(finding, available=False, remedy=f"get {finding.key}")
        if finding.key in keys
        else finding
        for finding in report.findings
    )
    fine = all(finding.available for finding in findings if finding.required)
    return HostReport(findings, fine)


def test_this_host_is_checked_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    output = capsys.readouterr().out
    report = host_check.check_host()
    for finding in report.findings:
        (line,) = (
            line for line in output.splitlines() if line[5:].startswith(f"{finding.title}  ")
        )
        assert line.startswith("yes" if finding.available else "no ")
        assert finding.why in line
    assert output.endswith("Post-copy can run on this host.\n")


def test_json_has_all_that_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_postcopy"] is True
    assert [set(finding) for finding in answer["findings"]] == [
        {"key", "title", "available", "required", "why", "remedy", "detail"}
    ] * len(host_check.check_host().findings)


def test_what_is_missing_comes_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(without(host_check.check_host(), "copy", "poison"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("COPY (needed): no") + 1] == "  get copy"
    assert lines[lines.index("POISON (not needed by every guest): no") + 1] == "  get poison"
    assert lines[-1] == "Post-copy cannot run on this host: 1 thing that it needs is missing."


@pytest.mark.parametrize(("missing", "status"), [("copy", 1), ("poison", 0)])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_exit_status_says_whether_post_copy_can_run(
    missing: str, status: int, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = without(host_check.check_host(), missing)
    monkeypatch.setattr(host_check, "check_host", lambda: report)
    assert main(["check", *options]) == status
