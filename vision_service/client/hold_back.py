"""Requests that a client does not send, because its server has said when it wants to be asked again.

Under overload much of what a server does is to say no, and a refusal wakes its threads as an image does. A caller that
was told when there will be room can spare it that for all of its requests, not for the refused one alone. HTTP has
``Retry-After`` for it (RFC 9110, 10.2.3). It is a plain form of client-side throttling (Beyer et al., Site Reliability
Engineering, chapter 21): the server names a time, so nothing has to be guessed from shares of refusals.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vision_service.client.failures import AttemptFailed, Failure

LONGEST_S = 10.0
"""A server is asked again after so many seconds, whatever time it had named: it may have been wrong, or have gone."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A refusal: when it came, until when it holds, and what the server said."""

    at_s: float
    until_s: float
    message: str


class HoldBack:
    """Remembers what was refused for want of room, and until when. Threads may share one.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._refusals: dict[Hashable, _Refusal] = {}

    @contextmanager
    def asking(self, kind: Hashable) -> Iterator[None]:
        """Around an attempt.

        Args:
            kind: of requests that find room or do not find room together, such as a method and a model.

        Raises:
            AttemptFailed: the attempt is not to be made yet; as the server's refusal would be, without a request id.
        """
        failure = self.failure(kind)
        if failure is not None:
            raise AttemptFailed(failure)
        try:
            yield
        except AttemptFailed as failed:
            self.heed(kind, failed.failure)
            raise

    def failure(self, kind: Hashable) -> Failure | None:
        """Why a request is not to be sent now; ``None``: it is."""
        with self._lock:
            refusal = self._refusals.get(kind)
        now_s = self._clock()
        if refusal is None or refusal.until_s <= now_s:
            return None
        left_s = refusal.until_s - now_s
        return Failure(
            "RESOURCE_EXHAUSTED",
            f"not sent: {now_s - refusal.at_s:.2f} s ago the server had no room for such a request; "
            f'call again in {left_s:.2f} s. The server had said: "{refusal.message}"',
            pushback_ms=math.ceil(1000 * left_s),
        )

    def heed(self, kind: Hashable, failure: Failure) -> None:
        """Learn from a failure. One that does not say when to come back holds nothing; of several the latest counts."""
        if failure.status != "RESOURCE_EXHAUSTED" or failure.pushback_ms is None or failure.pushback_ms <= 0:
            return
        now_s = self._clock()
        refusal = _Refusal(now_s, now_s + min(failure.pushback_ms / 1e3, LONGEST_S), failure.message)
        with self._lock:
            for old in [old for old, known in self._refusals.items() if known.until_s <= now_s]:
                del self._refusals[old]
            known = self._refusals.get(kind, refusal)
            self._refusals[kind] = max(known, refusal, key=lambda one: one.until_s)
