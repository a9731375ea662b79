"""A unary gRPC client that costs next to nothing, for the load generator alone.

On a small machine the generator shares the cores with the server, and what it uses is missing there: gRPC's own
Python clients take 0.36 to 0.55 ms of CPU a call, which is several percent of what a small network takes. Here requests
are serialised before the clock starts, framed by copying nothing, and replies are parsed after it stops.

Frames and their flags: RFC 9113; header fields without a dynamic table: RFC 7541, 6.2.2; what gRPC puts in them:
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. No TLS, no continuation frames.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vision_service.errors import ModelUnavailable
from vision_service.http2.frames import (
    ACK,
    DATA,
    DEFAULT_MAX_FRAME,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    PING,
    PREFACE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    UINT32,
    WINDOW_UPDATE,
    frame,
    settings,
    window_update,
)

OK, INTERNAL, UNAVAILABLE = 0, 13, 14
"""Numbers of gRPC's statuses, where this file makes one up."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How a call ended.

    Attributes:
        stream: what `GrpcConnection.start` returned.
        status: gRPC's number, 0 is OK.
        body: the response message, serialised; empty unless OK.
        retry_after_ms: when the server wants to be asked again, if it said so.
    """

    stream: int
    status: int
    body: bytes
    retry_after_ms: int | None = None


@dataclass(slots=True)
class _Stream:
    """A call under way: what is still to be sent, how much of it the server takes, what has come."""

    unsent: memoryview
    window: int
    body: bytearray


class GrpcConnection:
    """One connection to one method. Not thread-safe.

    Args:
        address: ``host:port``.
        method: the full name, such as ``/vision.v1.VisionService/Classify``.

    Raises:
        ModelUnavailable: nobody answers there.
    """

    def __init__(self, address: str, method: str) -> None:
        self._address = address
        host, _, port = address.rpartition(":")
        try:
            self._socket = socket.create_connection((host or "localhost", int(port)), timeout=30)
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"{address}: {error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._headers = _request_headers(address, method)
        self._next_stream = 1
        self._streams: dict[int, _Stream] = {}
        self._blocked: deque[int] = deque()  # streams with bytes that no window lets through
        self._window = DEFAULT_WINDOW
        self._first_window = DEFAULT_WINDOW
        self._max_frame = DEFAULT_MAX_FRAME
        self._read = 0  # bytes of DATA that the server was not yet told to be read
        self._buffer = bytearray()
        self._out: list[bytes | memoryview] = []
        wanted = {HEADER_TABLE_SIZE: 0, ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: LARGEST_WINDOW}
        self._out += [PREFACE, settings(wanted), window_update(0, LARGEST_WINDOW - DEFAULT_WINDOW)]
        self.flush()

    def prepare(self, message: bytes) -> bytes:
        """A serialised message as gRPC sends it: not compressed, its length, itself."""
        return b"\0" + UINT32.pack(len(message)) + message

    def start(self, prepared: bytes) -> int:
        """Begin a call; `flush` sends it.

        Args:
            prepared: from `prepare`.

        Returns:
            The number that its `Reply` will have.
        """
        number = self._next_stream
        self._next_stream += 2
        self._streams[number] = _Stream(memoryview(prepared), self._first_window, bytearray())
        self._out += [frame(HEADERS, END_HEADERS, number, len(self._headers)), self._headers]
        self._feed(number)
        return number

    def flush(self) -> None:
        """Send what was begun.

        Raises:
            ModelUnavailable: the connection broke.
        """
        buffers: list[memoryview] = [memoryview(part) for part in self._out]
        self._out.clear()
        try:
            while buffers:
                sent = self._socket.sendmsg(buffers[:512])
                done = 0
                while done < len(buffers) and sent >= len(buffers[done]):
                    sent -= len(buffers[done])
                    done += 1
                del buffers[:done]
                if sent:
                    buffers[0] = buffers[0][sent:]
        except OSError as error:
            raise ModelUnavailable(f"{self._address}: the connection broke: {error}") from None

    def replies(self, timeout_s: float) -> list[Reply]:
        """Calls that ended; waits for the first one.

        Args:
            timeout_s: how long to wait; then there may be none.

        Raises:
            ModelUnavailable: the connection broke.
        """
        done: list[Reply] = []
        if self._poll.poll(max(0.0, 1000 * timeout_s)):
            try:
                arrived = self._socket.recv(1 << 20)
            except OSError as error:
                raise ModelUnavailable(f"{self._address}: the connection broke: {error}") from None
            if not arrived:
                raise ModelUnavailable(f"{self._address}: the server closed the connection")
            self._buffer += arrived
            self._parse(done)
        if self._out:
            self.flush()
        return done

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _feed(self, number: int) -> None:
        """Queue as much of a call's message as the windows let through."""
        stream = self._streams[number]
        while stream.unsent:
            size = min(len(stream.unsent), stream.window, self._window, self._max_frame)
            if size <= 0:
                self._blocked.append(number)
                return
            last = size == len(stream.unsent)
            self._out += [frame(DATA, END_STREAM if last else 0, number, size), stream.unsent[:size]]
            stream.unsent = stream.unsent[size:]
            stream.window -= size
            self._window -= size

    def _feed_blocked(self) -> None:
        for _ in range(len(self._blocked)):
            number = self._blocked.popleft()
            if number in self._streams:
                self._feed(number)

    def _parse(self, done: list[Reply]) -> None:
        buffer, at, opened = self._buffer, 0, False
        while len(buffer) - at >= 9:
            high, low, kind, flags, number = FRAME.unpack_from(buffer, at)
            end = at + 9 + (high << 8 | low)
            if len(buffer) < end:
                break
            payload = bytes(buffer[at + 9 : end])
            at = end
            if kind in (DATA, HEADERS, RST_STREAM):
                self._hear(kind, flags, number, payload, done)
            else:
                opened |= self._manage(kind, flags, number, payload)
        del buffer[:at]
        if opened:
            self._feed_blocked()
        if self._read > LARGEST_WINDOW // 2:
            self._out.append(window_update(0, self._read))
            self._read = 0

    def _hear(self, kind: int, flags: int, number: int, payload: bytes, done: list[Reply]) -> None:
        """Take in what belongs to a call."""
        self._read += len(payload) if kind == DATA else 0
        stream = self._streams.get(number)
        if stream is None:
            return
        if kind == RST_STREAM:
            del self._streams[number]
            done.append(Reply(number, UNAVAILABLE, b""))
        elif kind == DATA:
            stream.body += payload
        elif flags & END_STREAM:
            del self._streams[number]
            status = status_of(payload)
            if status == OK:
                done.append(Reply(number, OK, bytes(stream.body[5:])))
            else:
                done.append(Reply(number, status, b"", _number_in(payload, b"grpc-retry-pushback-ms")))

    def _manage(self, kind: int, flags: int, number: int, payload: bytes) -> bool:
        """Take in what belongs to the connection. Returns whether more may be sent now."""
        if kind == SETTINGS and not flags & ACK:
            for name, value in SETTING.iter_unpack(payload):
                if name == INITIAL_WINDOW_SIZE:
                    self._widen_all(value - self._first_window)
                    self._first_window = value
                elif name == MAX_FRAME_SIZE:
                    self._max_frame = value
            self._out.append(frame(SETTINGS, ACK, 0, 0))
            return True
        if kind == PING and not flags & ACK:
            self._out += [frame(PING, ACK, 0, 8), payload]
        elif kind == GOAWAY:
            raise ModelUnavailable(f"{self._address}: the server hung up: {payload[8:].decode(errors='replace')}")
        elif kind == WINDOW_UPDATE:
            more = UINT32.unpack(payload)[0]
            if number == 0:
                self._window += more
            else:
                self._widen(number, more)
            return True
        return False

    def _widen(self, number: int, more: int) -> None:
        """A call may send more."""
        if number in self._streams:
            self._streams[number].window += more

    def _widen_all(self, more: int) -> None:
        """Every call may send more, or less."""
        for stream in self._streams.values():
            stream.window += more


def _request_headers(authority: str, method: str) -> bytes:
    """The fields of every request, as RFC 7541 writes them: two from the static table, the others as they are."""
    fields: Sequence[tuple[bytes, str]] = (
        (b"\x04", method),  # :path
        (b"\x01", authority),
        (b"\x0f\x10", "application/grpc"),  # content-type
        (b"\x00\x02te", "trailers"),
    )
    return b"\x83\x86" + b"".join(name + _text(value) for name, value in fields)


def _text(value: str) -> bytes:
    if len(value) > 126:
        raise ValueError(f"{value!r} is too long for a header of this client")
    return bytes([len(value)]) + value.encode("ascii")


def status_of(trailers: bytes) -> int:
    """The number of a status in a block of header fields, which has no dynamic table."""
    status = _number_in(trailers, b"grpc-status")
    return INTERNAL if status is None else status


def _number_in(trailers: bytes, name: bytes) -> int | None:
    """The value of a field, if it is there and a number."""
    _, found, rest = trailers.partition(name)
    digits = rest[1 : 1 + rest[0]] if found and rest else b""
    return int(digits) if digits.isdigit() else None
