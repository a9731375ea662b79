"""One call: reads its messages, runs its handler, and sends what becomes of it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from vision_service.http2.fields import STATUS_200, Request, write_fields
from vision_service.http2.fields import write_status as write_http_status
from vision_service.http2.frames import ErrorCode
from vision_service.http2.stream import Stream
from vision_service.rpc.messages import ACCEPTED, MessageReader, StatusError, framed
from vision_service.rpc.metadata import (
    CONTENT_TYPE,
    Metadata,
    read_metadata,
    timeout_s,
    write_metadata,
    write_status,
)

logger = logging.getLogger(__name__)

_CONTENT_TYPE = re.compile(rb"application/grpc($|[+;])")

_FIELDS = STATUS_200 + write_fields(
    [(b"content-type", CONTENT_TYPE.encode()), (b"grpc-accept-encoding", ACCEPTED.encode())]
)
"""What a response begins with."""

_STATUSES: dict[Any, grpc.StatusCode] = {code: code for code in grpc.StatusCode} | {
    code.value[0]: code for code in grpc.StatusCode
}
"""Statuses by themselves and by their numbers."""

_MOST_OF_AN_ERROR = 1000
"""Characters of an unforeseen error that callers are told."""

_NO_MESSAGE = "the call has no message, or not a whole one"


class CallDetails:
    """What a generic handler is asked with; as `grpc.HandlerCallDetails`."""

    __slots__ = ("invocation_metadata", "method")

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class Call:
    """A call under way, and the context that its handler is given.

    It has those methods of `grpc.aio.ServicerContext` that servicers on an event loop need: not those about the peer's
    identity (there is no TLS) nor about compressing replies.

    Args:
        stream: its stream.
        peer: who calls, as gRPC writes it.
        max_bytes: largest message in either direction.
        over: called when its handler has ended; the answer may still be on its way.
    """

    def __init__(self, stream: Stream, peer: str, max_bytes: int, over: Callable[[Call], None]) -> None:
        self._stream = stream
        self._peer = peer
        self._max_bytes = max_bytes
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._metadata: Metadata = ()
        self._until_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._handler: Any = None
        self._reader: MessageReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._running = False  # its task has begun; one that is cancelled before never does
        self._messages: deque[tuple[bytes, bool]] = deque()  # each, and whether it is compressed
        self._taken = 0  # bytes that the peer was not yet told to have been taken
        self._all_there = False
        self._news: asyncio.Future[None] | None = None  # a message, or the end of them
        self._drained: asyncio.Future[None] | None = None
        self._begun = False
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._initial: Metadata = ()
        self._trailing: Metadata = ()
        self._when_done: list[Callable[[Any], None]] = []

    # What the context of a handler has

    def invocation_metadata(self) -> Metadata:
        """The caller's metadata."""
        return self._metadata

    def peer(self) -> str:
        """Who calls."""
        return self._peer

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline, if there is one."""
        return None if self._until_s is None else max(0.0, self._until_s - self._loop.time())

    def set_code(self, code: grpc.StatusCode | int) -> None:
        """The status that the call ends with, unless it is aborted."""
        self._code = _STATUSES[code]

    def code(self) -> grpc.StatusCode | None:
        """The status that was set."""
        return self._code

    def set_details(self, details: str) -> None:
        """The message of that status."""
        self._details = details

    def details(self) -> str:
        """The message that was set."""
        return self._details

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """What goes with the status."""
        self._trailing = trailing_metadata

    def trailing_metadata(self) -> Metadata:
        """What was set."""
        return self._trailing

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Begin the response with metadata."""
        self._initial = initial_metadata
        self._begin()

    def gather(self, seconds: float) -> None:
        """Take in what this call's connection brings in larger portions for so long.

        For calls that are refused, of which more are coming: each would wake the event loop. Nothing waits longer than
        that. It has no effect if it was not asked for a moment ago as well. gRPC's own contexts do not have it.
        """
        self._stream.gather(seconds)

    async def abort(self, code: grpc.StatusCode | int, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with a status.

        Raises:
            grpc.aio.AbortError: always.
        """
        self._code, self._details = _STATUSES[code], details
        if trailing_metadata:
            self._trailing = trailing_metadata
        raise grpc.aio.AbortError(details)

    def cancelled(self) -> bool:
        """Whether the caller has gone, or its deadline passed."""
        return self._stream.closed and not self.done()

    def done(self) -> bool:
        """Whether the handler has ended."""
        return self._task is None or self._task.done()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call something with this context when the call is over."""
        self._when_done.append(callback)

    async def read(self) -> Any:
        """The next message of a stream of requests; `grpc.aio.EOF` when there are no more."""
        while not self._messages:
            if self._all_there or self._stream.closed:
                return grpc.aio.EOF
            self._news = self._loop.create_future()
            await self._news
        try:
            return await self._next_message()
        except StatusError as error:  # the caller's fault, not the handler's
            self._stop_with(error.code, str(error))
            await asyncio.sleep(0)  # where the handler hears that its call was cancelled
            return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        """Send a message of a stream of responses; waits until the caller takes it."""
        self._begin()
        if not self._stream.send(self._serialized(message)):
            self._drained = self._loop.create_future()
            await self._drained

    # What the stream tells

    def start(self, request: Request, find: Callable[[CallDetails], grpc.RpcMethodHandler | None]) -> None:
        """The request's header fields are there.

        Args:
            request: they.
            find: the handler for a method.
        """
        fields = dict(request.fields)
        content_type = fields.get("content-type", b"")
        if request.method != "POST" or not _CONTENT_TYPE.match(content_type):
            self._stream.finish(write_http_status(405 if request.method != "POST" else 415))
            self._end()
            return
        try:
            left_s = self._read_fields(request, fields)
            self._handler = find(CallDetails(request.path, self._metadata))
            if self._handler is None:
                raise StatusError(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {request.path[:200]!r} here")
            at_once = getattr(self._handler, "answer_at_once", None)
            if at_once is not None:
                self._answer_at_once(at_once)
                return
            encoding = fields.get("grpc-encoding", b"identity").decode("latin-1")
            self._reader = MessageReader(encoding, self._max_bytes, self._arrived)
        except StatusError as error:
            self._stop_with(error.code, str(error))
        except Exception:
            logger.exception("no handler could be found for a call of %s", request.path)
            self._stop_with(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")
        else:
            if left_s is not None:
                self._timer = self._loop.call_later(left_s, self._expire)
            if self._handler.request_streaming:
                self._run(self._answer_stream, self._handler.stream_stream or self._handler.stream_unary)

    def _answer_at_once(self, answer: Callable[[Any], None]) -> None:
        """Have a status set by something that needs no message, and send it."""
        try:
            answer(self)
            self._finish(self._code or grpc.StatusCode.OK, self._details)
        except Exception as error:
            self._failed(error)
        self._end()

    def _failed(self, error: Exception) -> None:
        logger.error("the handler of a call failed", exc_info=error)
        self._finish(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}"[:_MOST_OF_AN_ERROR])

    def _read_fields(self, request: Request, fields: dict[str, bytes]) -> float | None:
        """Take metadata and the deadline. Returns seconds until then, if there is one."""
        try:
            self._metadata = read_metadata(request.fields)
            timeout = fields.get("grpc-timeout")
            left_s = None if timeout is None else timeout_s(timeout.decode("latin-1"))
        except ValueError as error:
            raise StatusError(grpc.StatusCode.INTERNAL, str(error)) from None
        if left_s is not None:
            self._until_s = self._loop.time() + left_s
        return left_s

    def received(self, data: memoryview) -> None:
        """See `Exchange`."""
        if self._reader is None or self._stream.closed:
            return
        self._taken += len(data)
        try:
            self._reader.take(data)
        except StatusError as error:
            self._stop_with(error.code, str(error))
            return
        if len(self._messages) < 2:  # one may be on its way to whoever reads
            self._grant()

    def ended(self) -> None:
        """See `Exchange`."""
        self._all_there = True
        if self._reader is None:
            return
        if not self._reader.between or (not self._handler.request_streaming and not self._messages):
            self._stop_with(grpc.StatusCode.INTERNAL, _NO_MESSAGE)
            return
        self._tell()
        if not self._handler.request_streaming and self._task is None:
            handler = self._handler
            self._run(self._answer_one, handler.unary_unary or handler.unary_stream)

    def drained(self) -> None:
        """See `Exchange`."""
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def closed(self, *, aborted: bool) -> None:
        """See `Exchange`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if aborted:
            self._cancel()

    def _cancel(self) -> None:
        """Stop the handler."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            if self._running:
                return  # it ends by itself
        self._end()

    def stop(self) -> None:
        """The server does not wait for this call any longer."""
        self._stop_with(grpc.StatusCode.UNAVAILABLE, "the server was stopped before the call was answered")

    # How it goes

    def _arrived(self, message: bytes, compressed: bool) -> None:
        if not self._handler.request_streaming and self._messages:
            raise StatusError(grpc.StatusCode.INTERNAL, "more than one message, where the method takes one")
        self._messages.append((message, compressed))
        self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _grant(self) -> None:
        taken, self._taken = self._taken, 0
        if taken:
            self._stream.grant(taken)

    def _expire(self) -> None:
        self._stop_with(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _stop_with(self, code: grpc.StatusCode, message: str) -> None:
        """End the call, whatever its handler does."""
        if not self._stream.closed:
            self._finish(code, message)
            if not self._stream.closed:  # something before it is not on its way
                self._stream.reset(ErrorCode.CANCEL)
        self._cancel()

    def _run(self, answer: Callable[[Any], Awaitable[None]], method: Callable[[Any, Any], Any]) -> None:
        """Have a task answer. `_cancel` alone may cancel it before it has begun: nothing else would end the call."""
        self._task = self._loop.create_task(self._guarded(answer, method))

    async def _guarded(self, answer: Callable[[Any], Awaitable[None]], method: Callable[[Any, Any], Any]) -> None:
        """Run what answers, and send how it ended."""
        self._running = True
        try:
            await answer(method)
            self._finish(self._code or grpc.StatusCode.OK, self._details)
        except asyncio.CancelledError:
            self._finish(grpc.StatusCode.CANCELLED, "the call was cancelled on the server")
            raise
        except grpc.aio.AbortError:
            self._finish(self._code or grpc.StatusCode.UNKNOWN, self._details)
        except StatusError as error:
            self._finish(error.code, str(error))
        except Exception as error:
            self._failed(error)
        finally:
            self._end()

    async def _answer_one(self, method: Callable[[Any, Any], Any]) -> None:
        request = await self._next_message()
        answering = method(request, self)
        del request
        await self._send_answers(answering, streaming=self._handler.response_streaming)

    async def _answer_stream(self, method: Callable[[Any, Any], Any]) -> None:
        await self._send_answers(method(self._requests(), self), streaming=self._handler.response_streaming)

    async def _send_answers(self, answering: Any, *, streaming: bool) -> None:
        if hasattr(answering, "__aiter__"):
            async for message in answering:
                await self.write(message)
            return
        reply = await answering
        if streaming or self._code not in (None, grpc.StatusCode.OK):
            return  # it has written its messages, or has none
        message = self._serialized(reply)
        self._begin()
        self._stream.send(message)

    async def _requests(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def _next_message(self) -> Any:
        message, compressed = self._messages.popleft()
        if not self._messages:
            self._grant()
        if compressed:
            assert self._reader is not None, "it is there until the call has ended"
            message = await self._loop.run_in_executor(None, self._reader.inflated, message)
        if self._handler.request_deserializer is None:
            return message
        try:
            return self._handler.request_deserializer(message)
        except Exception as error:
            raise StatusError(grpc.StatusCode.INTERNAL, f"the message is not the method's: {error}") from None

    def _serialized(self, message: Any) -> bytes:
        serialize = self._handler.response_serializer
        data: bytes = message if serialize is None else serialize(message)
        if len(data) > self._max_bytes:
            text = f"Sent message larger than max ({len(data)} vs. {self._max_bytes}); see max_message_bytes"
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return framed(data)

    def _begin(self) -> None:
        """Begin the response, once."""
        if not self._begun:
            fields = _FIELDS + write_metadata(self._initial) if self._initial else _FIELDS  # the former may fail
            self._begun = True
            self._stream.send_fields(fields)

    def _finish(self, code: grpc.StatusCode, message: str) -> None:
        """End the response, if there is one to end."""
        if self._stream.closed:
            return
        try:
            fields = write_status(code, message) + write_metadata(self._trailing)
        except Exception:
            logger.exception("the trailing metadata of a call cannot be sent")
            fields = write_status(grpc.StatusCode.INTERNAL, "trailing metadata cannot be sent; the server's log has it")
        self._stream.finish(fields if self._begun else _FIELDS + fields)

    def _end(self) -> None:
        """Nothing is to be done any more; the answer may still be on its way, for as long as the deadline allows."""
        if self._stream.closed and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._messages.clear()
        self._reader = None
        self._over(self)
        self._stream.release()
        callbacks, self._when_done = self._when_done, []
        for callback in callbacks:
            self._loop.call_soon(callback, self)
