"""How a connection begins after a break: never two guests, and always a way to go on."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from postcopyd.outgoing.standing import Standing, Way


def in_doubt() -> Standing:
    return Standing(guest_stopped=True, package_sent=True)


def test_before_the_package_it_begins_anew() -> None:
    standing = Standing()
    for way in Way:
        assert standing.way is Way.ANEW
        standing.ended(way, refused=True)


def test_a_destination_that_has_the_package_is_only_ever_resumed() -> None:
    standing = Standing(package_sent=True, package_arrived=True)
    for _ in range(3):
        assert standing.way is Way.RESUME
        standing.ended(Way.RESUME, refused=True)


def test_in_doubt_it_resumes_and_begins_anew_in_turn_as_long_as_it_is_refused() -> None:
    standing = in_doubt()
    ways = []
    for _ in range(5):
        ways.append(standing.way)
        standing.ended(standing.way, refused=True)
    assert ways == [Way.RESUME, Way.ANEW, Way.RESUME, Way.ANEW, Way.RESUME]


def test_in_doubt_silence_and_broken_lines_are_no_refusals() -> None:
    standing = in_doubt()
    for _ in range(3):
        assert standing.way is Way.RESUME
        standing.ended(Way.RESUME, refused=False)


@dataclass
class Destination:
    """A destination as `incoming/states.py` has it, with a VMM that is started again if it can."""

    has_package: bool = False
    guests: int = 0

    def connect(self, way: Way) -> bool:
        """Tell whether it takes a connection that begins so."""
        return self.has_package == (way is Way.RESUME)

    def take_package(self) -> None:
        self.has_package = True
        self.guests += 1


@dataclass
class Break:
    """What becomes of one connection."""

    reaches: bool
    """It gets to the destination; if not, it looks as if that had refused it."""
    package_goes_out: bool
    package_arrives: bool
    answer_comes: bool


breaks = st.builds(Break, st.booleans(), st.booleans(), st.booleans(), st.booleans())


def run_connection(standing: Standing, destination: Destination, fate: Break) -> bool:
    """Let one connection do what it does before it breaks; True if it was taken and answered."""
    way = standing.way
    taken = fate.reaches and destination.connect(way)
    answered = taken and fate.answer_comes
    if taken and way is Way.ANEW and fate.package_goes_out:
        standing.package_sent = True
        if fate.package_arrives:
            destination.take_package()
            standing.package_arrived |= fate.answer_comes
    if not taken and way is Way.ANEW and not standing.package_sent and fate.package_goes_out:
        standing.package_sent = True  # into the buffers of a connection that leads nowhere
    if answered and way is Way.RESUME:
        standing.package_arrived = True
    standing.ended(way, refused=not answered)
    return answered


@given(st.lists(breaks, max_size=30))
def test_whatever_breaks_one_guest_runs_at_most_and_three_good_connections_bring_it_there(
    fates: list[Break],
) -> None:
    standing, destination = Standing(), Destination()
    for fate in fates:
        run_connection(standing, destination, fate)
        assert destination.guests <= 1
    for _ in range(3):
        run_connection(standing, destination, Break(True, True, True, True))
    assert destination.guests == 1
    assert standing.package_arrived
