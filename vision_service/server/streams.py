"""Predict: many requests on one stream, each answered by itself.

What a call costs in gRPC is mostly its beginning and its end, headers and status, each of which wakes the event loop. A
request on a stream has neither, and requests that are sent together share a message, as do answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.engine.pipeline import Pipeline
from vision_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    QueueFull,
    VisionError,
)
from vision_service.server import codec, replies
from vision_service.server.access import AccessLog
from vision_service.server.arrivals import Arrivals
from vision_service.server.metadata import MAX_MESSAGE, PREDICT, method_of, request_id_of, retry_after_ms
from vision_service.server.refusals import gather
from vision_service.types import Result, Task

logger = logging.getLogger(__name__)

MAX_UNANSWERED = 1024
"""A stream with so many requests without an answer is not read further, and flow control slows its caller down: whoever
does not take answers in must not have the server keep them."""

MAX_UNWRITTEN_BYTES = 16 * 1024 * 1024
"""Nor is a stream with more than so many bytes of answers that its caller has not taken in."""

_MESSAGE_BYTES = 1024 * 1024
"""Answers that are done at one time share a message up to so many bytes; a larger one travels alone. gRPC's clients
take 4 MiB unless told otherwise."""

_AT_A_TIME = 16
"""So many requests of one message are begun before others have a turn on the event loop."""

_READ: dict[str, Callable[[Any], codec.Call]] = {
    Task.CLASSIFY: codec.read_classify,
    Task.DETECT: codec.read_detect,
    Task.SEGMENT: codec.read_segment,
    Task.TRANSLATE: codec.read_translate,
}


@dataclass(slots=True)
class _Request:
    """A request that has no answer yet.

    Attributes:
        number: its id, the caller's.
        kind: name of the task; empty where nothing is asked for.
        request_id: the server's.
        started_s: when it was read, on `time.perf_counter`'s clock.
        timeout_s: how long its answer may take.
        form: of the reply, and ``answer`` what will come; set once it was let in. ``answer`` leads back here, so it
            goes as soon as it has come or nobody waits for it.
        timer: of its deadline.
    """

    number: int
    kind: str
    request_id: str
    started_s: float
    timeout_s: float | None
    form: codec.ReplyForm | None = None
    answer: Future[Any] | None = None
    timer: asyncio.TimerHandle | None = None


class PredictStreams:
    """The streams of a server.

    Args:
        pipeline: where images go.
        access: where each request has its line.
    """

    def __init__(self, pipeline: Pipeline, access: AccessLog) -> None:
        self._pipeline = pipeline
        self._access = access
        self._arrivals = Arrivals()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Read no further requests; streams end once everything that was read is answered."""
        self._stopping.set()

    async def serve(self, context: Any) -> None:
        """Answer one stream until its caller or the server ends it.

        Args:
            context: gRPC's, of the stream.

        Raises:
            ModelUnavailable: the server is stopping.
        """
        await _Stream(self._pipeline, self._arrivals, self._access, context).run(self._stopping)


class _Stream:
    """One stream. Used on the event loop alone."""

    def __init__(self, pipeline: Pipeline, arrivals: Arrivals, access: AccessLog, context: Any) -> None:
        self._pipeline = pipeline
        self._arrivals = arrivals
        self._access = access
        self._context = context
        self._peer = context.peer()
        self._under_way: dict[int, _Request] = {}
        self._unwritten: deque[bytes] = deque()
        self._unwritten_bytes = 0
        self._news = asyncio.Event()  # something to write, or no more to come
        self._room = asyncio.Event()
        self._all_read = False

    async def run(self, stopping: asyncio.Event) -> None:
        """Read, answer and write until it is over."""
        reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((reader, writer, stop), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
            elif not writer.done():
                reader.cancel()  # what it may have had in hand has no answer, which its caller is told below
            self._all_read = True
            self._news.set()
            await writer
            if not reader.done() or reader.cancelled():
                raise ModelUnavailable(
                    "the server is stopping; send what has no answer again, on another stream, in a moment"
                )
        finally:
            for task in (reader, writer, stop):
                task.cancel()
            for request in list(self._under_way.values()):  # the caller has hung up
                self._forget(request)
                self._log(request, "CANCELLED")

    async def _read(self) -> None:
        while await self._take(await self._context.read()):
            pass  # and nothing here has a message while the next one is waited for

    async def _take(self, message: Any) -> bool:
        """Begin what is in a message; false when there was none any more."""
        if message is grpc.aio.EOF:
            return False
        for place, item in enumerate(message.items, 1):
            self._begin(item)
            while (
                len(self._under_way) + len(self._unwritten) >= MAX_UNANSWERED
                or self._unwritten_bytes > MAX_UNWRITTEN_BYTES
            ):
                self._room.clear()
                await self._room.wait()
            if place % _AT_A_TIME == 0:
                await asyncio.sleep(0)
        return True

    def _begin(self, item: pb.PredictItem) -> None:
        """Let a request in, or answer why not."""
        kind = item.WhichOneof("request") or ""
        if kind == "cancel":
            if (known := self._under_way.get(item.id)) is not None:
                self._forget(known)
                self._log(known, "CANCELLED")
            return
        timeout_s = self._timeout_s(item.timeout_ms)
        request = _Request(item.id, kind, request_id_of(None), time.perf_counter(), timeout_s)
        try:
            if not kind:
                raise InvalidInput("request", "is not set; set one of classify, detect, segment and translate")
            if request.number in self._under_way:
                raise InvalidInput("id", f"{request.number} is under way; number requests so that its answer is known")
            asked = getattr(item, kind)
            # Before the image is copied out of its message.
            self._pipeline.check_room_of(Task(kind), asked.model.name, asked.model.version)
            call = _READ[kind](asked)
            request.form = call.form
            request.answer = self._pipeline.submit(
                call.image,
                task=call.form.task,
                model=call.model.name,
                version=call.model.version,
                overrides=call.overrides,
                timeout_s=timeout_s,
                finish=partial(replies.write_reply, form=call.form),
                finish_needed=replies.takes_long,
            )
        except QueueFull as error:
            self._fail(request, error, work_done=False)
            gather(self._context, error)
            return
        except Exception as error:
            self._fail(request, error)
            return
        self._under_way[request.number] = request
        if item.timeout_ms:
            request.timer = asyncio.get_running_loop().call_later(item.timeout_ms / 1000, self._expire, request)
        self._arrivals.tell(request.answer, partial(self._arrived, request))

    def _timeout_s(self, timeout_ms: int) -> float | None:
        """How long a request may take, by itself and as part of the stream."""
        stream_s: float | None = self._context.time_remaining()
        if not timeout_ms:
            return stream_s
        return timeout_ms / 1000 if stream_s is None else min(timeout_ms / 1000, stream_s)

    def _forget(self, request: _Request) -> None:
        """Nobody waits for a request's answer any more."""
        del self._under_way[request.number]
        if request.timer is not None:
            request.timer.cancel()
        answer, request.answer = request.answer, None
        if answer is not None:
            answer.cancel()
        self._room.set()

    def _expire(self, request: _Request) -> None:
        self._forget(request)
        self._fail(
            request, DeadlineExceeded(f"the deadline of {request.timeout_s:g} s passed before there was an answer")
        )

    def _arrived(self, request: _Request, answer: Future[Any]) -> None:
        """Pass on what became of a request."""
        if answer.cancelled() or self._under_way.get(request.number) is not request:
            return  # it was cancelled when it was past cancelling, and its id may be another's by now
        del self._under_way[request.number]
        request.answer = None
        if request.timer is not None:
            request.timer.cancel()
        failure = answer.exception()
        if failure is not None:
            # Not raised: several requests may share it, and its traceback would hold the frames of them all.
            self._fail(request, failure)
            return
        try:
            result = answer.result()
            if isinstance(result, Result):
                assert request.form is not None, "it was let in"
                result = replies.write_reply(result, request.form)
        except Exception as error:
            self._fail(request, error)
        else:
            self._answer(request, {request.kind: result})
            self._log(request, "OK")

    def _fail(self, request: _Request, error: BaseException, *, work_done: bool = True) -> None:
        """Answer with an error.

        Args:
            request: which.
            error: why.
            work_done: whether work went into it; refusals without are many under overload, and are counted.
        """
        ours = (
            error
            if isinstance(error, VisionError)
            else InferenceFailed(f"internal error; the server's log has it as {request.request_id}")
        )
        if ours.status == "INTERNAL":
            logger.error("request %s failed", request.request_id, exc_info=error)
        failure = pb.PredictFailure(code=grpc.StatusCode[ours.status].value[0], message=str(ours)[:MAX_MESSAGE])
        if isinstance(ours, QueueFull):
            failure.retry_after_ms = retry_after_ms(ours)
        self._answer(request, {"failure": failure})
        if work_done:
            self._log(request, ours.status)
        else:
            self._access.refused(self._method(request), ours.status, request.request_id, self._peer)

    def _answer(self, request: _Request, answer: dict[str, Any]) -> None:
        # Serialised messages of one type, joined, are one that has what all of them have. So each is serialised once.
        written = pb.PredictAnswer(id=request.number, request_id=request.request_id, **answer)
        data = pb.PredictResponse(answers=[written]).SerializeToString()
        self._unwritten.append(data)
        self._unwritten_bytes += len(data)
        self._news.set()

    def _log(self, request: _Request, status: str) -> None:
        self._access.note(self._method(request), status, request.request_id, self._peer, request.started_s)

    @staticmethod
    def _method(request: _Request) -> str:
        """What the log calls it."""
        return method_of(request.kind) if request.kind in _READ else PREDICT

    async def _write(self) -> None:
        """Write answers, those that are there together."""
        while self._unwritten or self._under_way or not self._all_read:
            if not self._unwritten:
                self._news.clear()
                await self._news.wait()
                continue
            parts = [self._unwritten.popleft()]
            size = len(parts[0])
            while self._unwritten and size + len(self._unwritten[0]) <= _MESSAGE_BYTES:
                parts.append(self._unwritten.popleft())
                size += len(parts[-1])
            await self._context.write(b"".join(parts))
            self._unwritten_bytes -= size
            self._room.set()
