"""The access log: one line for each call, and no flood of them.

A line takes 0.15 ms of the event loop where each is written when its call ends, among decoders and networks that have
emptied the caches. So they wait for each other, a tenth of a second at most, and have the time at which their call
ended. Refusals, which under overload are most of the calls, are counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

logger = logging.getLogger("vision_service.access")

LINES_A_SECOND = 10
"""So many refusals a second have a line of their own in the log. The others are counted in one line, and have one each
at level DEBUG."""

WAIT_S = 0.1
"""How long a line may wait for others, seconds."""

MOST_WAITING = 256
"""So many lines wait for no others."""


class AccessLog:
    """Lines about calls. Used on the event loop alone."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, str, str, dict[str, Any]]] = []  # when it ended, method, status, fields
        self._since_s = float("-inf")  # start of the second that is counted, on the loop's clock
        self._lines = 0
        self._uncounted: dict[tuple[str, str], int] = {}  # refusals without a line, by method and status

    def note(self, method: str, status: str, request_id: str, peer: str, started_s: float) -> None:
        """A call is over.

        Args:
            method: its name.
            status: name of the gRPC status.
            request_id: what replies and errors call it.
            peer: who called.
            started_s: when it began, on `time.perf_counter`'s clock.
        """
        if not logger.isEnabledFor(logging.INFO):
            return
        duration_ms = round(1000 * (time.perf_counter() - started_s), 2)
        fields = {
            "method": method,
            "status": status,
            "request_id": request_id,
            "peer": peer,
            "duration_ms": duration_ms,
        }
        if not self._waiting:
            asyncio.get_running_loop().call_later(WAIT_S, self._write)
        self._waiting.append((time.time(), method, status, fields))
        if len(self._waiting) >= MOST_WAITING:
            self._write()

    def refused(self, method: str, status: str, request_id: str, peer: str) -> None:
        """A call was not let in: it has a line if there are not many of them. Arguments as in `note`."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if now_s - self._since_s >= 1.0:
            self._since_s, self._lines = now_s, 0
        self._lines += 1
        within = self._lines <= LINES_A_SECOND
        if within or logger.isEnabledFor(logging.DEBUG):
            about = {"method": method, "status": status, "request_id": request_id, "peer": peer}
            logger.log(logging.INFO if within else logging.DEBUG, "%s %s", method, status, extra=about)
        if not within:
            if not self._uncounted:
                loop.call_at(self._since_s + 1.0, self._write_count)
            key = method, status
            self._uncounted[key] = self._uncounted.get(key, 0) + 1

    def write_rest(self) -> None:
        """Write what is kept back for others."""
        self._write()
        self._write_count()

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        for ended_s, method, status, fields in waiting:
            record = logger.makeRecord(
                logger.name, logging.INFO, __file__, 0, "%s %s", (method, status), None, "note", fields
            )
            record.created, record.msecs = ended_s, 1000 * (ended_s % 1)
            logger.handle(record)

    def _write_count(self) -> None:
        """Write the line about refusals that had none of their own, if there were any."""
        for (method, status), calls in self._uncounted.items():
            about = {"method": method, "status": status, "calls": calls}
            logger.info("%s %s, %d more in this second", method, status, calls, extra=about)
        self._uncounted.clear()
