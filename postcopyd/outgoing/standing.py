"""How far the guest has gone over: what outlives a connection, and how the next one begins.

A source that comes back can begin anew or resume. At most one guest may ever run, so the rules are:

* Until the kernel has taken the last byte of the package no destination can have it: begin anew.
* Once the destination has shown that it has the package, it has the guest: resume, for ever.
* In between nobody knows. Resume, because a destination that has the package refuses anything
  else. If it refuses the resume, it may never have got the package: begin anew on the next
  connection, then resume again, in turn. That is safe because a destination takes a new stream
  only if it never had one (docs/architecture.md, "A source that comes back"), and because the end
  of the stream is not sent before the package is known to have arrived: a destination that could
  be complete, and gone, is never sent the guest anew.
"""

from __future__ import annotations

from enum import Enum

import msgspec


class Way(Enum):
    """How a connection begins."""

    ANEW = "anew"
    """With a stream header, as if there had been none before."""
    RESUME = "resume"
    """By asking what the destination has."""


class Standing(msgspec.Struct):
    """What is known of the guest's way. Updated in place; only `all_sent` can be taken back."""

    guest_stopped: bool = False
    """It is stopped here: nobody writes to its memory."""
    package_sent: bool = False
    """The kernel has taken the whole package: the destination may run the guest."""
    package_arrived: bool = False
    """The destination has shown that it has the package."""
    all_sent: bool = False
    """The end of the stream has been sent, and nothing was found missing since."""
    received: int = -1
    """Host pages that the destination had when it was asked last; -1 before that."""
    _resume_refused: bool = False

    @property
    def way(self) -> Way:
        """How the next connection is to begin."""
        if self.package_arrived:
            return Way.RESUME
        return Way.RESUME if self.package_sent and not self._resume_refused else Way.ANEW

    def ended(self, way: Way, refused: bool) -> None:
        """Take note of the end of a connection.

        :param way: how it had begun.
        :param refused: the destination closed it and had not said anything.
        """
        self._resume_refused = way is Way.RESUME and refused

    @property
    def means(self) -> str:
        """What it means for the guest if nothing follows."""
        if self.all_sent:
            return (
                "everything was sent, the destination may have completed: ask it; "
                "the guest must not go on here"
            )
        if self.package_sent:
            return "the package had been sent: the guest must not go on here"
        return "the package had not been sent: the guest can go on here"
