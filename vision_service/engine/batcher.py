"""Joins jobs of many callers into batches for one executor. Knows neither torch nor gRPC.

Work-conserving: while the executor is idle, what is queued runs at once, even a single job; while it is busy, a batch
forms. An optional delay counts from the oldest queued job. Jobs only share a batch with jobs of the same key (the
shape of their pixels). The queue is bounded by jobs and by bytes. Deadlines and cancellation are part of the queue:
an expired job leaves by timer, a cancelled one at once, and neither reaches the executor.

When the executor raises, the batch is halved and each half runs again, down to single jobs: the job that causes the
error gets it, its batch mates get their answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from vision_service.engine.queue import FOREVER_S, BatchLimits, Job, JobQueue, Ride
from vision_service.errors import DeadlineExceeded, InferenceFailed, ModelUnavailable, QueueFull, VisionError

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class Batcher(Generic[T, R]):
    """One queue, one executor, one thread that runs it.

    Args:
        execute: payloads in, as many answers out, in the same order. Called from the batcher's own thread only.
        limits: bounds of the batch and of the queue.
        name: for thread names, messages and the log.
        expected: errors that are no one's fault and so are not logged as one (out of memory).
    """

    def __init__(
        self,
        execute: Callable[[Sequence[T]], Sequence[R]],
        limits: BatchLimits,
        *,
        name: str = "batcher",
        expected: tuple[type[VisionError], ...] = (),
    ) -> None:
        self._execute = execute
        self._name = name
        self._expected = expected
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # something to run, or closing
        self._expiry = threading.Condition(self._lock)  # an earlier deadline than the timer knows, or closing
        self._idle = threading.Condition(self._lock)  # nothing queued, nothing running
        self._queue: JobQueue[T, R] = JobQueue(limits)
        self._next_expiry_s = FOREVER_S
        self._running = False
        self._closing = False
        self._batch_jobs = 0  # in the batch that runs
        self._job_s = 0.0  # moving average of the executor's time per job, seconds
        self._threads = [
            threading.Thread(target=self._run_forever, name=f"{name}-run", daemon=True),
            threading.Thread(target=self._expire_forever, name=f"{name}-timer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_jobs(self) -> int:
        """Jobs waiting now."""
        return len(self._queue)

    def check_room(self) -> None:
        """Refuse early what the queue would refuse later, before work goes into it.

        Raises:
            QueueFull: the queue holds as many jobs as it may.
            ModelUnavailable: the batcher is closing.
        """
        with self._lock:
            self._check_room(0)

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
            drained = self._idle.wait_for(lambda: not self._queue and not self._running, timeout_s)
            left = [] if drained else self._queue.remove(list(self._queue))
            self._work.notify_all()
            self._expiry.notify_all()
        self._fail(left, ModelUnavailable(f"{self._name} was stopped before this call's turn came; call again"))
        for thread in self._threads:
            thread.join(timeout_s)
        return drained

    def _check_room(self, nbytes: int) -> None:
        if self._closing:
            raise ModelUnavailable(f"{self._name} is stopping; call again in a moment")
        why = self._queue.why_full(nbytes)
        if why is not None:
            # The batch that runs and half of the queue: then there is room, and no idle gap.
            ahead = self._batch_jobs + len(self._queue) / 2
            retry_after_s = max(0.02, self._job_s * ahead)
            message = f"the queue of {self._name} is full: {why}; call again in {retry_after_s:.2f} s"
            raise QueueFull(message, retry_after_s)

    def _forget(self, key: Hashable, number: int) -> None:
        with self._lock:
            self._queue.discard(key, number)
            self._notify_if_idle()

    def _notify_if_idle(self) -> None:
        if not self._queue and not self._running:
            self._idle.notify_all()
            if self._closing:
                self._expiry.notify_all()

    @staticmethod
    def _fail(jobs: Iterable[Job[T, R]], error: Exception) -> None:
        for job in jobs:
            if job.future.running() or job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _expired(self, jobs: Iterable[Job[T, R]]) -> None:
        self._fail(jobs, DeadlineExceeded(f"the deadline passed while waiting for {self._name}"))

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
            self._expired(expired)

    # --- the executor's thread ----------------------------------------------------------------------------------

    def _run_forever(self) -> None:
        while (batch := self._next_batch()) is not None:
            started_s = time.monotonic()
            try:
                self._run(batch, started_s)
            except BaseException as error:  # a caller's callback may raise anything; others wait for this thread
                logger.exception("%s: a callback of a finished call raised", self._name)
                unanswered = [job for job in batch if not job.future.done()]
                self._fail(unanswered, InferenceFailed(f"{self._name} was interrupted ({type(error).__name__})"))
            seconds = (time.monotonic() - started_s) / len(batch)
            del batch  # while this thread waits for the next one, nothing keeps these images
            with self._lock:
                self._running = False
                self._batch_jobs = 0
                self._job_s = seconds if self._job_s == 0 else 0.8 * self._job_s + 0.2 * seconds
                self._notify_if_idle()

    def _next_batch(self) -> list[Job[T, R]] | None:
        """Wait for a batch that is due; ``None`` when closing and nothing is left."""
        with self._lock:
            while True:
                now_s = time.monotonic()
                key, due_s = self._queue.due(now_s, hurry=self._closing)
                if due_s <= now_s:
                    self._running = True
                    batch = self._queue.take(key)
                    self._batch_jobs = len(batch)
                    return batch
                if self._closing and not self._queue:
                    return None
                self._work.wait(None if due_s == FOREVER_S else due_s - now_s)

    def _run(self, jobs: list[Job[T, R]], started_s: float) -> None:
        """Execute jobs and answer their callers; halves the batch when that fails."""
        now = time.monotonic()
        self._expired([job for job in jobs if job.expired(now)])
        live = [
            job
            for job in jobs
            if not job.expired(now) and (job.future.running() or job.future.set_running_or_notify_cancel())
        ]
        if not live:
            return
        try:
            values = self._execute([job.payload for job in live])
            if len(values) != len(live):
                raise InferenceFailed(f"{self._name} returned {len(values)} answers for {len(live)} images")
        except BaseException as error:  # whatever it is: if this thread died, callers would wait for ever
            failure = error
            if len(live) > 1:  # frames of the traceback hold the batch's tensors; the halves need that memory
                failure.__traceback__ = None
        else:
            for job, value in zip(live, values, strict=True):
                job.future.set_result(Ride(value, started_s - job.queued_s, len(live)))
            return
        self._recover(live, started_s, failure)

    def _recover(self, jobs: list[Job[T, R]], started_s: float, error: BaseException) -> None:
        if len(jobs) > 1:
            logger.info("%s: a batch of %d failed (%r), halving it", self._name, len(jobs), error)
            middle = len(jobs) // 2
            self._run(jobs[:middle], started_s)
            self._run(jobs[middle:], started_s)
            return
        if not isinstance(error, self._expected):
            logger.error("%s failed on one image", self._name, exc_info=error)
        if not isinstance(error, VisionError):
            failure = InferenceFailed(f"{self._name} failed on this image ({type(error).__name__}); the log says more")
            failure.__cause__ = error
            error.__traceback__ = None  # was logged; its frames hold the image
            error = failure
        error.__traceback__ = None
        self._fail(jobs, error)
