"""Requests on a stream of Predict and their answers, as they travel and as they wait for each other. No gRPC calls."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.client.failures import AttemptFailed, Failure

W = TypeVar("W", bound="Future[Any] | asyncio.Future[Any]")

_STATUS_OF_CODE = {status.value[0]: status.name for status in grpc.StatusCode}

MESSAGE_BYTES = 512 * 1024
"""Requests share a message up to so many bytes; a larger one travels alone. With images of 114 kB four of them cost a
server 0.20 to 0.23 ms each where one alone costs 0.34 to 0.40, and eight gain no more."""

_TOO_LARGE = Failure("RESOURCE_EXHAUSTED", "larger than a message may be")


class StreamFailed(AttemptFailed):
    """The stream ended before it had an answer to a request, or cannot take it."""

    @property
    def tells_of_server(self) -> bool:
        """Whether a call would fail as well; otherwise the failure may be the stream's, or that of another request."""
        return self.failure.status == "UNAVAILABLE"


@dataclass(slots=True)
class _Request(Generic[W]):
    """A request without an answer.

    Attributes:
        message: as it travels; ``None`` once it was handed to gRPC.
        answer: what its caller waits for: a ``PredictAnswer`` or a `StreamFailed`.
    """

    message: bytes | None
    answer: W


@dataclass(slots=True)
class Requests(Generic[W]):
    """What has no answer yet on one stream. Threads need a lock around each use.

    Attributes:
        max_message_bytes: largest message.
    """

    max_message_bytes: int
    _by_id: dict[int, _Request[W]] = field(default_factory=dict, init=False)
    _unwritten: deque[int | bytes] = field(default_factory=deque, init=False)
    """In order: ids of requests, and cancellations as they travel. A request whose caller gives up before it was
    written is in the dictionary no more, so that it needs no memory and no time on the wire."""

    def add(self, number: int, message: bytes, answer: W) -> None:
        """Take in a request, to be written."""
        self._by_id[number] = _Request(message, answer)
        self._unwritten.append(number)

    def next_parts(self) -> list[bytes]:
        """What to write next. Joined these messages are one, which has the requests of all."""
        parts: list[bytes] = []
        size, most = 0, min(MESSAGE_BYTES, self.max_message_bytes)
        while self._unwritten:
            first = self._unwritten[0]
            request = None if isinstance(first, bytes) else self._by_id.get(first)
            part = first if isinstance(first, bytes) else request and request.message
            if part:
                size += len(part)
                if parts and size > most:
                    break
                parts.append(part)
                if request is not None:
                    request.message = None
            self._unwritten.popleft()
        return parts

    def forget(self, number: int) -> bool:
        """Wait for an answer no longer; whether there is a cancellation to be written, as the server may know of it."""
        request = self._by_id.pop(number, None)
        if request is None or request.message is not None:
            return False
        self._unwritten.append(_serialised(id=number, cancel=True))
        return True

    def answered(self, answers: Iterable[pb.PredictAnswer]) -> list[tuple[W, pb.PredictAnswer]]:
        """Who waited for these answers; an answer that nobody waits for any more is left out."""
        known = [(self._by_id.pop(answer.id, None), answer) for answer in answers]
        return [(request.answer, answer) for request, answer in known if request is not None]

    def give_up(self) -> list[W]:
        """Who waits still."""
        waiting = [request.answer for request in self._by_id.values()]
        self._by_id.clear()
        return waiting


def written(number: int, task: str, request: Any, timeout_s: float, max_message_bytes: int) -> bytes:
    """A request as it travels.

    Raises:
        StreamFailed: it is larger than a message may be. gRPC would end the stream for it, and all others on it fail.
    """
    # 0 would mean no deadline. The largest, `retry.LONGEST_S`, fits into 32 bits.
    message = _serialised(id=number, timeout_ms=max(1, int(1000 * timeout_s)), **{task: request})
    if len(message) > max_message_bytes:
        raise StreamFailed(_TOO_LARGE)
    return message


def _serialised(**fields: Any) -> bytes:
    """A message with one request, of these fields."""
    request = pb.PredictRequest()
    request.items.add(**fields)  # copies the image once; an item made beforehand would be copied again
    message: bytes = request.SerializeToString()
    return message


def read_answer(answer: pb.PredictAnswer | StreamFailed, task: str) -> tuple[Any, str]:
    """The reply to a request, and the request id.

    Raises:
        AttemptFailed: there is none.
    """
    if isinstance(answer, StreamFailed):
        raise answer
    kind = answer.WhichOneof("answer")
    if kind == task:
        return getattr(answer, kind), answer.request_id
    if kind != "failure":
        problem = f"the server's answer to {task} is {kind or 'empty'}"
        raise AttemptFailed(Failure("UNKNOWN", problem, request_id=answer.request_id))
    failure = answer.failure
    raise AttemptFailed(
        Failure(
            status=_STATUS_OF_CODE.get(failure.code, "UNKNOWN"),
            message=failure.message,
            pushback_ms=failure.retry_after_ms if failure.HasField("retry_after_ms") else None,
            request_id=answer.request_id,
        )
    )
