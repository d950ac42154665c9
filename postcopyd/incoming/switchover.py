"""The VMM becomes the guest: faults are served, and it loads its devices while pages come."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from postcopyd.incoming import events
from postcopyd.incoming.course import Course
from postcopyd.incoming.recipient import Recipient
from postcopyd.incoming.source_link import SourceLink
from postcopyd.incoming.states import State
from postcopyd.incoming.tasks import Tasks
from postcopyd.incoming.vmm import VmmFailure
from postcopyd.wire.messages import Discard


class Switchover:
    """What a VMM goes through until it runs; another one may begin again where it has failed."""

    def __init__(
        self,
        course: Course,
        recipient: Recipient,
        tasks: Tasks,
        *,
        link: Callable[[], SourceLink | None],
        all_came: Callable[[], bool],
        trace: Callable[[events.Event], None],
        note: Callable[[], None],
        record: Callable[[], None],
        runs: Callable[[], None],
    ) -> None:
        """Do nothing before the source says that it switches over.

        :param link: gives what connects us with the source, if anything does now.
        :param all_came: tells whether all that the source has is here, so that it need not be.
        :param trace: told of what happens once.
        :param note: tells a successor how it stands.
        :param record: as `note`, but raises OSError if that cannot be told.
        :param runs: told when the VMM has become the guest.
        """
        self._course = course
        self._recipient = recipient
        self._tasks = tasks
        self._link = link
        self._all_came = all_came
        self._trace = trace
        self._note = note
        self._record = record
        self._runs = runs
        self.began_at: float | None = None
        """When the guest has stopped at the source, seconds of `perf_counter`; None before."""

    def begin(self) -> None:
        """Say that the guest has stopped at its source. It may be said again."""
        if self.began_at is None:
            self.began_at = perf_counter()

    @property
    def seconds(self) -> float | None:
        """For how long the guest has run nowhere; None before it runs here."""
        loaded_at = self._recipient.loaded_at
        if self.began_at is None or loaded_at is None:
            return None
        return loaded_at - self.began_at

    async def first_discard(self, message: Discard) -> None:
        """Forget what came for these ranges, as the first of all discards."""
        await self._recipient.allow_discards()
        self._course.step(State.DISCARD)
        self._recipient.discard(message)

    async def listen(self) -> None:
        """Serve faults from now on, and have the VMM load its devices while pages come."""
        vmm = self._recipient.vmm
        await self._recipient.allow_discards()
        if vmm is not None and self._recipient.vmm is vmm:
            self._begin_load()

    def _begin_load(self) -> None:
        self._note()
        try:
            self._recipient.listen()
        except OSError as error:  # its memory has gone, or it has altogether
            raise VmmFailure(f"its memory cannot be watched: {error}") from error
        self.request_missing()
        self.load()

    def request_missing(self) -> None:
        """Ask for what the VMM needs before it can load its devices."""
        link = self._link()
        if link is not None:
            # QEMU loads its devices with the event loop's help: each of its steps takes a turn.
            link.main.go_gently(True)
            link.send(
                b"".join(
                    link.writer.request_pages(name, offset, length)
                    for name, offset, length in self._recipient.loading.missing()
                )
            )

    def load(self) -> None:
        """Have the VMM, whose faults are served, load its devices."""
        self._tasks.begin_for_vmm(self._load())

    async def _load(self) -> None:
        pings = await self._recipient.load()
        self._tell_that_it_runs()
        if self._course.state is State.LISTENING:
            self._course.step(State.RUNNING)
        else:
            self._note()
        link = self._link()
        if link is not None:
            link.main.go_gently(False)
            for value in pings:
                # They report that the device state is loaded (qemu-wire, 4.1).
                link.send(link.writer.pong(value))
        self._runs()

    def _tell_that_it_runs(self) -> None:
        self._trace(events.DeviceStateLoaded(self.seconds or 0.0))

    def converge(self) -> None:
        """Go on with a pre-copy that ends without a switchover: everything has come."""
        self._course.step(State.CONVERGED)
        self._trace(events.Converged())
        self._recipient.converge()
        self._tasks.begin_for_vmm(self._load_converged())

    async def _load_converged(self) -> None:
        await self._recipient.load_converged()
        self._note()
        self._tell_that_it_runs()
        self._runs()

    async def replace(self) -> None:
        """Go on with another VMM where the one before has ended."""
        await self._recipient.move(self._record)
        if self._link() is not None or self._all_came():
            self._course.step(State.LISTENING)
            self._course.failure = None
        self._begin_load()
