"""How long calls take, learnt from those that were answered, and so how many may be under way.

A count alone does not bound a wait: 288 calls are one second of a small network and seven of a large one. Calls are
answered about in the order in which they came. So one that takes ``T`` and had ``n`` under way when it came, itself
included, shows that each takes ``T / n`` of the model's time (Little's law, L = lambda W). That holds whatever the time
goes into: decoding, turns of other models, passes side by side, writing of masks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vision_service.errors import QueueFull

USUAL_S = 2.0
"""How long a call may take where nobody has said otherwise, seconds."""

USUALLY_AT_LEAST = 32
"""Calls that are let in where nobody has said otherwise, however long they take: a slow model has callers, too."""

_HEADROOM = 0.75
"""A call is let in when it is expected to take at most this share of the bound: a machine's speed changes by a quarter
while it waits."""

_SMOOTHING = 1 / 32
"""Weight of the newest call in the moving average."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A call that was let in.

    Attributes:
        at_s: when, on `time.monotonic`'s clock.
        under_way: calls that had no answer then, this one included.
    """

    at_s: float
    under_way: int


class Pace:
    """Lets in as many calls as are expected to be answered in time. Takes no locks: the host holds one.

    Args:
        max_wait_s: how long a call may take; ``None``: as long as it likes.
        at_least: calls that are let in however long they take, at least one.
        call_s: what each call is believed to take of the model's time before the first was answered, seconds.
    """

    def __init__(self, max_wait_s: float | None, at_least: int, call_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._at_least = max(1, at_least)
        self._call_s = call_s

    def enter(self, under_way: int) -> Entry:
        """Let a call in.

        Args:
            under_way: calls without an answer, this one included.
        """
        return Entry(time.monotonic(), under_way)

    def answered(self, entry: Entry) -> None:
        """Learn from a call that has its result."""
        took_s = (time.monotonic() - entry.at_s) / entry.under_way
        self._call_s += _SMOOTHING * (took_s - self._call_s)

    def check(self, under_way: int, name: str) -> None:
        """Whether a call may be let in.

        Args:
            under_way: calls without an answer, this one not included.
            name: of the model, for the message.

        Raises:
            QueueFull: it is expected to take too long.
        """
        if self.max_wait_s is None or under_way < self._at_least:
            return
        expected_s = self._call_s * (under_way + 1)
        if expected_s > _HEADROOM * self.max_wait_s:
            retry_after_s = max(0.02, self._call_s * under_way / 2)  # half of them are gone then, and no gap is left
            raise QueueFull(
                f"{under_way} calls to {name} are under way and one more would be expected to take {expected_s:.2f} s, "
                f"which is too near to max_wait_ms, {1000 * self.max_wait_s:g}; call again in {retry_after_s:.2f} s",
                retry_after_s,
                backlog_s=self._call_s * under_way,
            )
