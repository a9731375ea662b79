"""Predictions as requests on one stream of Predict instead of a call each, waiting and not waiting.

Both classes open their stream at the first request and open another after one has ended. Each request has an id, by
which its answer is known, and waits for that answer alone. One message is written at a time, and requests that come in
the meantime share the next.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.client.failures import AttemptFailed, Failure, failure_of

W = TypeVar("W", bound="Future[Any] | asyncio.Future[Any]")

Metadata = tuple[tuple[str, str], ...]

_PREDICT = f"/{pb.DESCRIPTOR.services_by_name['VisionService'].full_name}/Predict"
_STATUS_OF_CODE = {status.value[0]: status.name for status in grpc.StatusCode}

MESSAGE_BYTES = 512 * 1024
"""Requests share a message up to so many bytes; a larger one travels alone. With images of 114 kB four of them cost a
server 0.20 to 0.23 ms each where one alone costs 0.34 to 0.40, and eight gain no more."""

_LATE = Failure("DEADLINE_EXCEEDED", "Deadline Exceeded")
_CLOSED = Failure("CANCELLED", "Channel closed!")
_TOO_LARGE = Failure("RESOURCE_EXHAUSTED", "larger than a message may be")
_ENDED = Failure("UNAVAILABLE", "the server ended the stream before it had answered")


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
class _Requests(Generic[W]):
    """What has no answer yet on one stream. Threads need a lock around each use.

    Attributes:
        most_bytes: requests share a message up to so many.
    """

    most_bytes: int
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
        size = 0
        while self._unwritten:
            first = self._unwritten[0]
            request = None if isinstance(first, bytes) else self._by_id.get(first)
            part = first if isinstance(first, bytes) else request and request.message
            if part:
                size += len(part)
                if parts and size > self.most_bytes:
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


@dataclass(slots=True)
class _Open:
    """One stream of the waiting client.

    Attributes:
        requests: what has no answer.
        news: there is something to write, or the stream has ended. Its lock is the client's.
        ended: nothing more is written.
    """

    requests: _Requests[Future[Any]]
    news: threading.Condition
    ended: bool = False


class PredictStream:
    """Sends requests on a stream and waits for their answers. Threads share it.

    Args:
        channel: of ``grpc``.
        metadata: sent when a stream is opened.
        max_message_bytes: largest request.

    Attributes:
        usable: false once a server was met that has no Predict.
    """

    def __init__(self, channel: Any, metadata: Metadata, max_message_bytes: int) -> None:
        self._predict = _method(channel)
        self._metadata = metadata
        self._max_message_bytes = max_message_bytes
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._open: _Open | None = None
        self._reader: threading.Thread | None = None
        self._closed = False
        self.usable = True

    def ask(self, task: str, request: Any, timeout_s: float) -> tuple[Any, str]:
        """Send a request and wait for its answer.

        Args:
            task: its name.
            request: as the method of that name takes it.
            timeout_s: how long to wait, seconds.

        Returns:
            The reply and the request id.

        Raises:
            StreamFailed: the stream ended before there was an answer, or the request is larger than a message may be.
            AttemptFailed: there is a failure instead of a result, or no answer in time.
        """
        number = next(self._ids)
        message = _written(number, task, request, timeout_s, self._max_message_bytes)
        waiting: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise StreamFailed(_CLOSED)
            opened = self._open or self._open_another()
            opened.requests.add(number, message, waiting)
            opened.news.notify()
        del message  # gRPC is to be the last to have it
        try:
            answer = waiting.result(timeout_s)
        except TimeoutError:
            raise AttemptFailed(_LATE) from None
        finally:
            with self._lock:
                if opened.requests.forget(number):
                    opened.news.notify()
        return _read_answer(answer, task)

    def stop(self) -> None:
        """Open no further stream. What waits is told when the channel is closed."""
        with self._lock:
            self._closed = True

    def join(self) -> None:
        """Wait for the end of the stream, once its channel is closed."""
        if self._reader is not None:
            self._reader.join()

    def _open_another(self) -> _Open:
        requests: _Requests[Future[Any]] = _Requests(min(MESSAGE_BYTES, self._max_message_bytes))
        opened = _Open(requests, threading.Condition(self._lock))
        call = self._predict(self._messages(opened), metadata=self._metadata)
        self._reader = threading.Thread(target=self._read, args=(opened, call), name="predict-stream", daemon=True)
        self._reader.start()
        self._open = opened
        return opened

    def _messages(self, opened: _Open) -> Iterator[bytes]:
        """What is to be written, as it comes. Runs on a thread of gRPC's, which ends with it."""
        while True:
            with opened.news:
                while not (parts := opened.requests.next_parts()) and not opened.ended:
                    opened.news.wait()
            if not parts:
                return
            message = b"".join(parts)
            del parts
            yield message
            del message

    def _read(self, opened: _Open, call: Any) -> None:
        """Hand out answers until the stream ends, and then its failure to all who have none."""
        failure, cause = _ENDED, None
        try:
            for response in call:
                with self._lock:
                    answered = opened.requests.answered(response.answers)
                for waiting, answer in answered:
                    waiting.set_result(answer)
        except grpc.RpcError as error:
            failure, cause = failure_of(error), error
        finally:
            with self._lock:
                if self._open is opened:
                    self._open = None
                if failure.status == "UNIMPLEMENTED":
                    self.usable = False
                unanswered = opened.requests.give_up()
                opened.ended = True
                opened.news.notify()
            for waiting in unanswered:
                waiting.set_result(StreamFailed(failure, cause))


@dataclass(slots=True)
class _AsyncOpen:
    """One stream of the client for event loops.

    Attributes:
        call: gRPC's.
        requests: what has no answer.
        news: there is something to write.
    """

    call: Any
    requests: _Requests[asyncio.Future[Any]]
    news: asyncio.Event = field(default_factory=asyncio.Event)


class AsyncPredictStream:
    """As `PredictStream`, on an event loop."""

    def __init__(self, channel: Any, metadata: Metadata, max_message_bytes: int) -> None:
        self._predict = _method(channel)
        self._metadata = metadata
        self._max_message_bytes = max_message_bytes
        self._ids = itertools.count(1)
        self._open: _AsyncOpen | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.usable = True

    async def ask(self, task: str, request: Any, timeout_s: float) -> tuple[Any, str]:
        """See `PredictStream.ask`. When the waiting coroutine is cancelled, so is the request on the server."""
        number = next(self._ids)
        message = _written(number, task, request, timeout_s, self._max_message_bytes)
        if self._closed:
            raise StreamFailed(_CLOSED)
        opened = self._open or self._open_another()
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        opened.requests.add(number, message, waiting)
        opened.news.set()
        del message  # gRPC is to be the last to have it
        try:
            async with asyncio.timeout(timeout_s):
                answer = await waiting
        except TimeoutError:
            raise AttemptFailed(_LATE) from None
        finally:
            if opened.requests.forget(number):
                opened.news.set()
        return _read_answer(answer, task)

    async def close(self) -> None:
        """End the stream; whoever waits is cancelled, as gRPC does with calls under way on a channel that is closed."""
        self._closed = True
        if self._open is not None:
            self._open.call.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _open_another(self) -> _AsyncOpen:
        requests: _Requests[asyncio.Future[Any]] = _Requests(min(MESSAGE_BYTES, self._max_message_bytes))
        self._open = opened = _AsyncOpen(self._predict(metadata=self._metadata), requests)
        writer = asyncio.ensure_future(self._write(opened))
        reader = asyncio.ensure_future(self._read(opened, writer))
        for running in (writer, reader):
            self._tasks.add(running)
            running.add_done_callback(self._tasks.discard)
        return opened

    async def _write(self, opened: _AsyncOpen) -> None:
        """Write what there is, one message at a time: nobody else may, and cancelling a write ends the stream."""
        try:
            while True:
                while not (parts := opened.requests.next_parts()):
                    opened.news.clear()
                    await opened.news.wait()
                message = b"".join(parts)
                del parts
                await opened.call.write(message)
                del message
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the stream has ended, and its reader learns why

    async def _read(self, opened: _AsyncOpen, writer: asyncio.Task[None]) -> None:
        """Hand out answers until the stream ends, and then its failure to all who have none."""
        failure, cause, cancelled = _ENDED, None, False
        try:
            while (response := await opened.call.read()) is not grpc.aio.EOF:
                for waiting, answer in opened.requests.answered(response.answers):
                    if not waiting.done():  # cancelled just now
                        waiting.set_result(answer)
        except grpc.RpcError as error:
            failure, cause = failure_of(error), error
        except asyncio.CancelledError:  # by close(), or with the event loop's end
            cancelled = True
            raise
        finally:
            writer.cancel()
            if self._open is opened:
                self._open = None
            if failure.status == "UNIMPLEMENTED":
                self.usable = False
            for waiting in opened.requests.give_up():
                if cancelled:
                    waiting.cancel()
                elif not waiting.done():
                    waiting.set_result(StreamFailed(failure, cause))


def _method(channel: Any) -> Any:
    """Predict, for requests that are serialised already: protobuf tells their size by doing just that."""
    return channel.stream_stream(_PREDICT, response_deserializer=pb.PredictResponse.FromString)


def _written(number: int, task: str, request: Any, timeout_s: float, max_message_bytes: int) -> bytes:
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


def _read_answer(answer: pb.PredictAnswer | StreamFailed, task: str) -> tuple[Any, str]:
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
