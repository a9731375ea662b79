"""Keeps Python's garbage collector from stopping a process that serves."""

from __future__ import annotations

import gc

YOUNG = 10_000
"""So many more objects than at the last collection start the next one."""


def settle_garbage() -> None:
    """Take everything that lives now out of the garbage collector's sight, for the rest of the process.

    Once torch, a runtime and a model are loaded, some 370,000 objects stay for ever. A full collection walks all of
    them and holds every thread up for 0.2 s meanwhile. From here on it only walks what came later. Of what lives now,
    cycles are never freed: for processes that load their models once, at the start, and never for a library's caller.

    Young objects are walked when there are ten thousand more of them, not seven hundred: calls under way alone are that
    many, and hardly any of what they leave is a cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
