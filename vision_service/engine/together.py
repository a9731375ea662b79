"""What many things cause at one time is done once, after the last of them.

The answers of a batch come one after the other, within a millisecond, and each has its waiter. Waking another thread
for each of them has the two take turns at Python's lock; waking it once, when all are there, does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class _Here(threading.local):
    """Of each thread: what is to be done at the end, each once; ``None`` where nothing is held together."""

    at_end: dict[Callable[[], None], None] | None = None


_here = _Here()


@contextmanager
def together() -> Iterator[None]:
    """Hold back what this thread does `once_at_end` until the block is left, however it is left."""
    if _here.at_end is not None:  # part of a larger block
        yield
        return
    _here.at_end = {}
    try:
        yield
    finally:
        actions, _here.at_end = _here.at_end, None
        with ExitStack() as each:  # one that raises does not keep the others from being done
            for action in reversed(actions):
                each.callback(action)


def once_at_end(action: Callable[[], None]) -> None:
    """Do something at the end of this thread's block of `together`, once however often it is asked for; else now.

    Args:
        action: told from others by equality, as methods of one object are.
    """
    if _here.at_end is None:
        action()
    else:
        _here.at_end[action] = None
