"""Jobs that wait, by key and age. Bounded. Takes no locks: the batcher holds one around every call."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

FOREVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch and its queue may grow.

    Attributes:
        max_batch_size: most jobs in one call of the executor.
        max_delay_s: how long the oldest job may be held back for a fuller batch, seconds.
        max_queued_jobs: most jobs waiting.
        max_queued_bytes: most bytes waiting; a single job is always taken.
    """

    max_batch_size: int = 8
    max_delay_s: float = 0.0
    max_queued_jobs: int = 256
    max_queued_bytes: int = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Ride(Generic[R]):
    """A job's answer and how it travelled.

    Attributes:
        value: what the executor returned for it.
        queue_s: time between its submission and the start of its batch, seconds.
        batch_size: jobs in that batch, this one included.
    """

    value: R
    queue_s: float
    batch_size: int


@dataclass(eq=False, slots=True)
class Job(Generic[T, R]):
    """One payload that waits for its answer.

    Attributes:
        payload: what the executor gets.
        key: jobs of different keys never share a batch.
        nbytes: what it counts towards the bound in bytes.
        deadline_s: on `time.monotonic`'s clock, or ``None``.
        future: the answer to come.
        queued_s: when it was queued, on the same clock.
        number: its own for ever; `id` may be another's once it is freed.
    """

    payload: T
    key: Hashable
    nbytes: int
    deadline_s: float | None
    future: Future[Ride[R]] = field(default_factory=Future)
    queued_s: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=partial(next, count()))

    def expired(self, now_s: float) -> bool:
        """Whether its deadline has passed."""
        return self.deadline_s is not None and self.deadline_s <= now_s


class JobQueue(Generic[T, R]):
    """Waiting jobs, the oldest first within a key.

    Args:
        limits: of the batches taken from it and of the queue itself; may be replaced at any time.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._by_key: dict[Hashable, OrderedDict[int, Job[T, R]]] = {}
        self._jobs = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._jobs

    def __iter__(self) -> Iterator[Job[T, R]]:
        for jobs in self._by_key.values():
            yield from jobs.values()

    def why_full(self, nbytes: int, coming: int = 0) -> str | None:
        """What forbids one more job of that many bytes, besides those that are coming; ``None`` when there is room."""
        if self._jobs + coming >= self.limits.max_queued_jobs:
            return f"{self._jobs + coming} calls are waiting and the limit is {self.limits.max_queued_jobs}"
        if self._jobs and self._bytes + nbytes > self.limits.max_queued_bytes:
            return f"{self._bytes} bytes are waiting and the limit is {self.limits.max_queued_bytes}"
        return None

    def add(self, job: Job[T, R]) -> None:
        """Queue a job for which there is room."""
        self._by_key.setdefault(job.key, OrderedDict())[job.number] = job
        self._jobs += 1
        self._bytes += job.nbytes

    def remove(self, jobs: Iterable[Job[T, R]]) -> list[Job[T, R]]:
        """Take jobs out; returns those that were still in."""
        removed = []
        for job in jobs:
            waiting = self._by_key.get(job.key)
            if waiting is None or waiting.pop(job.number, None) is None:
                continue
            if not waiting:
                del self._by_key[job.key]
            self._jobs -= 1
            self._bytes -= job.nbytes
            removed.append(job)
        return removed

    def discard(self, key: Hashable, number: int) -> None:
        """Take out the job of that number; nothing when it is not in any more."""
        waiting = self._by_key.get(key)
        if waiting is not None and number in waiting:
            self.remove([waiting[number]])

    def remove_expired(self, now_s: float) -> list[Job[T, R]]:
        """Take out the jobs whose deadline has passed."""
        return self.remove([job for job in self if job.expired(now_s)])

    def next_deadline_s(self) -> float:
        """The earliest deadline of all jobs; `FOREVER_S` when none has one."""
        return min((job.deadline_s for job in self if job.deadline_s is not None), default=FOREVER_S)

    def due(self, now_s: float, *, hurry: bool) -> tuple[Hashable, float]:
        """The key that runs next and when.

        Args:
            now_s: on `time.monotonic`'s clock.
            hurry: do not hold jobs back for fuller batches.

        Returns:
            The key and the moment; `FOREVER_S` when nothing waits. Of several due now, the one whose first job is
            the oldest.
        """
        best: tuple[float, float, Hashable] = (FOREVER_S, FOREVER_S, None)
        for key, jobs in self._by_key.items():
            queued_s = next(iter(jobs.values())).queued_s
            at_once = hurry or len(jobs) >= self.limits.max_batch_size
            due_s = now_s if at_once else max(now_s, queued_s + self.limits.max_delay_s)
            if (due_s, queued_s) < best[:2]:
                best = (due_s, queued_s, key)
        return best[2], best[0]

    def take(self, key: Hashable, most: int) -> list[Job[T, R]]:
        """Take out a batch: the oldest jobs of a key."""
        return self.remove(list(islice(self._by_key[key].values(), most)))
