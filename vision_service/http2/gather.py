"""Taking in what comes on a connection in larger portions for a while."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress
from typing import Any

GATHER_BYTES = 384 * 1024
"""So many bytes are taken in at once, however short they have been waiting: no more than what is read in one go, and
the peer is never held up."""

OFTEN_S = 0.02
"""A connection gathers when it is asked to for the second time within so many seconds: a call now and then is answered
at once, and where more are coming they are taken in together."""


class Gatherer:
    """Has a socket wake the event loop for a portion, not for every packet. Used on the event loop alone.

    The socket is told how many bytes are worth it (SO_RCVLOWAT), until the time is over; the end of what comes is heard
    at once, and so is a full buffer. Linux does that by itself (4.18 and later); elsewhere nothing happens.

    Args:
        endpoint: the socket, or what asyncio gives out as one.
        loop: the event loop.
    """

    def __init__(self, endpoint: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._endpoint = endpoint
        self._loop = loop
        self._asked_s = float("-inf")
        self._gathering = False

    def gather(self, seconds: float) -> None:
        """For so long, if this was asked for a moment ago already; see `OFTEN_S`."""
        now_s = self._loop.time()
        often, self._asked_s = now_s - self._asked_s < OFTEN_S, now_s
        if often and not self._gathering and self._set(GATHER_BYTES):
            self._gathering = True
            self._loop.call_later(seconds, self._over)

    def _over(self) -> None:
        self._gathering = False
        self._set(1)

    def _set(self, portion: int) -> bool:
        if sys.platform != "linux":
            return False
        with suppress(OSError):  # it was closed meanwhile
            self._endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, portion)
            return True
        return False
