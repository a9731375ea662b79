"""The receiving half of a connection: what its frames mean to its streams, and how much may come.

RFC 9113, 4 to 6. Frames that ask for nothing are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vision_service.http2 import frames
from vision_service.http2.blocks import Block, HeaderBlocks
from vision_service.http2.fields import FieldReader, Malformed, Request
from vision_service.http2.frames import ConnectionFault, ErrorCode, StreamFault
from vision_service.http2.sender import Sender
from vision_service.http2.stream import Exchange, Stream

logger = logging.getLogger(__name__)

MAX_STREAMS = 4096
"""Streams that may be at work at one time on a connection, those included that were reset and whose exchange has not
ended yet: whoever resets what it asks for shall not have more under way than others (CVE-2023-44487, CVE-2025-8671)."""

MAX_UNSENT_BYTES = 256 * 1024 * 1024
"""With more than so many bytes of answers that are not on their way a connection begins no further streams. A batch of
large images for one client, who reads, stays below."""

CONNECTION_WINDOW = 16 * 1024 * 1024
"""Bytes that may be on their way to us on a connection."""

_MOST_IDLE_FRAMES = 1000
_IDLE_WINDOW_S = 10.0
"""So many frames that ask for nothing (pings, settings, empty ones, ...) may come in so many seconds between two that
do (CVE-2019-9511 to 9518)."""


class Receiver:
    """Takes in the frames of a connection. Used on the event loop alone.

    Args:
        peer: the client's address, for the log.
        sender: of the connection.
        clock: seconds, which never go back.
        open_stream: makes a stream of the connection, by its number.
        begin: makes what answers a request.

    Attributes:
        streams: those that are not closed, by number.
        at_work: how many are not closed, or their exchange has not ended.
        last_stream: the number of the last one that was looked at.
        accepting: whether streams are begun; what comes on others is dropped.
    """

    def __init__(
        self,
        peer: str,
        sender: Sender,
        clock: Callable[[], float],
        open_stream: Callable[[int], Stream],
        begin: Callable[[Stream, Request], Exchange],
    ) -> None:
        self._peer = peer
        self._sender = sender
        self._clock = clock
        self._open_stream = open_stream
        self._begin = begin
        self.streams: dict[int, Stream] = {}
        self.at_work = 0
        self.last_stream = 0
        self.accepting = True
        self._highest = 0  # number of a stream that was begun
        self._fields = FieldReader()
        self._blocks = HeaderBlocks()
        self._idle_frames = 0
        self._idle_since_s = 0.0
        self._window = CONNECTION_WINDOW

    def abort(self) -> None:
        """End all streams; nobody wants their answers."""
        for stream in list(self.streams.values()):
            stream.abort()

    def stop_accepting(self) -> None:
        """Begin no further streams."""
        self.accepting = False

    def forget(self, number: int) -> None:
        """A stream is closed."""
        del self.streams[number]

    def over(self) -> None:
        """A stream is closed and its exchange has ended."""
        self.at_work -= 1

    def replenish(self) -> None:
        """Let as much come as at the beginning, when half of it has come."""
        if self._window < CONNECTION_WINDOW // 2:
            self._sender.put(frames.window_update(0, CONNECTION_WINDOW - self._window))
            self._window = CONNECTION_WINDOW

    def take(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        """Take in a frame; what is wrong with a stream ends that stream.

        Raises:
            ConnectionFault: it has to end the connection.
        """
        try:
            self._take(kind, flags, number, payload)
        except StreamFault as fault:
            self._fail_stream(fault)
        except ConnectionFault:
            raise
        except Exception:
            if number not in self.streams:
                raise
            logger.exception("%s: stream %d failed", self._peer, number)
            self._fail_stream(StreamFault(number, ErrorCode.INTERNAL_ERROR, "internal error"))

    def _take(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if self._blocks.begun and kind != frames.CONTINUATION:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "header fields were begun and not ended")
        if kind == frames.DATA:
            self._take_data(flags, number, payload)
        elif kind == frames.HEADERS:
            self._take_block(number, self._blocks.begin(flags, number, payload))
        elif kind == frames.WINDOW_UPDATE:
            self._take_window(number, payload)
        elif kind == frames.RST_STREAM:
            self._take_reset(number, payload)
        else:
            self._count_idle()
            if kind == frames.CONTINUATION:
                self._take_block(number, self._blocks.go_on(flags, number, payload))
            elif kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
                self._take_of_connection(kind, flags, number, payload)
            elif kind == frames.PRIORITY:
                _check(number, len(payload), 5, "PRIORITY")
            elif kind == frames.PUSH_PROMISE:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients do not promise")

    def _count_idle(self) -> None:
        if self._sender.answered:
            self._sender.answered, self._idle_frames = False, 0
        now_s = self._clock()
        if now_s - self._idle_since_s > _IDLE_WINDOW_S:
            self._idle_since_s, self._idle_frames = now_s, 0
        self._idle_frames += 1
        if self._idle_frames > _MOST_IDLE_FRAMES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that ask for nothing")

    def _take_data(self, flags: int, number: int, payload: memoryview) -> None:
        self._window -= len(payload)
        if self._window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more content than the connection's window")
        stream = self.streams.get(number)
        if stream is None:
            if number == 0 or number > self._highest:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"DATA on stream {number}, which was not begun")
            if not payload:
                self._count_idle()
            return  # it was on its way when the stream ended
        if stream.remote_ended:
            raise StreamFault(number, ErrorCode.STREAM_CLOSED, "DATA after the end of the request")
        stream.receive_window -= len(payload)
        if stream.receive_window < 0:
            raise StreamFault(number, ErrorCode.FLOW_CONTROL_ERROR, "more content than the stream's window")
        data = payload
        if flags & frames.PADDED:
            data = frames.without_padding(payload, flags)
            stream.grant(len(payload) - len(data))
        assert stream.exchange is not None, "it is not closed"
        if data:
            self._idle_frames = 0
            stream.exchange.received(data)
        elif not flags & frames.END_STREAM:
            self._count_idle()
        if flags & frames.END_STREAM and not stream.closed:
            stream.remote_ended = True
            stream.exchange.ended()

    def _take_block(self, number: int, complete: Block | None) -> None:
        """All header fields of a request are there, or of its end; ``None``: not yet."""
        if complete is None:
            return
        flags, block = complete
        ends = bool(flags & frames.END_STREAM)
        stream = self.streams.get(number)
        if stream is not None:
            self._fields.skip(block)
            if stream.remote_ended:
                raise StreamFault(number, ErrorCode.STREAM_CLOSED, "HEADERS after the end of the request")
            if not ends:
                raise StreamFault(number, ErrorCode.PROTOCOL_ERROR, "a second block of header fields, not the last")
            stream.remote_ended = True
            assert stream.exchange is not None, "it is not closed"
            stream.exchange.ended()
            return
        if number <= self._highest or not self.accepting:  # of a stream that ended meanwhile, or came after GOAWAY
            if number <= self._highest:
                self._count_idle()
            self._highest = max(number, self._highest)
            self._fields.skip(block)
            return
        self._highest = self.last_stream = number
        try:
            request = self._fields.read(block)
        except Malformed as error:
            self._count_idle()
            raise StreamFault(number, error.code, str(error)) from None
        if self.at_work >= MAX_STREAMS or self._sender.unsent > MAX_UNSENT_BYTES:
            message = f"{self.at_work} streams are at work, {self._sender.unsent} bytes of answers are not taken in"
            raise StreamFault(number, ErrorCode.REFUSED_STREAM, message)
        self._idle_frames = 0
        self.at_work += 1
        stream = self.streams[number] = self._open_stream(number)
        stream.remote_ended = ends
        try:
            exchange = self._begin(stream, request)
        except BaseException:
            stream.release()
            raise
        if stream.closed:  # it was refused
            return
        stream.exchange = exchange
        if ends:
            exchange.ended()

    def _take_reset(self, number: int, payload: memoryview) -> None:
        _check(number, len(payload), 4, "RST_STREAM")
        stream = self.streams.get(number)
        if stream is not None:
            stream.abort()
        elif number > self._highest:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which was not begun")

    def _take_window(self, number: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        more = frames.UINT32.unpack(payload)[0] & frames.LARGEST_WINDOW
        if number == 0:
            self._sender.widen(more)
            self._sender.feed_waiting()
            return
        stream = self.streams.get(number)
        if stream is None:
            if number > self._highest:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {number}, not begun")
            return
        if more == 0:
            raise StreamFault(number, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by 0 bytes")
        stream.widen(more)
        stream.resume()

    def _take_of_connection(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if number != 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a frame of the connection on stream {number}")
        if kind == frames.PING:
            if len(payload) != 8:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
            if not flags & frames.ACK:
                self._sender.put(frames.frame(frames.PING, frames.ACK, 0, 8), bytes(payload))
        elif kind == frames.SETTINGS:
            if not flags & frames.ACK:
                self._set(frames.read_settings(bytes(payload)))
            elif payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement of settings has no payload")
        # GOAWAY: the client begins no more streams, and hangs up when it has what it wants.

    def _set(self, values: list[tuple[int, int]]) -> None:
        """The peer's settings; of several values of one the last counts."""
        for name, value in dict(values).items():
            self._sender.heed(name, value, self._most_granted)
        self._sender.put(frames.frame(frames.SETTINGS, frames.ACK, 0, 0))
        self._sender.feed_waiting()

    def _most_granted(self) -> int:
        return max((stream.granted for stream in self.streams.values()), default=0)

    def _fail_stream(self, fault: StreamFault) -> None:
        logger.debug("%s: stream %d: %s (%s)", self._peer, fault.stream, fault, fault.code.name)
        self._sender.put(frames.reset(fault.stream, fault.code))
        stream = self.streams.get(fault.stream)
        if stream is not None:
            stream.abort()


def _check(number: int, length: int, wanted: int, name: str) -> None:
    """Check a frame that has a size and belongs to a stream."""
    if number == 0:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{name} on the connection")
    if length != wanted:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"{name} of {length} bytes")
