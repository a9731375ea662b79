"""Keeps Python's garbage collector from stopping a process that serves."""

from __future__ import annotations

import gc


def settle_garbage() -> None:
    """Take everything that lives now out of the garbage collector's sight, for the rest of the process.

    Once torch, a runtime and a model are loaded, some 370,000 objects stay for ever. A full collection walks all of
    them and holds every thread up for 0.2 s meanwhile. From here on it only walks what came later. Of what lives now,
    cycles are never freed: for processes that load their models once, at the start, and never for a library's caller.
    """
    gc.collect()
    gc.freeze()
