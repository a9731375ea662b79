"""Executes one batch and answers its callers. When that fails, the batch is halved down to the job at fault.

A batch has two stages: `execute`, which needs the device, and `finish`, which makes answers of what came out and can
run while the device has the next batch. Each stage that raises is repeated in halves, down to single jobs: the job
that causes the error gets it, its batch mates get their answers. `finish` is repeated on parts of the same outcome, so
the device does not run again for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vision_service.engine.queue import Job, Ride
from vision_service.engine.together import together
from vision_service.errors import DeadlineExceeded, InferenceFailed, VisionError

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

Execute = Callable[[Sequence[T]], Any]
"""Payloads in; as many answers out, in the same order, or an outcome for `Finish`."""

Finish = Callable[[Sequence[T], Any, int], Sequence[R]]
"""Payloads, the outcome of the execution that they were part of, and the first one's place in it; answers out."""


@dataclass(frozen=True, slots=True)
class Executed(Generic[T, R]):
    """Jobs whose execution is over and whose answers are still to be made.

    Attributes:
        jobs: the executed ones.
        outcome: of the execution; of exactly these jobs.
        started_s: when their batch started, on `time.monotonic`'s clock.
    """

    jobs: list[Job[T, R]]
    outcome: Any
    started_s: float


class BatchRunner(Generic[T, R]):
    """Runs batches for a `Batcher`, in whatever thread calls it.

    Args:
        finish: makes answers of an execution's outcome; ``None``: the outcome is the answers.
        name: for messages and the log.
        expected: errors that are no one's fault and so are not logged as one (out of memory).
    """

    def __init__(
        self,
        finish: Finish[T, R] | None,
        *,
        name: str,
        expected: tuple[type[VisionError], ...] = (),
    ) -> None:
        self._finish = finish
        self._name = name
        self._expected = expected
        self._finishing = threading.Lock()

    @staticmethod
    def fail(jobs: Iterable[Job[T, R]], error: Exception) -> None:
        """Answer jobs with an error, unless their callers have gone."""
        for job in jobs:
            if job.future.running() or job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def expire(self, jobs: Iterable[Job[T, R]]) -> None:
        """Answer jobs whose deadline has passed."""
        self.fail(jobs, DeadlineExceeded(f"the deadline passed while waiting for {self._name}"))

    def start(self, execute: Execute[T], jobs: list[Job[T, R]], started_s: float) -> list[Executed[T, R]]:
        """Execute a batch.

        Args:
            execute: the stage that needs the device.
            jobs: the batch; expired and cancelled ones do not run.
            started_s: on `time.monotonic`'s clock.

        Returns:
            What is left for `finish`: one part, or several where the batch had to be halved, or none.
        """
        now = time.monotonic()
        self.expire([job for job in jobs if job.expired(now)])
        live = [
            job
            for job in jobs
            if not job.expired(now) and (job.future.running() or job.future.set_running_or_notify_cancel())
        ]
        if not live:
            return []
        try:
            outcome = execute([job.payload for job in live])
            if self._finish is None:
                self._check_count(outcome, len(live))
        except BaseException as error:  # whatever it is: if this thread died, callers would wait for ever
            failure = error
            if len(live) > 1:  # frames of the traceback hold the batch's tensors; the halves need that memory
                failure.__traceback__ = None
        else:
            return [Executed(live, outcome, started_s)]
        if len(live) == 1:
            self._blame(live[0], failure)
            return []
        first, second = self._halves(live, failure)
        # One after the other: what the first half leaves is finished before the second takes memory.
        for part in self.start(execute, first, started_s):
            self.finish(part)
        return self.start(execute, second, started_s)

    def finish(self, executed: Executed[T, R]) -> None:
        """Make the answers of executed jobs and hand them over. One at a time, whoever calls."""
        with self._finishing:
            self._finish_part(executed.jobs, executed, 0)

    def _finish_part(self, jobs: list[Job[T, R]], executed: Executed[T, R], start: int) -> None:
        try:
            if self._finish is None:
                values = executed.outcome
            else:
                values = self._finish([job.payload for job in jobs], executed.outcome, start)
                self._check_count(values, len(jobs))
        except BaseException as error:
            failure = error
            if len(jobs) > 1:
                failure.__traceback__ = None
        else:
            with together():  # an event loop whose coroutines wait for them is woken once
                for job, value in zip(jobs, values, strict=True):
                    job.future.set_result(Ride(value, executed.started_s - job.queued_s, len(executed.jobs)))
            return
        if len(jobs) == 1:
            self._blame(jobs[0], failure)
            return
        first, second = self._halves(jobs, failure)
        self._finish_part(first, executed, start)
        self._finish_part(second, executed, start + len(first))

    def _check_count(self, values: Sequence[R], expected: int) -> None:
        if len(values) != expected:
            raise InferenceFailed(f"{self._name} returned {len(values)} answers for {expected} images")

    def _halves(self, jobs: list[Job[T, R]], error: BaseException) -> tuple[list[Job[T, R]], list[Job[T, R]]]:
        logger.info("%s: a batch of %d failed (%r), halving it", self._name, len(jobs), error)
        middle = len(jobs) // 2
        return jobs[:middle], jobs[middle:]

    def _blame(self, job: Job[T, R], error: BaseException) -> None:
        if not isinstance(error, self._expected):
            logger.error("%s failed on one image", self._name, exc_info=error)
        if not isinstance(error, VisionError):
            failure = InferenceFailed(f"{self._name} failed on this image ({type(error).__name__}); the log says more")
            failure.__cause__ = error
            error.__traceback__ = None  # was logged; its frames hold the image
            error = failure
        error.__traceback__ = None
        self.fail([job], error)
