"""What travels beside messages: a call's id, and when to come back."""

from __future__ import annotations

import itertools
import re
import secrets
from typing import Any

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.errors import QueueFull, VisionError

REQUEST_ID = "x-request-id"
RETRY_AFTER = "grpc-retry-pushback-ms"
"""gRPC's own name for "come back then" (gRFC A6); its built-in retries obey it too."""

_SERVICE = f"/{pb.DESCRIPTOR.services_by_name['VisionService'].full_name}"

PREDICT = f"{_SERVICE}/Predict"
"""Full name of the method that takes streams."""

MAX_MESSAGE = 4000
"""Longest message of an error, characters: gRPC carries it in a header, whose size has a hard limit."""

# A random number for each call would be a system call for each call; this one tells runs of the server apart.
_RUN = secrets.token_hex(4)
_NUMBERS = itertools.count(1)

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def request_id_of(metadata: Any) -> str:
    """The caller's request id where it is fit for a log, else a new one."""
    for key, value in metadata or ():
        if key == REQUEST_ID and isinstance(value, str) and _SAFE_ID.fullmatch(value):
            return value
    return f"{_RUN}{next(_NUMBERS):08x}"


def trailing_of(error: VisionError, request_id: str) -> tuple[tuple[str, str], ...]:
    """What goes with an error."""
    if isinstance(error, QueueFull):
        return (REQUEST_ID, request_id), (RETRY_AFTER, str(retry_after_ms(error)))
    return ((REQUEST_ID, request_id),)


def retry_after_ms(error: QueueFull) -> int:
    """When to come back, milliseconds from now, at least 1."""
    return max(1, round(1000 * error.retry_after_s))


def method_of(task: str) -> str:
    """Full name of the method for a task."""
    return f"{_SERVICE}/{task.capitalize()}"
