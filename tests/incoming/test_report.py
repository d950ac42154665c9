"""Latencies and counters of a report."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postcopyd.incoming.report import Histogram, LatencyReport


def test_an_empty_histogram_reports_zeros() -> None:
    report = LatencyReport.of(Histogram())
    assert (report.count, report.mean, report.p50, report.p999, report.maximum) == (0, 0, 0, 0, 0)
    assert report.buckets == []


@given(st.lists(st.integers(0, 1 << 38), min_size=1, max_size=300), st.sampled_from([50, 90, 99]))
def test_a_percentile_is_at_most_one_bucket_above_the_truth(
    durations: list[int], percent: int
) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    ordered = sorted(durations)
    rank = max(0, -(-len(ordered) * percent // 100) - 1)
    truth = ordered[rank]
    found = histogram.percentile(percent)
    assert truth <= found <= max(truth * 1.0625 + 1, 1088)


@given(st.lists(st.integers(0, 1 << 45), min_size=1, max_size=100))
def test_every_duration_is_in_one_bucket_and_the_extremes_are_exact(durations: list[int]) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    assert sum(count for _, count in histogram.buckets()) == len(durations) == histogram.count
    assert histogram.maximum == max(durations)
    assert histogram.total == sum(durations)
