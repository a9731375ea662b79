"""What of a loop is measured: from results to results, however it makes them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

SETTLE_S = 5.0
"""How long a clock may wait for results to start or stop with."""


class Windowed(ABC):
    """A loop whose clock starts and stops with results.

    They come by the batch. A clock that starts and stops at any moment counts up to a batch too many or too few, which
    of a slow model is a fifth of what two seconds hold.
    """

    _has_results = False

    def until(self, end_s: float) -> None:
        """Go on until then, on `time.perf_counter`'s clock."""
        while time.perf_counter() < end_s:
            self._go_on(end_s)

    def settle(self) -> None:
        """Go on until the next results come, for `SETTLE_S` at most; not at all if none ever came."""
        end_s = time.perf_counter() + SETTLE_S
        while self._has_results and time.perf_counter() < end_s and not self._go_on(end_s):
            pass

    def _go_on(self, end_s: float) -> bool:
        results = self._turn(end_s)
        self._has_results |= results
        return results

    @abstractmethod
    def _turn(self, end_s: float) -> bool:
        """Begin what is due and take in what comes, until then at most; returns whether results came."""
