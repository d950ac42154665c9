"""What a worker tells of its migrations."""

from __future__ import annotations

from typing import Any

from postcopyd.daemon.listing import Listing, Listings


def test_each_change_is_told_once() -> None:
    told: list[tuple[Any, ...]] = []
    listings = Listings(lambda *listed: told.append(listed), lambda name: told.append((name,)))
    listings.tell({"a": Listing("none", "waiting"), "b": Listing("none", "waiting")})
    listings.tell({"a": Listing("none", "running"), "b": Listing("none", "waiting")})
    listings.tell({"a": Listing("none", "running")})
    assert told == [
        ("a", "none", "waiting"),
        ("b", "none", "waiting"),
        ("a", "none", "running"),
        ("b",),
    ]
