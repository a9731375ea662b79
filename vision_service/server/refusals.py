"""Calls that are refused by their headers: answered with as little work as can be, and logged without a flood.

Under overload refusals are most of the calls, and what they cost is missing where images are answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from vision_service.errors import QueueFull
from vision_service.server.metadata import MAX_MESSAGE, request_id_of, trailing_of

logger = logging.getLogger("vision_service.access")

LINES_A_SECOND = 10
"""So many refusals a second have a line of their own in the log. The others are counted in one line, and have one each
at level DEBUG."""


class Refusals:
    """Refuses calls and logs that. Used on the event loop alone."""

    def __init__(self) -> None:
        self._since_s = float("-inf")  # start of the second that is counted, on the loop's clock
        self._lines = 0
        self._unlogged: dict[tuple[str, str], int] = {}  # by method and status

    def handler(self, error: QueueFull, method: str) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[bytes]]:
        """What answers one call.

        Args:
            error: why it is refused.
            method: its name, for the log.
        """

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> bytes:
            request_id = request_id_of(context.invocation_metadata())
            # Not by `abort`, whose exception has to be made, raised and caught.
            context.set_code(grpc.StatusCode[error.status])
            context.set_details(str(error)[:MAX_MESSAGE])
            context.set_trailing_metadata(trailing_of(error, request_id))
            self._log(method, error.status, request_id, context)
            return b""  # with a status that is not OK nothing is sent

        return refuse

    def _log(self, method: str, status: str, request_id: str, context: grpc.aio.ServicerContext) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if now_s - self._since_s >= 1.0:
            self._since_s, self._lines = now_s, 0
        self._lines += 1
        within = self._lines <= LINES_A_SECOND
        if within or logger.isEnabledFor(logging.DEBUG):
            about = {"method": method, "status": status, "request_id": request_id, "peer": context.peer()}
            logger.log(logging.INFO if within else logging.DEBUG, "%s %s", method, status, extra=about)
        if not within:
            if not self._unlogged:
                loop.call_at(self._since_s + 1.0, self.log_rest)
            key = method, status
            self._unlogged[key] = self._unlogged.get(key, 0) + 1

    def log_rest(self) -> None:
        """Write the line about refusals that had none of their own, if there were any."""
        for (method, status), calls in self._unlogged.items():
            about = {"method": method, "status": status, "calls": calls}
            logger.info("%s %s, %d more in this second", method, status, calls, extra=about)
        self._unlogged.clear()
