"""What is measured of one migration, and how: the definitions are here and nowhere else.

All of it is told by both QEMUs and by the guest, alike for everybody who receives, on one clock:

- The downtime is from the event STOP of the source to the event RESUME of the destination.
- The window is from that RESUME to the source's migration state "completed": it says so when the
  receiver has told it that the last page is there.
- What the guest tells of the window are its heartbeats from the last one on the source to the
  first one after the window. Its counters go on while it moves, so these two are subtracted. A wait
  is an access that took over 0.25 ms (guest/checker.c), of which a guest that does not migrate sees
  one of 0.3 ms in every tenth of a second or so.
- The iterations in the window are counted from the STOP to its very end. Between two heartbeats
  they are interpolated; what the source did after its last one goes on at the pace of the last two,
  but is never more than what the first one on the destination tells.
- The mean wait is that of the accesses that waited. Who makes short waits shorter than 0.25 ms is
  left with the long ones and has a higher mean, so there is the wait of an access, too: all waits
  divided by the iterations, an iteration being one access that is timed.
- The longest stall is the longest of the waits or of the delays of a heartbeat.
- Blocked is how long all processors together waited for pages, as the receiver tells it.
- CPU is the processor time that the receiver takes from the beginning of pre-copy to the end of the
  window: processor_time.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.interop.heartbeat import Heartbeat


@dataclass(frozen=True, slots=True)
class Window:
    """The figures of one migration; times in milliseconds unless their name says otherwise."""

    downtime: float
    window: float
    waits: int
    mean_wait: float
    longest_stall: float
    blocked: float
    iterations: int
    cpu_seconds: float

    @property
    def wait_an_access_us(self) -> float:
        """What an access waits on average, those that do not wait counted."""
        return self.waits * self.mean_wait * 1e3 / self.iterations if self.iterations else 0.0


@dataclass(frozen=True, slots=True)
class Moments:
    """When it happened, seconds."""

    stopped: float
    resumed: float
    completed: float


def heartbeats_cover(moments: Moments, beats: list[Heartbeat]) -> bool:
    """Whether the guest has told of the window's end."""
    return bool(beats) and beats[-1].received > moments.completed


def measured(
    moments: Moments,
    at_source: list[Heartbeat],
    at_destination: list[Heartbeat],
    *,
    blocked: float,
    cpu: float,
) -> Window:
    """Put the figures together; `blocked` and `cpu` in seconds."""
    before = at_source[-1]
    end = next(
        place for place, beat in enumerate(at_destination) if beat.received > moments.completed
    )
    inside = at_destination[: end + 1]
    at_stop = min(_at_stop(moments, at_source), inside[0].iterations)
    waits = inside[-1].waits - before.waits
    waited_us = inside[-1].wait_us - before.wait_us
    return Window(
        downtime=(moments.resumed - moments.stopped) * 1e3,
        window=(moments.completed - moments.resumed) * 1e3,
        waits=waits,
        mean_wait=waited_us / waits / 1e3 if waits else 0.0,
        longest_stall=max(max(beat.max_wait_us, beat.late_us) for beat in inside) / 1e3,
        blocked=blocked * 1e3,
        iterations=round(_at_completion(moments, at_stop, inside) - at_stop),
        cpu_seconds=cpu,
    )


def _at_stop(moments: Moments, at_source: list[Heartbeat]) -> float:
    """The guest's iterations when the source stopped."""
    first, last = at_source[-2:]
    pace = (last.iterations - first.iterations) / (last.received - first.received)
    return last.iterations + pace * max(moments.stopped - last.received, 0.0)


def _at_completion(moments: Moments, at_stop: float, inside: list[Heartbeat]) -> float:
    """The guest's iterations when the window ended, before the last of these heartbeats."""
    points = [(moments.resumed, at_stop), *((beat.received, beat.iterations) for beat in inside)]
    (begin, low), (end, high) = points[-2:]
    return low + (high - low) * (moments.completed - begin) / (end - begin)
