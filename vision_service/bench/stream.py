"""The load generator's connection for requests on streams of Predict."""

from __future__ import annotations

import struct
from collections import deque

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.bench.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    OK,
    GrpcConnection,
    Reply,
    frame,
    status_of,
)
from vision_service.errors import ModelUnavailable

_LENGTH = struct.Struct(">BL")

_FIRST_ID = 1 << 28
"""From here to 2**35 an id is a varint of five bytes."""


class StreamConnection(GrpcConnection):
    """One connection with one stream, which is open from the beginning. Not thread-safe.

    Requests are what is called here; the number of a request is its id.

    Args:
        address: ``host:port``.
        method: the full name, ``/vision.v1.VisionService/Predict``.

    Raises:
        ModelUnavailable: nobody answers there.
    """

    def __init__(self, address: str, method: str) -> None:
        self._waiting: deque[memoryview] = deque()
        self._arrived = bytearray()
        super().__init__(address, method)
        self._number = self._next_stream
        self._stream_window = self._first_window
        self._next_id = _FIRST_ID
        self._out += [frame(HEADERS, END_HEADERS, self._number, len(self._headers)), self._headers]
        self.flush()

    def prepare(self, message: bytes) -> bytes:
        """A serialised `PredictRequest` without an id, which comes when it is sent."""
        return message

    def start(self, prepared: bytes) -> int:
        """Send a request; else as `GrpcConnection.start`."""
        self._next_id += 1
        number = bytes([8, *(self._next_id >> shift & 127 | 128 for shift in (0, 7, 14, 21)), self._next_id >> 28])
        head = _LENGTH.pack(0, len(number) + len(prepared)) + number
        self._waiting += (memoryview(head), memoryview(prepared))
        self._feed_blocked()
        return self._next_id

    def _feed_blocked(self) -> None:
        left = sum(map(len, self._waiting))
        while (size := min(left, self._stream_window, self._window, self._max_frame)) > 0:
            self._out.append(frame(DATA, 0, self._number, size))
            self._stream_window -= size
            self._window -= size
            left -= size
            while size:
                part = self._waiting.popleft()
                if len(part) > size:
                    self._waiting.appendleft(part[size:])
                    part = part[:size]
                self._out.append(part)
                size -= len(part)

    def _widen(self, number: int, more: int) -> None:
        if number == self._number:
            self._stream_window += more

    def _widen_all(self, more: int) -> None:
        self._stream_window += more

    def _hear(self, kind: int, flags: int, number: int, payload: bytes, done: list[Reply]) -> None:
        """Take in answers.

        Raises:
            ModelUnavailable: the server ended the stream.
        """
        if kind == HEADERS and not flags & END_STREAM:
            return
        if kind != DATA:
            how = f"with status {status_of(payload)}" if kind == HEADERS else "by a reset"
            raise ModelUnavailable(f"{self._address}: the server ended the stream {how}")
        self._read += len(payload)
        self._arrived += payload
        at = 0
        while len(self._arrived) - at >= _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(self._arrived, at)[1]
            if len(self._arrived) < end:
                break
            response = pb.PredictResponse.FromString(bytes(self._arrived[at + _LENGTH.size : end]))
            done += map(_reply, response.answers)
            at = end
        del self._arrived[:at]


def _reply(answer: pb.PredictAnswer) -> Reply:
    """An answer as the call would have had it."""
    kind = answer.WhichOneof("answer")
    if kind is None or kind == "failure":
        return Reply(answer.id, answer.failure.code, b"")
    return Reply(answer.id, OK, getattr(answer, kind).SerializeToString())
