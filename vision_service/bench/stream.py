"""The load generator's connection for requests on streams of Predict."""

from __future__ import annotations

import struct
from collections import deque

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.bench.http2 import OK, GrpcConnection, Reply, status_of
from vision_service.client.unanswered import MESSAGE_BYTES
from vision_service.errors import ModelUnavailable
from vision_service.http2.frames import DATA, END_HEADERS, END_STREAM, HEADERS, frame

_LENGTH = struct.Struct(">BL")

_FIRST_ID = 1 << 28
"""From here to 2**35 an id is a varint of five bytes."""

_ITEM, _ID, _ID_BYTES = b"\x0a", b"\x08", 6
"""Tags of `PredictRequest.items` and `PredictItem.id`, and the length of an id with its tag."""


class StreamConnection(GrpcConnection):
    """One connection with one stream, which is open from the beginning. Not thread-safe.

    Requests are what is called here; the number of a request is its id. As the clients do, it sends together what was
    begun by the time that it may send.

    Args:
        address: ``host:port``.
        method: the full name, ``/vision.v1.VisionService/Predict``.

    Raises:
        ModelUnavailable: nobody answers there.
    """

    def __init__(self, address: str, method: str) -> None:
        self._begun: deque[tuple[bytes, bytes]] = deque()
        self._waiting: deque[memoryview] = deque()  # the rest of the message that is being sent
        self._left = 0
        self._arrived = bytearray()
        super().__init__(address, method)
        self._number = self._next_stream
        self._stream_window = self._first_window
        self._next_id = _FIRST_ID
        self._out += [frame(HEADERS, END_HEADERS, self._number, len(self._headers)), self._headers]
        self.flush()

    def prepare(self, message: bytes) -> bytes:
        """A serialised `PredictItem` without an id, which comes when it is begun."""
        return message

    def start(self, prepared: bytes) -> int:
        """Begin a request; else as `GrpcConnection.start`."""
        self._next_id += 1
        head = _ITEM + _varint(_ID_BYTES + len(prepared)) + _ID + _varint(self._next_id)
        self._begun.append((head, prepared))
        return self._next_id

    def flush(self) -> None:
        """As `GrpcConnection.flush`."""
        self._feed_blocked()
        super().flush()

    def _feed_blocked(self) -> None:
        while self._waiting or self._begun:
            if not self._waiting:
                self._next_message()
            size = min(self._left, self._stream_window, self._window, self._max_frame)
            if size <= 0:
                return
            self._out.append(frame(DATA, 0, self._number, size))
            self._stream_window -= size
            self._window -= size
            self._left -= size
            while size:
                part = self._waiting.popleft()
                if len(part) > size:
                    self._waiting.appendleft(part[size:])
                    part = part[:size]
                self._out.append(part)
                size -= len(part)

    def _next_message(self) -> None:
        """Make a message of what was begun."""
        parts: list[bytes] = []
        size = 0
        while self._begun and (not parts or size + sum(map(len, self._begun[0])) <= MESSAGE_BYTES):
            parts += self._begun.popleft()
            size += len(parts[-2]) + len(parts[-1])
        self._waiting += map(memoryview, (_LENGTH.pack(0, size), *parts))
        self._left = _LENGTH.size + size

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


def _varint(number: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first; the last byte alone has no high bit."""
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def _reply(answer: pb.PredictAnswer) -> Reply:
    """An answer as the call would have had it."""
    kind = answer.WhichOneof("answer")
    if kind is None or kind == "failure":
        said = answer.failure.HasField("retry_after_ms")
        return Reply(answer.id, answer.failure.code, b"", answer.failure.retry_after_ms if said else None)
    return Reply(answer.id, OK, getattr(answer, kind).SerializeToString())
