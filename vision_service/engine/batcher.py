"""Joins jobs of many callers into batches for one executor. Knows neither torch nor gRPC.

Work-conserving: while the executor is idle, what is queued runs at once, even a single job; while it is busy, a batch
forms. An optional delay counts from the oldest queued job. Jobs only share a batch with jobs of the same key (the
shape of their pixels). The queue is bounded by jobs and by bytes. Deadlines and cancellation are part of the queue:
an expired job leaves by timer, a cancelled one at once, and neither reaches the executor.

What runs a batch, and halves it when that fails, is `runner`. Its second stage, where there is one, has a thread of
its own when jobs wait, so that the device goes on with the next batch meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from vision_service.engine.queue import FOREVER_S, BatchLimits, Job, JobQueue, Ride
from vision_service.engine.runner import BatchRunner, Execute, Executed, Finish
from vision_service.errors import DeadlineExceeded, InferenceFailed, ModelUnavailable, QueueFull, VisionError

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class Gate(Protocol):
    """Lets so many executors run at one time."""

    def acquire(self) -> object:
        """Wait for a turn."""

    def release(self) -> object:
        """Give the turn back."""


class Batcher(Generic[T, R]):
    """One queue, one executor, one thread that runs it.

    Args:
        execute: payloads in, as many answers out, in the same order; with ``finish``, an outcome for it instead. Called
            from the batcher's own thread only.
        limits: bounds of the batch and of the queue.
        name: for thread names, messages and the log.
        expected: errors that are no one's fault and so are not logged as one (out of memory).
        finish: second stage: payloads, the outcome of ``execute`` and the place of the first payload in it; answers
            out. Runs beside the next execution where jobs wait, one call at a time.
        gate: whose turn is waited for before a batch is taken, and held while it executes; ``None``: always open.
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
    ) -> None:
        self._runner: BatchRunner[T, R] = BatchRunner(execute, finish, name=name, expected=expected)
        self._name = name
        self._gate: Gate = gate or threading.Semaphore(1)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # something to run, or closing
        self._expiry = threading.Condition(self._lock)  # an earlier deadline than the timer knows, or closing
        self._idle = threading.Condition(self._lock)  # nothing queued, nothing running
        self._handover = threading.Condition(self._lock)  # something to finish, or room for it, or over
        self._queue: JobQueue[T, R] = JobQueue(limits)
        self._next_expiry_s = FOREVER_S
        self._running = False
        self._unfinished: list[Executed[T, R]] = []  # what the finisher has in hand
        self._over = False  # the executor's thread has ended
        self._has_finisher = finish is not None
        self._closing = False
        self._batch_jobs = 0  # in the batch that runs
        self._job_s = 0.0  # moving average of the executor's time per job, seconds
        targets = {"run": self._run_forever, "timer": self._expire_forever}
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
            self._work.notify()
        # By its number: a caller that keeps the future must not keep the payload with it.
        number = id(job)
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
            # The batch that runs and half of the queue: then there is room, and no idle gap.
            ahead = self._batch_jobs + (len(self._queue) + coming) / 2
            retry_after_s = max(0.02, self._job_s * ahead)
            message = f"the queue of {self._name} is full: {why}; call again in {retry_after_s:.2f} s"
            raise QueueFull(message, retry_after_s)

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

    # --- the executor's thread ----------------------------------------------------------------------------------

    def _run_forever(self) -> None:
        while (batch := self._next_batch()) is not None:
            started_s = time.monotonic()
            try:
                try:
                    executed = self._runner.start(batch, started_s)
                finally:
                    self._gate.release()
                self._hand_over(executed)
                del executed
            except BaseException as error:
                self._interrupted(batch, error)
            seconds = (time.monotonic() - started_s) / len(batch)
            del batch  # while this thread waits for the next one, nothing keeps these images
            with self._lock:
                self._running = False
                self._batch_jobs = 0
                self._job_s = seconds if self._job_s == 0 else 0.8 * self._job_s + 0.2 * seconds
                self._notify_if_idle()
        with self._lock:
            self._over = True
            self._handover.notify_all()

    def _next_batch(self) -> list[Job[T, R]] | None:
        """Wait for a batch that is due, and for the gate; ``None`` when closing and nothing is left."""
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
                    self._running = True
                    batch = self._queue.take(key)
                    self._batch_jobs = len(batch)
                    return batch
            self._gate.release()

    def _wait_s(self) -> float:
        """How long until a batch is due; `FOREVER_S` when nothing waits."""
        now_s = time.monotonic()
        return self._queue.due(now_s, hurry=self._closing)[1] - now_s

    def _hand_over(self, parts: list[Executed[T, R]]) -> None:
        """Have executed jobs answered: by the finisher's thread if the executor has other work, else right here."""
        for part in parts:
            with self._lock:
                beside = self._has_finisher and bool(self._queue)
                if beside:
                    self._handover.wait_for(lambda: not self._unfinished)
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
                self._handover.wait_for(lambda: self._unfinished or self._over)
                if not self._unfinished:
                    return
                part = self._unfinished[0]
            try:
                self._runner.finish(part)
            except BaseException as error:
                self._interrupted(part.jobs, error)
            del part
            with self._lock:
                self._unfinished.clear()
                self._handover.notify_all()
                self._notify_if_idle()
