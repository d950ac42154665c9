"""The workers: started, listened to, watched, and replaced by a spare one when they die.

A worker is known by its number. Its successor has the same number and gets what was its own; the
others do not notice.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Final, NamedTuple, Protocol

from postcopyd.daemon import channel
from postcopyd.daemon.event_log import WORKER_DIED_ID
from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.outbox import Outbox
from postcopyd.daemon.worker_process import WorkerProcess

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_LIVES: Final = 10.0
"""Seconds: a worker that has lived so long has not died of what it found. Of those that have not
the first one is replaced at once as well; then each death makes the next one of its number wait
twice as long, from the first pause to the longest."""
_SILENCE: Final = 30.0
"""Seconds: a worker whose event loop has not gone round for so long is killed, and replaced."""
_SPARE: Final = 1.0
"""Seconds after which there is a spare one again. Not at once: two that start together would keep
each other waiting."""

_AGAIN: Final = 1.0
"""Seconds after which it is tried again to start a process, where that could not be."""
_GUESTS_FIRST: Final = 1.0
"""Seconds for workers that go on with what a predecessor has left, before the others start."""


class Employer(Protocol):
    """Who has the workers."""

    def begin(self, number: int, worker: WorkerProcess) -> None:
        """Tell a worker to begin, and all that it needs (`Crew.tell`)."""

    def take(self, number: int, message: channel.Message, descriptor: int | None) -> None:
        """Act on what a worker says; a descriptor is taken over.

        :raise ValueError: if that is not for a worker to say.
        :raise OSError: if that cannot be done; the descriptor is closed then.
        """

    def died(self, number: int) -> bool:
        """Hear that a worker is no more; tell whether another one is to go on."""


class _Seat:
    """The place of one worker, and who has it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: WorkerProcess | None = None
        self.outbox: Outbox | None = None
        """What that worker has yet to hear."""
        self.has_begun = False
        self.looked = 0.0
        """When it was looked whether the worker still says anything, as `WorkerProcess.heard`."""
        self.pause = 0.0


class _Said(NamedTuple):
    """Something that a worker has said, or that it has gone."""

    seat: _Seat
    worker: WorkerProcess
    message: channel.Message | None
    descriptor: int | None = None
    all_heard: bool = False


class Crew:
    """The workers with numbers from 0 on, and a spare one. Made within a running event loop."""

    def __init__(self, size: int, employer: Employer) -> None:
        """Begin with nobody."""
        self._employer = employer
        self._seats = tuple(map(_Seat, range(size)))
        self._spare: deque[WorkerProcess] = deque()
        """One, and at the start those that have not begun yet."""
        self._said: deque[_Said] = deque()
        self._working_off = self._closed = self._disbanded = False
        self._cannot_start = False
        """True while no process can be started: that is told once."""
        self._loop = asyncio.get_running_loop()
        self._timers: set[asyncio.TimerHandle] = set()

    def start(self, processes: Iterable[WorkerProcess], urgent: Collection[int]) -> None:
        """Have all of them begin. The spare one comes when they are ready.

        :param processes: as many as are needed, taken over.
        :param urgent: numbers of those whose guests wait: the others do not get in their way.
        :raise OSError: if a process cannot be started.
        """
        self._spare.extend(processes)
        for seat in self._seats:
            if not urgent or seat.number in urgent:
                self._begin(seat, self._take_spare())
        if urgent:
            self._later(_GUESTS_FIRST, self._begin_others)

    def _begin_others(self) -> None:
        for seat in self._seats:
            if seat.worker is None and not seat.has_begun:
                self._begin_spare(seat)

    def start_spare(self) -> None:
        """Have a spare one, if there is none, as soon as it can be started."""
        if self._spare or self._closed or self._disbanded:
            return
        try:
            spare = self._started()
        except OSError:
            self._later(_AGAIN, self.start_spare)
            return
        spare.began = self._loop.time()
        self._spare.append(spare)
        self._loop.add_reader(spare.channel.fileno(), self._spare_has_died, spare)

    def _spare_has_died(self, spare: WorkerProcess) -> None:
        """Have another one. It has nothing to say, so what there is to hear is its end."""
        self._spare.remove(spare)
        self._loop.remove_reader(spare.channel.fileno())
        spare.kill()
        get_logger().warning(
            "the spare worker has died: another one is started",
            pid=spare.process.pid,
            status=spare.reap(),
        )
        lived = self._loop.time() - spare.began >= _LIVES
        self._later(_SPARE if lived else _LONGEST_PAUSE, self.start_spare)

    def __iter__(self) -> Iterator[tuple[int, WorkerProcess]]:
        """Give number and process of those that there are."""
        for seat in self._seats:
            if seat.worker is not None:
                yield seat.number, seat.worker

    def __getitem__(self, number: int) -> WorkerProcess | None:
        """Return the process of that number; None while there is none, or never is one."""
        return self._seats[number].worker if 0 <= number < len(self._seats) else None

    def all(self, predicate: Callable[[WorkerProcess], bool]) -> bool:
        """Tell whether there is a process of each number, and `predicate` holds for it."""
        return all(seat.worker is not None and predicate(seat.worker) for seat in self._seats)

    def tell(
        self,
        number: int,
        message: channel.Message,
        descriptor: int | None = None,
        *,
        at_once: bool = False,
    ) -> bool:
        """Say something to a worker; tell whether it will hear it, if it lives.

        One that does not read now hears it later. One that has died, or does not read for long, is
        replaced, and the next one knows what it must.

        :param descriptor: stays the caller's, who keeps it open until it was sent.
        :param at_once: leave it out if the worker has not read yet what was said before.
        """
        outbox = None if self[number] is None else self._seats[number].outbox
        if outbox is None or (at_once and outbox):
            return False
        outbox.say(message, descriptor)
        return True

    def disband(self, farewell: channel.Message, within: float) -> None:
        """Say to all of them that they are to go, and replace nobody any more.

        :param within: seconds, after which who is still here is killed.
        """
        self._disbanded = True
        for number, worker in self:
            self.tell(number, farewell)
            self._later(within, worker.kill)

    def close(self) -> None:
        """End all of them. Idempotent."""
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        while self._said:
            _close(self._said.popleft().descriptor)
        for seat in self._seats:
            if seat.worker is not None:
                self._stop_listening(seat, seat.worker)
                self._spare.append(seat.worker)
                seat.worker = None
        while self._spare:
            self._pop_spare().end()

    # -- one of them -------------------------------------------------------------------------

    def _begin(self, seat: _Seat, worker: WorkerProcess) -> None:
        seat.worker = worker
        seat.has_begun = True
        worker.began = worker.heard = seat.looked = self._loop.time()
        self._loop.add_reader(worker.channel.fileno(), self._hear, seat, worker)
        seat.outbox = Outbox(worker.channel, partial(self._cannot_tell, seat, worker))
        self._employer.begin(seat.number, worker)
        self._watch(seat, worker)

    def _cannot_tell(self, seat: _Seat, worker: WorkerProcess, error: OSError) -> None:
        self._tell_nothing_more(seat)
        if not isinstance(error, BrokenPipeError | ConnectionResetError):  # it has gone: we hear it
            get_logger().error(
                "the worker cannot be told what it must know: it is killed",
                worker=seat.number,
                reason=str(error),
            )
            worker.kill()

    def _tell_nothing_more(self, seat: _Seat) -> None:
        if seat.outbox is not None:
            seat.outbox.close()
            seat.outbox = None

    def _stop_listening(self, seat: _Seat, worker: WorkerProcess) -> None:
        self._loop.remove_reader(worker.channel.fileno())
        self._tell_nothing_more(seat)

    def _hear(self, seat: _Seat, worker: WorkerProcess) -> None:
        self._collect(seat, worker)
        self._work_off()

    def _collect(self, seat: _Seat, worker: WorkerProcess) -> None:
        """Receive what a worker has said until now."""
        if worker.deaf:
            return
        try:
            for message, descriptor in worker.channel.received():
                self._said.append(_Said(seat, worker, message, descriptor))
        except EOFError:
            worker.deaf = True
            self._stop_listening(seat, worker)
            self._said.append(_Said(seat, worker, None))
        except ValueError as error:
            get_logger().error(
                "a worker says what is no message", worker=seat.number, error=str(error)
            )
            worker.kill()

    def _work_off(self) -> None:
        """Act on what was said, in its order; a question is answered when all were heard."""
        if self._working_off:
            return
        self._working_off = True
        try:
            while self._said:
                said = self._said.popleft()
                if isinstance(said.message, channel.Claim | channel.Where) and not said.all_heard:
                    for number, worker in self:
                        self._collect(self._seats[number], worker)
                    self._said.append(said._replace(all_heard=True))
                elif said.worker is said.seat.worker:
                    self._act_on(said)
                else:
                    _close(said.descriptor)
        finally:
            self._working_off = False

    def _act_on(self, said: _Said) -> None:
        seat, worker = said.seat, said.worker
        if said.message is None:
            self._replace(seat, worker)
            return
        if worker.forsaken:
            _close(said.descriptor)
            return
        worker.heard = self._loop.time()
        try:
            self._employer.take(seat.number, said.message, said.descriptor)
        except ValueError as error:
            _close(said.descriptor)
            get_logger().error(str(error), worker=seat.number, message=said.message)
            worker.kill()
        except OSError as error:
            # Its successor goes on with what was held before: what it has said since is of no use.
            worker.forsaken = True
            get_logger().error(
                "what a worker leaves cannot be held: it is killed",
                worker=seat.number,
                reason=str(error),
            )
            worker.kill()

    def _replace(self, seat: _Seat, worker: WorkerProcess) -> None:
        """Have the spare worker go on in the place of one that has gone."""
        if not worker.ended:
            worker.kill()  # one that lives on without its channel would keep us waiting
        status = worker.reap()
        seat.worker = None
        if not self._employer.died(seat.number):
            return
        get_logger().error(
            "the worker has died: another one goes on with its migrations",
            worker=seat.number,
            pid=worker.process.pid,
            status=status,
            message_id=WORKER_DIED_ID,
        )
        if self._loop.time() - worker.began >= _LIVES:
            seat.pause = 0.0
        self._later(seat.pause, lambda: self._begin_spare(seat))
        seat.pause = min(max(2 * seat.pause, _FIRST_PAUSE), _LONGEST_PAUSE)

    def _begin_spare(self, seat: _Seat) -> None:
        if self._disbanded:
            return
        try:
            worker = self._take_spare()
        except OSError:
            self._later(_AGAIN, lambda: self._begin_spare(seat))
            return
        self._begin(seat, worker)
        self._later(_SPARE, self.start_spare)

    def _take_spare(self) -> WorkerProcess:
        while self._spare:
            spare = self._pop_spare()
            if spare.process.poll() is None:
                return spare
            spare.end()
        return self._started()

    def _pop_spare(self) -> WorkerProcess:
        spare = self._spare.popleft()
        self._loop.remove_reader(spare.channel.fileno())
        return spare

    def _started(self) -> WorkerProcess:
        try:
            worker = WorkerProcess.started()
        except OSError as error:
            if not self._cannot_start:
                get_logger().error(
                    "no process can be started: it is tried again until one can", reason=str(error)
                )
            self._cannot_start = True
            raise
        self._cannot_start = False
        return worker

    def _watch(self, seat: _Seat, worker: WorkerProcess) -> None:
        """Kill a worker that neither says nor reads anything: its event loop stands still."""
        if worker is not seat.worker or seat.outbox is None:
            return
        now = self._loop.time()
        if now - seat.looked > _SILENCE / 2:
            worker.heard = now  # we stood still ourselves, and it may have as well
        seat.looked = now
        if now - max(worker.heard, seat.outbox.moved) > _SILENCE:
            get_logger().error(
                "the worker does not go on: it is killed",
                worker=seat.number,
                pid=worker.process.pid,
            )
            worker.kill()
            return
        self._later(_SILENCE / 4, lambda: self._watch(seat, worker))

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            work()

        timer = self._loop.call_later(seconds, run)
        self._timers.add(timer)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
