"""The load generator: calls to a server, N in flight or at a given rate."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vision_service.bench.cpu import cpu_s
from vision_service.bench.http2 import OK, GrpcConnection, Reply
from vision_service.bench.window import Windowed
from vision_service.client.failures import Failure
from vision_service.client.hold_back import HoldBack

KEPT_REPLIES = 2000
KEPT_BYTES = 32 * 1024 * 1024
"""Of the replies, so many are kept to be read after the clock has stopped."""

DRAIN_S = 30.0
"""How long calls under way may take once no new ones are started."""

UNANSWERED = "UNANSWERED"
"""Stands among the statuses for calls that had no answer by then; a server that loses some shall not look well."""

HELD_CALLERS = 16
"""So many callers hold back where ``bench`` measures that, each by itself: what one was told the others do not know."""

HELD_BACK = "HELD_BACK"
"""Stands among the statuses for calls that were not made, because the server had said when to come back."""

STATUS_NAMES = {
    0: "OK",
    1: "CANCELLED",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    8: "RESOURCE_EXHAUSTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
}


class Wire(Protocol):
    """A connection that has many calls under way. `GrpcConnection` says what each method does."""

    def prepare(self, message: bytes) -> bytes:
        """A message as it will be sent, over and over."""

    def start(self, prepared: bytes) -> int:
        """Begin a call; returns its number."""

    def flush(self) -> None:
        """Send what was begun."""

    def replies(self, timeout_s: float) -> list[Reply]:
        """Calls that ended."""

    def close(self) -> None:
        """Hang up."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send, how and for how long.

    Attributes:
        address: ``host:port``.
        method: full name of the method.
        messages: serialised requests, sent in turn.
        in_flight: calls under way at any time (closed loop); without effect when there is a rate.
        rate: calls begun a second, at random moments (open loop); 0: closed loop.
        held_callers: so many callers make the calls of the open loop in turn, each a client with ``hold_back`` that
            never tries again; 0: whatever was refused, calls go on. Without effect in the closed loop.
        warmup_s: left out of the figures, seconds.
        seconds: what is measured; from results to results, so it is a little more.
        server_pid: whose CPU time is read at the start and end of what is measured; 0: nobody's.
        wire: connects to an address and a method.
    """

    address: str
    method: str
    messages: Sequence[bytes]
    in_flight: int = 32
    rate: float = 0.0
    held_callers: int = 0
    warmup_s: float = 1.0
    seconds: float = 5.0
    server_pid: int = 0
    wire: Callable[[str, str], Wire] = GrpcConnection


@dataclass(slots=True)
class LoadResult:
    """What was measured.

    Attributes:
        seconds: how long.
        latencies_s: by status, of each call that ended; in the open loop from the moment it was due. Under `UNANSWERED`
            those that did not, so far; under `HELD_BACK` those that were not made, until that was known.
        server_cpu_s: CPU time of the server.
        generator_cpu_s: CPU time of this generator.
        in_time: calls that ended well before the clock stopped; a few more end after it in the open loop.
        replies: some of the answers, serialised.
    """

    seconds: float
    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    server_cpu_s: float = 0.0
    generator_cpu_s: float = 0.0
    in_time: int = 0
    replies: list[bytes] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """Calls that ended, well or not, and those that never were answered or made."""
        return sum(map(len, self.latencies_s.values()))


def generate(load: Load) -> LoadResult:
    """Generate load in this process.

    Raises:
        ModelUnavailable: nobody answers there, or the connection broke.
    """
    connection = load.wire(load.address, load.method)
    try:
        return (_Open if load.rate else _Closed)(load, connection).run()
    finally:
        connection.close()


class _Loop(Windowed):
    """What both loops share: calls begun and ended, and the window in which they count."""

    def __init__(self, load: Load, connection: Wire) -> None:
        self._load = load
        self._connection = connection
        self._messages = [connection.prepare(message) for message in load.messages]
        self._begun = 0
        self._flying: dict[int, tuple[float, int]] = {}  # when each was due, and whose it is
        self._held = HoldBack(time.perf_counter)
        self._result = LoadResult(load.seconds)
        self._kept_bytes = 0
        self._counting = False

    def _begin(self, due_s: float, caller: int = 0) -> None:
        message = self._messages[self._begun % len(self._messages)]
        self._begun += 1
        self._flying[self._connection.start(message)] = due_s, caller

    def _end(self, timeout_s: float) -> bool:
        """Take in replies; returns whether there are results among them."""
        replies = self._connection.replies(timeout_s)
        now_s = time.perf_counter()
        for reply in replies:
            due_s, caller = self._flying.pop(reply.stream)
            name = STATUS_NAMES.get(reply.status, str(reply.status))
            if self._load.held_callers and reply.retry_after_ms is not None:
                self._held.heed(caller, Failure(name, "", reply.retry_after_ms))
            if self._counting:
                self._count(name, now_s - due_s)
                if reply.status == OK and len(self._result.replies) < KEPT_REPLIES and self._kept_bytes < KEPT_BYTES:
                    self._kept_bytes += len(reply.body)
                    self._result.replies.append(reply.body)
        return any(reply.status == OK for reply in replies)

    def _count(self, name: str, latency_s: float) -> None:
        self._result.latencies_s.setdefault(name, []).append(latency_s)

    def _usage_s(self) -> tuple[float, float, float]:
        server_s = cpu_s(self._load.server_pid) if self._load.server_pid else 0.0
        return time.perf_counter(), server_s, cpu_s(os.getpid())

    def run(self) -> LoadResult:
        """Warm up, measure, and wait for what is under way."""
        self.until(time.perf_counter() + self._load.warmup_s)
        self.settle()
        before = self._usage_s()
        self._counting = True
        self.until(before[0] + self._load.seconds)
        self.settle()
        after = self._usage_s()
        self._result.in_time = len(self._result.latencies_s.get("OK", ()))
        self._counting = self._counts_stragglers
        self._result.seconds, self._result.server_cpu_s, self._result.generator_cpu_s = (
            end - start for start, end in zip(before, after, strict=True)
        )
        until_s = time.perf_counter() + DRAIN_S
        while self._flying and time.perf_counter() < until_s:
            self._end(0.1)
        if self._flying:
            now_s = time.perf_counter()
            self._result.latencies_s[UNANSWERED] = [now_s - due_s for due_s, _ in self._flying.values()]
        return self._result

    _counts_stragglers = False


class _Closed(_Loop):
    """As many calls in flight as are wanted: each answer begins the next call."""

    def _turn(self, end_s: float) -> bool:
        now_s = time.perf_counter()
        for _ in range(self._load.in_flight - len(self._flying)):
            self._begin(now_s)
        self._connection.flush()
        return self._end(end_s - now_s)


class _Open(_Loop):
    """Calls at random moments (a Poisson process), whether or not earlier ones were answered.

    A call's latency counts from the moment it was due, so a generator that cannot keep up shows as latency. What was
    begun while it was measured counts whenever it ends.
    """

    _counts_stragglers = True

    def __init__(self, load: Load, connection: Wire) -> None:
        super().__init__(load, connection)
        self._random = random.Random()  # noqa: S311 - no secret
        self._next_caller = 0
        self._due_s = time.perf_counter()

    def _begin_or_hold_back(self, due_s: float) -> None:
        caller, self._next_caller = self._next_caller, (self._next_caller + 1) % self._load.held_callers
        if self._held.failure(caller) is None:
            self._begin(due_s, caller)
        elif self._counting:
            self._count(HELD_BACK, time.perf_counter() - due_s)

    def _turn(self, end_s: float) -> bool:
        begin = self._begin_or_hold_back if self._load.held_callers else self._begin
        now_s = time.perf_counter()
        while self._due_s <= now_s:
            begin(self._due_s)
            self._due_s += self._random.expovariate(self._load.rate)
        self._connection.flush()
        return self._end(min(end_s, self._due_s) - time.perf_counter())
