"""Whether everything has come that the source has.

The end of the main stream says nothing of the preempt channel, whose end a QEMU 10.0 does not mark
(qemu-wire, 5.2), nor of a connection that has not said yet whether it is one.
"""

from __future__ import annotations

from postcopyd.incoming.recipient import Recipient
from postcopyd.incoming.source_link import SourceLink


class Arrival:
    """What is known of the end of one migration's pages."""

    def __init__(self, recipient: Recipient) -> None:
        """Nothing has come for `recipient` yet."""
        self._recipient = recipient
        self.stream_ended = False
        """True when the main stream of the present link has come to its end."""
        self.complete = False
        """True when the source has sent everything and nothing of it can be lost any more."""

    def all_came(self, link: SourceLink | None) -> bool:
        """Tell whether the source has sent everything, on both channels.

        Where the preempt channel may go on, or may have ended without a word, every page that was
        asked for has to be here.
        """
        if not self.stream_ended or link is None:
            return False
        nothing_is_lost = link.urgent_ended and link.may_have_lost_pages is None
        return nothing_is_lost or not self._recipient.pages_outstanding

    def loss(self, link: SourceLink) -> str | None:
        """Tell why pages may be lost that are waited for; None if they are not.

        Never zeros, but asked again, and as soon as that is known: when all else has been sent, a
        QEMU that has noticed nothing cannot come back any more. Behind the end of the stream they
        may still come on another connection.
        """
        lost = link.may_have_lost_pages
        if lost is None or (self.stream_ended and not link.urgent_ended):
            return None
        if not self._recipient.pages_outstanding:
            return None
        return (
            f"a connection that may have been the preempt channel {lost} while pages are waited for"
        )
