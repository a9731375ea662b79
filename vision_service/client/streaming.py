"""Predictions as requests on one stream of Predict instead of a call each, waiting and not waiting.

Both classes open their stream at the first request and open another after one has ended. Each request has an id, by
which its answer is known, and waits for that answer alone. One message is written at a time, and requests that come in
the meantime share the next.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.client.failures import AttemptFailed, Failure, failure_of
from vision_service.client.unanswered import Requests, StreamFailed, read_answer, written

Metadata = tuple[tuple[str, str], ...]

_PREDICT = f"/{pb.DESCRIPTOR.services_by_name['VisionService'].full_name}/Predict"

_LATE = Failure("DEADLINE_EXCEEDED", "Deadline Exceeded")
_CLOSED = Failure("CANCELLED", "Channel closed!")
_ENDED = Failure("UNAVAILABLE", "the server ended the stream before it had answered")


@dataclass(slots=True)
class _Open:
    """One stream of the waiting client.

    Attributes:
        requests: what has no answer.
        news: there is something to write, or the stream has ended. Its lock is the client's.
        ended: nothing more is written.
    """

    requests: Requests[Future[Any]]
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
        message = written(number, task, request, timeout_s, self._max_message_bytes)
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
        return read_answer(answer, task)

    def stop(self) -> None:
        """Open no further stream. What waits is told when the channel is closed."""
        with self._lock:
            self._closed = True

    def join(self) -> None:
        """Wait for the end of the stream, once its channel is closed."""
        if self._reader is not None:
            self._reader.join()

    def _open_another(self) -> _Open:
        requests: Requests[Future[Any]] = Requests(self._max_message_bytes)
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
    requests: Requests[asyncio.Future[Any]]
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
        message = written(number, task, request, timeout_s, self._max_message_bytes)
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
        return read_answer(answer, task)

    async def close(self) -> None:
        """End the stream; whoever waits is cancelled, as gRPC does with calls under way on a channel that is closed."""
        self._closed = True
        if self._open is not None:
            self._open.call.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _open_another(self) -> _AsyncOpen:
        requests: Requests[asyncio.Future[Any]] = Requests(self._max_message_bytes)
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
