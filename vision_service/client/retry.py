"""When a failed call is tried again. Pure: no gRPC, no sleeping; the clock and the dice come from outside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from vision_service.client.failures import Failure
from vision_service.errors import DeadlineExceeded, InvalidInput

LONGEST_S = 30 * 24 * 3600.0
"""Longest deadline, seconds: gRPC takes endless ones for ones that have passed."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Which failures are tried again, and after how long.

    RESOURCE_EXHAUSTED is tried again after the time that the server names, and not at all when it names none: then
    more calls would only make it worse, or the call can never fit. UNAVAILABLE is tried again after a pause that
    grows, or that the server names. Nothing else is: the answer would be the same.

    Attributes:
        max_attempts: calls in all, the first included; 1 never retries.
        initial_backoff_s: pause before the second attempt after UNAVAILABLE.
        max_backoff_s: the longest such pause.
        multiplier: each such pause is so many times the one before.
        jitter: up to this share of a pause is added at random, so that refused callers do not return all at once.

    Raises:
        InvalidInput: ``max_attempts`` is below 1.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    multiplier: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidInput("max_attempts", f"must be 1 or more, got {self.max_attempts}")

    def pause_s(self, failure: Failure, attempt: int, remaining_s: float, draw: float) -> float | None:
        """How long to wait before the next attempt.

        Args:
            failure: of the last attempt.
            attempt: its number, from 1.
            remaining_s: time left for the whole call, seconds.
            draw: a random number, 0..1.

        Returns:
            Seconds, or ``None`` to give up: not worth retrying, too many attempts, or the time would be over.
        """
        if attempt >= self.max_attempts:
            return None
        base_s = self._base_s(failure, attempt)
        if base_s is None:
            return None
        pause_s = base_s * (1.0 + self.jitter * draw)
        return pause_s if pause_s < remaining_s else None

    def _base_s(self, failure: Failure, attempt: int) -> float | None:
        if failure.status not in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
            return None
        if failure.pushback_ms is not None:
            return failure.pushback_ms / 1e3 if failure.pushback_ms >= 0 else None
        if failure.status == "RESOURCE_EXHAUSTED":
            return None
        return min(self.initial_backoff_s * self.multiplier ** (attempt - 1), self.max_backoff_s)


class Attempts:
    """The attempts of one call, all within one deadline.

    Args:
        policy: when to try again.
        timeout_s: for all attempts and pauses together, seconds.
        clock: monotonic seconds.
        draw: a random number, 0..1.

    Raises:
        InvalidInput: ``timeout_s`` is not above 0.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if not timeout_s > 0:
            raise InvalidInput("timeout_s", f"must be above 0, got {timeout_s}")
        self.made = 0
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._deadline = clock() + min(timeout_s, LONGEST_S)

    def start(self) -> float:
        """Count one more attempt.

        Returns:
            Seconds left: the attempt's own deadline.
        """
        self.made += 1
        return self.remaining_s()

    def remaining_s(self) -> float:
        """Seconds left, never below 0."""
        return max(self._deadline - self._clock(), 0.0)

    def pause_s(self, failure: Failure) -> float | None:
        """Seconds to wait before the next attempt, or ``None`` to give up."""
        return self._policy.pause_s(failure, self.made, self.remaining_s(), self._draw())


class Polling:
    """Pauses between questions that are asked until the answer is yes: short at first, then a second.

    Args:
        what: is waited for, for the message.
        timeout_s: how long to go on, seconds.
        clock: monotonic seconds.
    """

    def __init__(self, what: str, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._clock = clock
        self._deadline = clock() + timeout_s
        self._next_s = 0.05

    def question_s(self) -> float:
        """How long the next question may take, seconds."""
        return max(min(self._deadline - self._clock(), 5.0), 0.01)

    def pause_s(self) -> float:
        """Seconds until the next question.

        Raises:
            DeadlineExceeded: it took too long.
        """
        remaining_s = self._deadline - self._clock()
        if remaining_s <= 0:
            raise DeadlineExceeded(f"{self._what} was not ready within {self._timeout_s:g} s")
        pause_s = min(self._next_s, remaining_s)
        self._next_s = min(self._next_s * 1.5, 1.0)
        return pause_s
