"""Threads that prepare images and write large answers, with little between those who have work and those who do it."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

logger = logging.getLogger(__name__)

_Work = tuple[Callable[..., object], tuple[Any, ...]]


class Workers:
    """Threads that do what they are given, first come first served.

    What a `ThreadPoolExecutor` does besides, a future for each piece of work and the starting of threads when they are
    needed, costs some thirty calls of Python an image, on the event loop and on the worker.

    A process that ends does first what was submitted: threads that it stopped in OpenCV would abort it.

    Args:
        count: of threads, at least one.
        name: what their names begin with.
        begin: called by each of them first; where it fails, the log says why and the thread works all the same.

    Attributes:
        count: of threads.

    Raises:
        ValueError: no threads.
    """

    def __init__(self, count: int, name: str, begin: Callable[[], None] = lambda: None) -> None:
        if count < 1:
            raise ValueError(f"{count} workers would do nothing; have at least one")
        self.count = count
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Threads that knew their workers would keep them. Called by `close`, or when those who had them are gone.
        self._end = weakref.finalize(self, _end, self._queue, count)
        self._threads = [
            threading.Thread(target=_work, args=(self._queue, begin), name=f"{name}_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        _OPEN.add(self)

    def submit(self, run: Callable[..., object], *args: Any) -> None:
        """Have something done. What it raises goes to the log.

        Raises:
            RuntimeError: closed.
        """
        with self._lock:  # nothing may come behind the threads' end
            if not self._end.alive:
                raise RuntimeError("the workers were closed")
            self._queue.put((run, args))

    def close(self) -> None:
        """Take nothing new, do what was submitted, end the threads. Not to be called by one of them."""
        with self._lock:
            self._end()
        for thread in self._threads:
            thread.join()


_OPEN: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_OPEN):
        workers.close()


def _end(queue: SimpleQueue[_Work | None], count: int) -> None:
    for _ in range(count):
        queue.put(None)


def _work(queue: SimpleQueue[_Work | None], begin: Callable[[], None]) -> None:
    _do(begin)
    while (work := queue.get()) is not None:
        run, args = work
        _do(run, *args)
        del work, run, args  # an image is not to be kept until the next one comes


def _do(run: Callable[..., object], *args: Any) -> None:
    try:
        run(*args)
    except BaseException:
        logger.exception("a worker's thread could not do its work, and goes on with the next")
