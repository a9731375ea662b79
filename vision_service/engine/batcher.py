"""Joins jobs of many callers into batches for executors. Knows neither torch nor gRPC.

Work-conserving: while an executor is idle, what is queued runs at once, even a single job; while all are busy, a batch
forms. An optional delay counts from the oldest queued job. Jobs only share a batch with jobs of the same key (the
shape of their pixels). Of several executors none takes more than its share of the jobs that are under way: with all of
them in batches, whoever makes the next ones would have nothing to do. The queue is bounded by jobs and by bytes.
Deadlines and cancellation are part of the queue: an expired job leaves by timer, a cancelled one at once, and neither
reaches the executor.

What runs a batch, and halves it when that fails, is `runner`. Its second stage, where there is one, has a thread of
its own when jobs wait, so that the device goes on with the next batch meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic, Protocol, TypeVar

from vision_service.engine.queue import FOREVER_S, BatchLimits, Job, JobQueue, Ride
from vision_service.engine.runner import BatchRunner, Execute, Executed, Finish
from vision_service.errors import DeadlineExceeded, InferenceFailed, ModelUnavailable, QueueFull, VisionError

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


_WORTH_SHARING = 2
"""So many whole batches must be waiting or coming for a batch to leave room for others beside it. With fewer, the room
would stay empty for part of the time."""


class Gate(Protocol):
    """Decides how many executors, of this batcher and of others, run at one time."""

    def acquire(self) -> None:
        """Wait for a turn beside others."""

    def widen(self) -> bool:
        """Have everything for this turn, if nobody else has a turn or waits for one."""

    def release(self, *, wide: bool) -> None:
        """Give the turn back."""


class OpenGate:
    """No gate: everyone's turn is now."""

    def acquire(self) -> None:
        """Do not wait."""

    def widen(self) -> bool:
        """Nobody else is known."""
        return True

    def release(self, *, wide: bool) -> None:
        """Nobody waits."""


class Batcher(Generic[T, R]):
    """One queue and its executors, each with a thread that runs it.

    Args:
        execute: payloads in, as many answers out, in the same order; with ``finish``, an outcome for it instead. One
            call at a time, from the batcher's own threads only.
        limits: bounds of the batch and of the queue.
        name: for thread names, messages and the log.
        expected: errors that are no one's fault and so are not logged as one (out of memory).
        finish: second stage: payloads, the outcome of ``execute`` and the place of the first payload in it; answers
            out. Runs beside the next execution where jobs wait, one call at a time.
        gate: whose turn is waited for before a batch is taken, and held while it executes; ``None``: always open.
        beside: do what ``execute`` does, one call of each at a time. Under load as many batches run at one time;
            ``execute`` has the others.
        coming: how many jobs are about to be submitted.
    """

    def __init__(
        self,
        execute: Execute[T],
        limits: BatchLimits,
        *,
        name: str = "batcher",
        expected: tuple[type[VisionError], ...] = (),
        finish: Finish[T, R] | None = None,
        gate: Gate | None = None,
        beside: Sequence[Execute[T]] = (),
        coming: Callable[[], int] = lambda: 0,
    ) -> None:
        self._runner: BatchRunner[T, R] = BatchRunner(finish, name=name, expected=expected)
        self._execute = execute
        self._beside = beside
        self._coming = coming
        self._name = name
        self._gate: Gate = gate or OpenGate()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # something to run, or closing
        self._expiry = threading.Condition(self._lock)  # an earlier deadline than the timer knows, or closing
        self._idle = threading.Condition(self._lock)  # nothing queued, nothing running
        self._handover = threading.Condition(self._lock)  # something to finish, or room for it, or over
        self._queue: JobQueue[T, R] = JobQueue(limits)
        self._next_expiry_s = FOREVER_S
        self._running: dict[int, int] = {}  # jobs in the batch that runs, by executor, until they are handed over
        self._executing = 0  # batches in executors
        self._unfinished: deque[Executed[T, R]] = deque()  # the first one is what the finisher has in hand
        self._executors = max(1, len(beside))  # threads that have not ended
        self._has_finisher = finish is not None
        self._closing = False
        self._job_s = 0.0  # moving average of the time per job, seconds
        targets: dict[str, Callable[[], None]] = {
            f"run-{number}": partial(self._run_forever, number) for number in range(self._executors)
        }
        targets["timer"] = self._expire_forever
        if self._has_finisher:
            targets["finish"] = self._finish_forever
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{role}", daemon=True) for role, target in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_jobs(self) -> int:
        """Jobs waiting now."""
        return len(self._queue)

    @property
    def limits(self) -> BatchLimits:
        """Bounds of the batch and of the queue."""
        return self._queue.limits

    def set_limits(self, limits: BatchLimits) -> None:
        """Change the bounds, from the next batch on; what is queued already stays."""
        with self._lock:
            self._queue.limits = limits
            self._work.notify()

    def reconsider(self) -> None:
        """Look again whether a batch is due: fewer jobs are coming than were."""
        with self._lock:
            self._notify_if_due()

    def check_room(self, coming: int = 0) -> None:
        """Refuse early what the queue would refuse later, before work goes into it.

        Args:
            coming: jobs that will be submitted and were let in before this one.

        Raises:
            QueueFull: the queue holds as many jobs as it may.
            ModelUnavailable: the batcher is closing.
        """
        with self._lock:
            self._check_room(0, coming)

    def submit(
        self, payload: T, *, key: Hashable = None, nbytes: int = 0, deadline_s: float | None = None
    ) -> Future[Ride[R]]:
        """Queue a job.

        Args:
            payload: what the executor gets.
            key: jobs of different keys never share a batch.
            nbytes: what the payload counts towards the bound in bytes.
            deadline_s: on `time.monotonic`'s clock; past it, the job leaves the queue with `DeadlineExceeded`.

        Returns:
            The answer to come. Cancelling it takes the job out of the queue.

        Raises:
            QueueFull: with an estimate of when there will be room.
            ModelUnavailable: the batcher is closing.
            DeadlineExceeded: the deadline has passed already.
        """
        job: Job[T, R] = Job(payload, key, nbytes, deadline_s)
        with self._lock:
            self._check_room(nbytes)
            if job.expired(job.queued_s):
                raise DeadlineExceeded(f"the deadline passed before {self._name} was reached")
            self._queue.add(job)
            if job.deadline_s is not None and job.deadline_s < self._next_expiry_s:
                self._next_expiry_s = job.deadline_s
                self._expiry.notify()
            self._notify_if_due()
        # By its number: a caller that keeps the future must not keep the payload with it.
        number = job.number
        job.future.add_done_callback(lambda future: self._forget(key, number) if future.cancelled() else None)
        return job.future

    def close(self, timeout_s: float | None = None) -> bool:
        """Take nothing new, run what is queued, stop the threads.

        Args:
            timeout_s: how long to wait for the queue; what still waits then fails with `ModelUnavailable`.

        Returns:
            Whether everything that was queued ran.
        """
        with self._lock:
            self._closing = True
            self._work.notify_all()
            if threading.current_thread() in self._threads:  # from a callback: what is queued runs after it
                return not self._queue
            drained = self._idle.wait_for(self._is_idle, timeout_s)
            left = [] if drained else self._queue.remove(list(self._queue))
            self._work.notify_all()
            self._expiry.notify_all()
        self._runner.fail(left, ModelUnavailable(f"{self._name} was stopped before this call's turn came; call again"))
        for thread in self._threads:
            thread.join(timeout_s)
        return drained

    def _check_room(self, nbytes: int, coming: int = 0) -> None:
        if self._closing:
            raise ModelUnavailable(f"{self._name} is stopping; call again in a moment")
        why = self._queue.why_full(nbytes, coming)
        if why is not None:
            # The batches that run and half of the queue: then there is room, and no idle gap.
            ahead = sum(self._running.values()) + (len(self._queue) + coming) / 2
            retry_after_s = max(0.02, self._job_s * ahead)
            message = f"the queue of {self._name} is full: {why}; call again in {retry_after_s:.2f} s"
            raise QueueFull(message, retry_after_s, backlog_s=self._job_s * (len(self._queue) + coming))

    def _forget(self, key: Hashable, number: int) -> None:
        with self._lock:
            self._queue.discard(key, number)
            self._notify_if_idle()

    def _is_idle(self) -> bool:
        return not (self._queue or self._running or self._unfinished)

    def _notify_if_idle(self) -> None:
        if self._is_idle():
            self._idle.notify_all()
            if self._closing:
                self._expiry.notify_all()

    # --- the timer's thread -------------------------------------------------------------------------------------

    def _expire_forever(self) -> None:
        while True:
            with self._lock:
                now_s = time.monotonic()
                expired = self._queue.remove_expired(now_s)
                self._notify_if_idle()
                if not expired:
                    if self._closing and not self._queue:
                        return
                    self._next_expiry_s = self._queue.next_deadline_s()
                    wait_s = self._next_expiry_s - now_s
                    self._expiry.wait(None if wait_s == FOREVER_S else min(wait_s, threading.TIMEOUT_MAX))
            self._runner.expire(expired)

    # --- the executors' threads ---------------------------------------------------------------------------------

    def _run_forever(self, number: int) -> None:
        while (found := self._next_batch(number)) is not None:
            batch, execute = found
            del found
            started_s = time.monotonic()
            try:
                try:
                    executed = self._runner.start(execute, batch, started_s)
                finally:
                    with self._lock:
                        self._executing -= 1
                        self._work.notify()  # another executor may go on while this one hands its batch over
                    self._gate.release(wide=execute is self._execute)
                self._hand_over(executed)
                del executed
            except BaseException as error:
                self._interrupted(batch, error)
            seconds = (time.monotonic() - started_s) / len(batch)
            del batch  # while this thread waits for the next one, nothing keeps these images
            with self._lock:
                seconds /= len(self._running)
                del self._running[number]
                self._job_s = seconds if self._job_s == 0 else 0.8 * self._job_s + 0.2 * seconds
                self._notify_if_idle()
        with self._lock:
            self._executors -= 1
            self._handover.notify_all()

    def _next_batch(self, number: int) -> tuple[list[Job[T, R]], Execute[T]] | None:
        """Wait for a batch that is due, and for the gate; ``None`` when closing and nothing is left.

        Returns:
            The batch and what is to execute it.
        """
        while True:
            with self._lock:
                while (wait_s := self._wait_s()) > 0:
                    if self._closing and not self._queue:
                        return None
                    self._work.wait(None if wait_s == FOREVER_S else wait_s)
            self._gate.acquire()  # meanwhile the batch grows, or expires
            with self._lock:
                now_s = time.monotonic()
                key, due_s = self._queue.due(now_s, hurry=self._closing)
                if due_s <= now_s:
                    batch = self._queue.take(key, self._share())
                    self._running[number] = len(batch)
                    self._executing += 1
                    if self._queue:
                        self._work.notify()  # another executor may be free for the rest
                    return batch, self._executor(number)
            self._gate.release(wide=False)

    def _share(self) -> int:
        """Most jobs of a batch: one part of those under way, of as many parts as executors and one that is being made.

        With a delay, fuller batches are what is asked for, and worth the wait; when closing, none is being made.
        """
        most = self.limits.max_batch_size
        if not self._beside or self.limits.max_delay_s or self._closing:
            return most
        under_way = len(self._queue) + self._coming() + sum(self._running.values())
        return min(most, max(1, -(-under_way // (len(self._beside) + 1))))

    def _executor(self, number: int) -> Execute[T]:
        """What executes the batch that was just taken."""
        if not self._beside:
            return self._execute
        enough = len(self._queue) + self._coming() >= _WORTH_SHARING * self._share()
        if self._executing > 1 or enough or not self._gate.widen():
            return self._beside[number]
        return self._execute

    def _notify_if_due(self) -> None:
        """Wake an executor, unless it would only wait on: then each job of a batch would wake one."""
        if self._wait_s() < FOREVER_S:
            self._work.notify()

    def _wait_s(self) -> float:
        """How long until a batch is due; `FOREVER_S` when nothing waits.

        A second batch at one time shall be a whole one, `_share`: small ones cost more an image than they gain. It does
        not wait for jobs that are not coming, and no longer than for the first one's end.
        """
        if self._executing and len(self._queue) < self._share() and self._coming() and not self._closing:
            return FOREVER_S
        now_s = time.monotonic()
        return self._queue.due(now_s, hurry=self._closing)[1] - now_s

    def _hand_over(self, parts: list[Executed[T, R]]) -> None:
        """Have executed jobs answered: by the finisher's thread if there is other work, else right here."""
        for part in parts:
            with self._lock:
                beside = self._has_finisher and bool(self._queue)
                if beside:
                    self._handover.wait_for(lambda: len(self._unfinished) < max(1, len(self._beside)))
                    self._unfinished.append(part)
                    self._handover.notify_all()
            if not beside:
                self._runner.finish(part)

    def _interrupted(self, batch: Iterable[Job[T, R]], error: BaseException) -> None:
        """A caller's callback may raise anything; others wait for this thread."""
        logger.exception("%s: a callback of a finished call raised", self._name)
        unanswered = [job for job in batch if not job.future.done()]
        self._runner.fail(unanswered, InferenceFailed(f"{self._name} was interrupted ({type(error).__name__})"))

    # --- the finisher's thread ----------------------------------------------------------------------------------

    def _finish_forever(self) -> None:
        while True:
            with self._lock:
                self._handover.wait_for(lambda: self._unfinished or not self._executors)
                if not self._unfinished:
                    return
                part = self._unfinished[0]
            try:
                self._runner.finish(part)
            except BaseException as error:
                self._interrupted(part.jobs, error)
            del part
            with self._lock:
                self._unfinished.popleft()
                self._handover.notify_all()
                self._notify_if_idle()
