"""Taking in what comes on a connection in larger portions for a while."""

from __future__ import annotations

import asyncio
import platform
import re
import socket
import sys
from contextlib import suppress
from functools import cache
from typing import Any

GATHER_BYTES = 384 * 1024
"""So many bytes are taken in at once, however short a time they have waited: less than `reader.READ_BYTES`, and the
system's buffer grows to hold them, so that peers go on sending."""

OFTEN_S = 0.02
"""A connection gathers when it is asked to for the second time within so many seconds, so that nothing waits for others
that do not come."""

_FIRST_KERNEL = 4, 18
"""From this version on Linux says that there is something to read when the portion is made smaller. Before, what is
there already would wait until more comes."""


@cache
def can_gather() -> bool:
    """Whether this system's sockets do."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return sys.platform == "linux" and version is not None and (int(version[1]), int(version[2])) >= _FIRST_KERNEL


class Gatherer:
    """Has a socket wake the event loop for a portion, not for every packet. Used on the event loop alone.

    The socket is told how many bytes are worth it (SO_RCVLOWAT), until the time is over; the end of what comes is heard
    at once. On systems other than Linux nothing happens, nor with sockets that are not TCP's.

    Args:
        endpoint: the socket, or what asyncio gives out as one.
        loop: the event loop.
    """

    def __init__(self, endpoint: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._endpoint = endpoint
        self._loop = loop
        self._asked_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def gather(self, seconds: float) -> None:
        """For so long, if this was asked for a moment ago already; see `OFTEN_S`."""
        now_s = self._loop.time()
        often, self._asked_s = now_s - self._asked_s < OFTEN_S, now_s
        if often and self._timer is None and self._set(GATHER_BYTES):
            self._timer = self._loop.call_later(seconds, self.stop)

    def stop(self) -> None:
        """Something that is on its way is waited for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._set(1)

    def _set(self, portion: int) -> bool:
        if not can_gather():
            return False
        with suppress(OSError):  # it was closed meanwhile
            self._endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, portion)
            return True
        return False
