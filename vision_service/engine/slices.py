"""How long Linux lets a thread run at a time, which decides how soon a thread that wakes up gets a core."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

SHORT_US = 100
"""The shortest slice that Linux gives, microseconds."""

_SET, _GET = 0, 1
_NUMBERS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""By machine: the numbers of the system calls sched_setattr and sched_getattr, which neither Python nor every C library
has by name."""

_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr`` of sched_setattr(2), first version: its size, policy, flags, nice, priority, runtime, deadline
and period. The runtime of an ordinary thread is its slice, nanoseconds."""


def short_slices() -> bool:
    """Have the calling thread, and those that it will start, run sooner when they wake up, and less long at a time.

    They get no more of the cores than before: a thread with a short slice only has its turn earlier. Linux does that
    since 6.12; before, and elsewhere, nothing changes.

    Returns:
        Whether the system took note; an older Linux does, and disregards it.
    """
    return _set_slice(1000 * SHORT_US)


def usual_slices() -> bool:
    """Undo `short_slices` for the calling thread, and those that it will start. Returns as that does."""
    return _set_slice(0)


def slice_us(thread: int = 0) -> float | None:
    """A thread's slice in microseconds, as Linux has it; ``None`` where it does not say. 0 before 6.12.

    Args:
        thread: its native id, of any process; 0: the calling one.
    """
    attributes = _call(_GET, thread, bytes(_ATTRIBUTES.size), _ATTRIBUTES.size, 0)
    return None if attributes is None else _ATTRIBUTES.unpack(attributes)[5] / 1000


def _set_slice(ns: int) -> bool:
    try:
        policy = os.sched_getscheduler(0)
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    except (AttributeError, OSError):  # not Linux, or a sandbox that does not tell
        return False
    if policy not in (os.SCHED_OTHER, os.SCHED_BATCH):  # somebody has decided otherwise
        return False
    return _call(_SET, 0, _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, ns, 0, 0), 0) is not None


def _call(which: int, thread: int, attributes: bytes, *more: int) -> bytes | None:
    """One of `_NUMBERS`: what it leaves in the attributes; ``None`` where it fails."""
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None or not hasattr(os, "sched_getscheduler"):
        return None
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    libc = ctypes.CDLL(None)
    failed = libc.syscall(ctypes.c_long(numbers[which]), thread, buffer, *map(ctypes.c_uint, more))
    return None if failed else buffer.raw
