"""The points of the daemon's code at which the crash matrix kills: before and after each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.torture.crashing import KINDS, Kind
from tests.torture.kills import Point, Seat, When
from tests.torture.victims import Victim

_INCOMING: Final = "postcopyd.incoming"
_DAEMON: Final = "postcopyd.daemon"

_MIGRATION: Final = f"{_INCOMING}.migration:IncomingMigration"
_RECEPTION: Final = f"{_INCOMING}.reception:Reception"
_SWITCHOVER: Final = f"{_INCOMING}.switchover:Switchover"
_SOURCING: Final = f"{_INCOMING}.sourcing:Sourcing"
_RECIPIENT: Final = f"{_INCOMING}.recipient:Recipient"
_FILLING: Final = f"{_INCOMING}.filling:MemoryFilling"
_PLACER: Final = f"{_INCOMING}.placing:Placer"
_JOURNAL: Final = f"{_INCOMING}.journal:Journal"
_ESTATE: Final = f"{_INCOMING}.estate:Estate"
_LINK: Final = f"{_INCOMING}.source_link:SourceLink"
_USERFAULTFD: Final = "postcopyd.kernel.userfaultfd:Userfaultfd"
_VMM: Final = "postcopyd.vmm.native:NativeVmm"
_REGISTRY: Final = f"{_DAEMON}.registry:Registry"
_ENTRY: Final = f"{_DAEMON}.entry:Entry"
_KEEPER: Final = f"{_DAEMON}.supervisor_link:MigrationKeeper"
_CHANNEL: Final = f"{_DAEMON}.channel:Channel"
_HOLDING: Final = f"{_DAEMON}.holding:Holding"
_MANAGER: Final = f"{_DAEMON}.notify:ServiceManager"
_CREW: Final = f"{_DAEMON}.crew:Crew"


def _around(name: str, target: str, **more: object) -> dict[str, Point]:
    """The points before and after a step."""
    return {
        f"before {name}": Point("before", target, **more),  # type: ignore[arg-type]
        f"after {name}": Point("after", target, **more),  # type: ignore[arg-type]
    }


def _kept(name: str, **more: object) -> dict[str, Point]:
    """The points before and after a descriptor is left to a successor."""
    mentions = f"'{name}'"
    return _around(f"keeping {name}", f"{_KEEPER}.keep", mentions=mentions, **more)


def _in_the_supervisor(name: str, target: str, **more: object) -> dict[str, Point]:
    return _around(name, target, process="supervisor", **more)


def _spare_begins(when: When, seat: Seat) -> Point:
    return Point(when, f"{_CREW}._begin_spare", process="supervisor", seat=seat)


def _first_worker_begins(when: When, seat: Seat) -> Point:
    return Point(when, f"{_CREW}._begin", process="supervisor", seat=seat)


FIRST: Final[dict[str, Point]] = {
    # A VMM hands over.
    **_around("a migration is created", f"{_REGISTRY}.create"),
    **_kept("journal"),
    **_kept("entry"),
    **_kept("listener"),
    **_kept("page-map"),
    **_kept("package"),
    **_kept("vmm-userfaultfd"),
    **_kept("vmm-connection"),
    **_kept("vmm-pidfd"),
    **_around("a VMM is attached", f"{_MIGRATION}.attach_vmm"),
    **_around("a VMM is told that it is taken", f"{_VMM}.registered"),
    # A source comes.
    **_around("a source is attached", f"{_MIGRATION}.attach_stream"),
    **_around("advise", f"{_RECIPIENT}.prepare"),
    **_around("the VMM is advised", f"{_VMM}.advise"),
    **_around("the list of blocks is taken", f"{_RECIPIENT}.take_block_list"),
    **_around("the first discard", f"{_SWITCHOVER}.first_discard"),
    **_around("a discard", f"{_RECIPIENT}.discard", count=2),
    # The switchover.
    **_around("the package is taken", f"{_RECIPIENT}.take_package"),
    **_around("listening", f"{_RECIPIENT}.listen"),
    **_around("registering a block", f"{_USERFAULTFD}.register"),
    **_around("the VMM loads its devices", f"{_VMM}.run"),
    **_around("the guest runs", f"{_RECIPIENT}._runs"),
    "after the guest was loaded": Point("after", f"{_SWITCHOVER}._load"),
    # Faults and pages.
    **_around("faults are read", f"{_USERFAULTFD}.read_events", count=20),
    **_around("faults are answered", f"{_INCOMING}.faults:FaultHandler._answer", count=20),
    **_around("a page is requested", f"{_MIGRATION}._request_pages", count=10),
    **_around("receiving", f"{_INCOMING}.stream:StreamConnection._receive", count=60),
    **_around("pages are delivered", f"{_RECEPTION}._place", count=20),
    **_around("pages are placed", f"{_PLACER}.place_pages", count=20),
    **_around("UFFDIO_COPY", f"{_USERFAULTFD}.copy", count=30),
    **_around("UFFDIO_ZEROPAGE", f"{_USERFAULTFD}.zeropage", count=5),
    **_around("pages are marked", f"{_PLACER}._mark", count=5),
    **_around("faults are settled", f"{_PLACER}._settle", count=10),
    # The journal: content, then head.
    **_around("the journal is written", f"{_JOURNAL}.write", count=3),
    "between the bytes of the journal and their commit": Point(
        "after", "os:pwrite", called_by="Journal.write", count=5
    ),
    "before the journal says that the guest runs": Point(
        "before", f"{_JOURNAL}.write", mentions="state='running'"
    ),
    "after the journal says that the guest runs": Point(
        "after", f"{_JOURNAL}.write", mentions="state='running'"
    ),
    # The end.
    **_around("the end of the stream is taken", f"{_RECEPTION}._take_end_of_stream"),
    **_kept("connection"),
    **_around("the memory is released", f"{_FILLING}.finish"),
    **_around("unregistering a block", f"{_USERFAULTFD}.unregister"),
    "after the journal says that it has ended": Point(
        "after", f"{_JOURNAL}.write", mentions="state='end'"
    ),
    **_around("the source is told that all is well", f"{_LINK}.confirm"),
    **_around("the VMM is told that all is well", f"{_VMM}.complete"),
    **_around("the source closes", f"{_LINK}.wait_for_close"),
    **_around("everything is forgotten", f"{_ESTATE}.settle"),
    "after a migration has ended": Point("after", f"{_ENTRY}._finish"),
    # The supervisor.
    **_in_the_supervisor(
        "the supervisor holds the journal", f"{_HOLDING}.hold", mentions="'journal'"
    ),
    **_in_the_supervisor(
        "the supervisor holds the userfaultfd", f"{_HOLDING}.hold", mentions="'vmm-userfaultfd'"
    ),
    **_in_the_supervisor("FDSTORE of the listener", f"{_MANAGER}.store", mentions="/listener'"),
    **_in_the_supervisor(
        "FDSTORE of the userfaultfd", f"{_MANAGER}.store", mentions="/vmm-userfaultfd'"
    ),
    **_in_the_supervisor(
        "FDSTORE of the last connection", f"{_MANAGER}.store", mentions="/connection'"
    ),
    **_in_the_supervisor("FDSTOREREMOVE", f"{_MANAGER}.unstore", mentions="'vm0/"),
    **_in_the_supervisor(
        "FDSTOREREMOVE of the third", f"{_MANAGER}.unstore", mentions="'vm0/", count=3
    ),
    **_in_the_supervisor("the supervisor forgets", f"{_HOLDING}.forget"),
}
"""Points that every migration comes to."""

AGAIN: Final[dict[str, Point]] = {
    # The supervisor, when a worker has died.
    **_in_the_supervisor("the worker is replaced", f"{_CREW}._replace", seat="empty"),
    "before the spare begins": _spare_begins("before", "empty"),
    "after the spare begins": _spare_begins("after", "either"),
    **_in_the_supervisor(
        "the spare is handed the page map",
        f"{_CHANNEL}.send",
        mentions="'page-map'",
        seat="empty",
    ),
    # The worker that takes over.
    **_around(
        "the spare gets the page map", f"{_CHANNEL}.received", mentions="'page-map'", seat="empty"
    ),
    "before the spare hears that it begins": Point(
        "before", f"{_CHANNEL}.received", mentions="Begin(", seat="empty"
    ),
    **_around("a migration is restored", f"{_REGISTRY}.restore"),
    **_around("the VMM is inherited", f"{_INCOMING}.inheriting:inherit"),
    **_around("the account is restored", f"{_RECIPIENT}.restore"),
    **_around("the source's words are restored", f"{_RECIPIENT}.restore_source"),
    **_around("the VMM is served again", f"{_RECIPIENT}.restore_vmm"),
    **_around("waiting threads are woken", f"{_FILLING}.inherit"),
    **_around("the restored migration is noted", f"{_JOURNAL}.write"),
    # The source comes back.
    **_around("the source comes back", f"{_MIGRATION}.attach_stream"),
    **_around("it asks what is here", f"{_RECIPIENT}.received_bitmap"),
    **_around("it goes on", f"{_SOURCING}._go_on"),
    **_around("the first page comes again", f"{_PLACER}.place_pages"),
}
"""Points that a migration comes to whose daemon was killed in its middle."""

RESTARTED: Final[dict[str, Point]] = {
    **_in_the_supervisor("the supervisor takes over", f"{_HOLDING}.take_over", seat="empty"),
    "before the first worker begins": _first_worker_begins("before", "empty"),
    "after the first worker begins": _first_worker_begins("after", "either"),
    **_around(
        "the first worker gets the journal",
        f"{_CHANNEL}.received",
        mentions="'journal'",
        seat="empty",
    ),
}
"""Points that are come to when everything was killed in its middle."""

MIDDLE: Final = Point("before", f"{_PLACER}.place_pages", count=40)
"""Where the first kill is, for those that take two."""


@dataclass(frozen=True)
class Case:
    """One run of the matrix."""

    name: str
    kind: Kind
    """Of the guest's memory."""
    kills: list[tuple[Point, Victim]]


def cases(victim: Victim) -> Iterator[Case]:
    """Give every case with that victim."""
    for kind in KINDS:
        for name, point in FIRST.items():
            yield Case(f"{name}, {kind}", kind, [(point, victim)])
        for name, point in AGAIN.items():
            kills: list[tuple[Point, Victim]] = [(MIDDLE, "worker"), (point, victim)]
            yield Case(f"again {name}, {kind}", kind, kills)
        for name, point in RESTARTED.items():
            kills = [(MIDDLE, "both"), (point, victim)]
            yield Case(f"restarted {name}, {kind}", kind, kills)
