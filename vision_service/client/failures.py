"""What a failed gRPC call tells, as data, and as the error class that the server raised."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vision_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    ResourceExhausted,
    SetupError,
    VisionError,
)

PUSHBACK_KEY = "grpc-retry-pushback-ms"
REQUEST_ID_KEY = "x-request-id"

_FIELD = re.compile(r"([a-z][a-z0-9_.]*): (.*)", re.DOTALL)

_PLAIN: dict[str, type[VisionError]] = {
    "NOT_FOUND": ModelNotFound,
    "UNAVAILABLE": ModelUnavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "FAILED_PRECONDITION": SetupError,
    "INTERNAL": InferenceFailed,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt.

    Attributes:
        status: name of the gRPC status code.
        message: as the server, or gRPC itself, wrote it.
        pushback_ms: when the server wants to be asked again; ``None``: it did not say; negative: never.
        request_id: what the server's log calls the call; empty when it never got there.
    """

    status: str
    message: str
    pushback_ms: int | None = None
    request_id: str = ""


class AttemptFailed(Exception):
    """An attempt failed. It stays inside the client, which tries again or raises what `to_error` makes of it.

    Args:
        failure: what is known.
        cause: the ``grpc.RpcError`` behind it, where there is one.
    """

    def __init__(self, failure: Failure, cause: BaseException | None = None) -> None:
        super().__init__(f"{failure.status}: {failure.message}")
        self.failure = failure
        self.__cause__ = cause


def failure_of(error: Any) -> Failure:
    """What an RPC's error tells.

    Args:
        error: a ``grpc.RpcError`` raised by a call, sync or async.
    """
    trailing = tuple(error.trailing_metadata() or ())
    return Failure(
        status=error.code().name,
        message=error.details() or "",
        pushback_ms=_pushback_ms(trailing),
        request_id=request_id_in(error.initial_metadata() or (), trailing),
    )


def request_id_in(*metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The request id in a reply's metadata, or an empty text."""
    return next((str(value) for pairs in metadata for key, value in pairs if key == REQUEST_ID_KEY), "")


def to_error(failure: Failure, address: str, attempts: int = 1) -> VisionError:
    """The error that the server raised, as far as its status tells.

    Args:
        failure: of the last attempt.
        address: the server's.
        attempts: how many were made.

    Returns:
        The error, its message as the server wrote it. It has the attributes ``request_id`` and ``address``, which a
        note repeats for whoever reads a traceback.
    """
    error = _error(failure)
    error.request_id, error.address = failure.request_id, address
    request = f", request {failure.request_id}" if failure.request_id else ""
    error.add_note(f"{failure.status} from {address}{request}, attempt {attempts}")
    return error


def _error(failure: Failure) -> VisionError:
    message = failure.message
    if failure.status == "INVALID_ARGUMENT":
        named = _FIELD.fullmatch(message)
        field, problem = (named[1], named[2]) if named else ("", message)
        is_image = field == "image" or field.startswith("image.")
        return InvalidImage(problem, field) if is_image else InvalidInput(field, problem)
    if failure.status == "RESOURCE_EXHAUSTED":
        if failure.pushback_ms is None or failure.pushback_ms < 0:
            return ResourceExhausted(message)
        return QueueFull(message, retry_after_s=failure.pushback_ms / 1e3)
    if failure.status in _PLAIN:
        return _PLAIN[failure.status](message)
    return VisionError(f"{failure.status}: {message}")


def _pushback_ms(metadata: Iterable[tuple[str, str | bytes]]) -> int | None:
    """The server's wish; one that is no number means "do not retry", as gRPC's own retries (gRFC A6) read it."""
    for key, value in metadata:
        if key == PUSHBACK_KEY:
            try:
                return int(value)
            except ValueError:
                return -1
    return None
