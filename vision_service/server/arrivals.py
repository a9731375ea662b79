"""Results of other threads, for coroutines that wait for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from vision_service.engine.together import once_at_end


class Arrivals:
    """Waits for futures of other threads, and is woken once for those that are done together.

    `asyncio.wrap_future` wakes the loop for each. For one event loop: the first that waits.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: deque[tuple[Callable[[Future[Any]], None], Future[Any]]] = deque()

    async def wait_for(self, future: Future[Any]) -> Any:
        """The future's result; raises its exception. When the waiting coroutine is cancelled, so is the future."""
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.tell(future, partial(_release, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            future.cancel()
            raise
        error = future.exception()
        if error is None:
            return future.result()
        try:
            # Several calls may share an error; its traceback shall not hold the frames, and images, of them all.
            raise error.with_traceback(None)
        finally:
            del future, error  # the error holds this frame, which would hold the error

    def tell(self, future: Future[Any], then: Callable[[Future[Any]], None]) -> None:
        """Have something called on the event loop when a future is done or cancelled.

        Args:
            future: keeps ``then`` for as long as it lives.
            then: is given the future, so that it need not hold it: the two would keep each other.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        future.add_done_callback(partial(self._arrive, then))

    def _arrive(self, then: Callable[[Future[Any]], None], future: Future[Any]) -> None:
        """Take note of a future that is done. Called by the thread that made it so."""
        self._arrived.append((then, future))
        once_at_end(self._wake_loop)

    def _wake_loop(self) -> None:
        assert self._loop is not None, "set by tell()"
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._go_on)

    def _go_on(self) -> None:
        """Call what waits for the futures that are done."""
        while self._arrived:
            then, future = self._arrived.popleft()
            then(future)


def _release(waiter: asyncio.Future[Any], future: Future[Any]) -> None:
    """Let a coroutine go on."""
    if waiter.done():  # its call is over
        return
    if future.cancelled():
        waiter.cancel()
    else:
        waiter.set_result(None)
