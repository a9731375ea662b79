"""One connection of a client: reads its frames, keeps to its windows, and ends it where it breaks the rules.

Bounded are header fields (`fields.MAX_FIELDS_BYTES`), streams at work, frames that ask for nothing, and answers that a
peer does not take in (but for those that were being made when it stopped). Not bounded, as with gRPC's own servers, is
the sum of the requests that are there in part: that is `MAX_STREAMS` times what their exchanges take in.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from vision_service.http2 import frames
from vision_service.http2.fields import MAX_BLOCK_BYTES, MAX_FIELDS_BYTES, FieldReader, Malformed, Request
from vision_service.http2.frames import ConnectionFault, ErrorCode, StreamFault
from vision_service.http2.gather import Gatherer
from vision_service.http2.reader import MAX_FRAME_BYTES, FrameReader, NotHttp2
from vision_service.http2.sender import Sender
from vision_service.http2.stream import RECEIVE_WINDOW, Exchange, Stream

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

_PREFACE_S = 30.0
"""How long a client may take to say that it speaks HTTP/2."""

_LINGER_S, _MOST_LINGER_S = 1.0, 30.0
"""How long a peer may take to hang up when it was told that all is said: closing at once, with bytes of it unread, may
lose what was said last. And how long the last answers may take to get out."""

_SETTINGS = frames.settings(
    {
        frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        frames.INITIAL_WINDOW_SIZE: RECEIVE_WINDOW,
        frames.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
        frames.MAX_HEADER_LIST_SIZE: MAX_FIELDS_BYTES,
    }
) + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)

_NOT_HTTP2 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This port speaks gRPC: HTTP/2 without TLS, with prior knowledge.\n"
)


class Connection(asyncio.BufferedProtocol):
    """A connection. Used on the event loop alone.

    Args:
        buffer: where it reads into, `reader.READ_BYTES`; connections of one event loop may share it.
        begin: makes what answers a request.
        opened: called when the connection is there.
        closed: called when it is gone.

    Attributes:
        peer: the client's address, as gRPC writes it: ``ipv4:127.0.0.1:50051``, ``ipv6:%5B::1%5D:50051``.
        sender: its sending half; from `connection_made` on.
    """

    def __init__(
        self,
        buffer: memoryview,
        begin: Callable[[Stream, Request], Exchange],
        opened: Callable[[Connection], None],
        closed: Callable[[Connection], None],
    ) -> None:
        self._begin = begin
        self._opened = opened
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._gatherer: Gatherer
        self.sender: Sender
        self.peer = ""
        self._reader = FrameReader(buffer, self._greet, self._take_safely)
        self._fields = FieldReader()
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags and what there is of its header fields
        self._streams: dict[int, Stream] = {}
        self._highest = 0  # number of a stream that was begun
        self._last_stream = 0  # that was looked at
        self._at_work = 0
        self._greeted = False
        self._ending = False  # no further streams
        self._hung_up = False  # nothing is sent any more, and what is heard is dropped
        self._patient = True  # with a peer that goes on talking then
        self._heard = False  # something, since it was last asked whether to close
        self._idle_frames = 0
        self._idle_since_s = 0.0
        self._receive_window = CONNECTION_WINDOW
        self._timer: asyncio.TimerHandle | None = None

    # What the event loop calls

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._transport = transport
        self._gatherer = Gatherer(self.socket, self._loop)
        self.sender = Sender(transport, self._loop)
        self.peer = _peer(transport.get_extra_info("peername"))
        self._timer = self._loop.call_later(_PREFACE_S, transport.abort)
        self._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._ending = self._hung_up = True
        if self._timer is not None:
            self._timer.cancel()
        self.sender.drop()
        for stream in list(self._streams.values()):
            stream.abort()
        self._closed(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio."""
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        if self._hung_up:
            self._heard = self._patient
        elif self._read(nbytes):
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        """Go on with what was read, when others have had their turn."""
        if self._hung_up:
            return
        self._reader.room()
        if self._read(0):
            self._loop.call_soon(self._read_on)
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _read(self, size: int) -> bool:
        """Take in frames. Returns whether there are more already."""
        self.sender.hold()  # what they are answered with at once needs no turn of its own
        try:
            return self._read_frames(size)
        finally:
            self.sender.let_go()

    def _read_frames(self, size: int) -> bool:
        try:
            more = self._reader.read(size)
        except NotHttp2 as error:
            self._turn_away(error)
            return False
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
            return False
        except Exception:
            logger.exception("%s: a frame could not be taken in", self.peer)
            self._fail(ErrorCode.INTERNAL_ERROR, "internal error")
            return False
        if self._receive_window < CONNECTION_WINDOW // 2:
            self.sender.put(frames.window_update(0, CONNECTION_WINDOW - self._receive_window))
            self._receive_window = CONNECTION_WINDOW
        return more

    def pause_writing(self) -> None:
        """See asyncio."""
        self.sender.paused = True

    def resume_writing(self) -> None:
        """See asyncio."""
        self.sender.paused = False
        self.sender.feed_waiting()

    # What streams call

    def forget(self, number: int) -> None:
        """A stream is closed."""
        del self._streams[number]

    def gather(self, seconds: float) -> None:
        """Take in what comes in larger portions for so long, unless answers wait for a window; see `Gatherer`."""
        if not self.sender.unsent:
            self._gatherer.gather(seconds)

    def hurry(self) -> None:
        """An answer waits for a window, which may be on its way."""
        self._gatherer.stop()

    def stream_over(self) -> None:
        """A stream is closed and its exchange has ended."""
        self._at_work -= 1
        if self._ending and not self._streams:
            self._hang_up()

    # What the server calls

    def drain(self) -> None:
        """Take no further requests; hang up when those under way are answered."""
        if self._ending or self._transport is None:
            return
        self._ending = True
        if self._greeted:  # nothing comes before our settings
            self.sender.put(frames.goaway(self._last_stream, ErrorCode.NO_ERROR, "the server is stopping"))
        if not self._streams:
            self._hang_up()

    @property
    def socket(self) -> Any:
        """Its socket, for options."""
        return self._transport.get_extra_info("socket")

    def undelivered(self) -> int:
        """Bytes that the peer's system has not taken in yet: of answers, and of frames about the connection."""
        ours = int(self.sender.unsent + self._transport.get_write_buffer_size())
        return ours if self._transport.is_closing() else ours + _unacknowledged(self.socket)

    @property
    def in_use(self) -> bool:
        """Whether there is something to answer, or an answer on its way."""
        return bool(self._streams) or self.undelivered() > 0

    def abort(self) -> None:
        """Hang up, and forget what was not sent."""
        self._transport.abort()

    def close(self) -> None:
        """Hang up, whatever is under way."""
        self._ending, self._patient = True, False
        for stream in list(self._streams.values()):
            stream.abort()
        self._hang_up()

    def _hang_up(self) -> None:
        if not self._hung_up:
            self._hung_up = self._reader.stopped = True
            self._transport.resume_reading()  # what still comes is dropped; see `_LINGER_S`
            self.sender.end()
            self._loop.call_later(_LINGER_S, self._linger, self._loop.time() + _MOST_LINGER_S)

    def _linger(self, until_s: float) -> None:
        """Close once everything is out and the peer has gone quiet, at the latest when time is over."""
        if self._transport.is_closing():  # the peer was first
            return
        heard, self._heard = self._heard, False
        if self._loop.time() >= until_s:
            self._transport.abort()
        elif heard or self._transport.get_write_buffer_size() or _unacknowledged(self.socket):
            self._loop.call_later(_LINGER_S, self._linger, until_s)
        else:
            self._transport.close()

    def _greet(self) -> None:
        """The client has said that it speaks HTTP/2; what we say first are our settings (RFC 9113, 3.4)."""
        self._greeted = True
        self.sender.put(_SETTINGS)
        if self._timer is not None:
            self._timer.cancel()

    def _turn_away(self, error: NotHttp2) -> None:
        """The peer speaks something else."""
        logger.info("%s does not speak HTTP/2 without TLS: %s", self.peer, error)
        if error.got[:1].isalpha():  # HTTP/1, so a person may see it
            self._transport.write(_NOT_HTTP2)
        self._patient = False
        self._hang_up()

    def _fail(self, code: ErrorCode, message: str) -> None:
        """The peer has broken the rules."""
        logger.info("%s: %s (%s); hanging up", self.peer, message, code.name)
        self.sender.put(frames.goaway(self._last_stream, code, message))
        self.close()

    # Reading

    def _take_safely(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
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
            if number not in self._streams:
                raise
            logger.exception("%s: stream %d failed", self.peer, number)
            self._fail_stream(StreamFault(number, ErrorCode.INTERNAL_ERROR, "internal error"))

    def _take(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if self._block is not None and kind != frames.CONTINUATION:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "header fields were begun and not ended")
        if kind == frames.DATA:
            self._take_data(flags, number, payload)
        elif kind == frames.HEADERS:
            self._take_headers(flags, number, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._take_window(number, payload)
        elif kind == frames.RST_STREAM:
            self._take_reset(number, payload)
        else:
            self._count_idle()
            if kind == frames.CONTINUATION:
                self._take_continuation(flags, number, payload)
            elif kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
                self._take_of_connection(kind, flags, number, payload)
            elif kind == frames.PRIORITY:
                _check(number, len(payload), 5, "PRIORITY")
            elif kind == frames.PUSH_PROMISE:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "clients do not promise")

    def _count_idle(self) -> None:
        if self.sender.answered:
            self.sender.answered, self._idle_frames = False, 0
        now_s = self._loop.time()
        if now_s - self._idle_since_s > _IDLE_WINDOW_S:
            self._idle_since_s, self._idle_frames = now_s, 0
        self._idle_frames += 1
        if self._idle_frames > _MOST_IDLE_FRAMES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that ask for nothing")

    def _take_data(self, flags: int, number: int, payload: memoryview) -> None:
        self._receive_window -= len(payload)
        if self._receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more content than the connection's window")
        stream = self._streams.get(number)
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
        data = frames.without_padding(payload, flags)
        if len(data) != len(payload):
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

    def _take_headers(self, flags: int, number: int, payload: memoryview) -> None:
        if number % 2 == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client's streams have odd numbers, not {number}")
        block = frames.without_padding(payload, flags)
        if flags & frames.PRIORITISED:
            if len(block) < 5:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for their priority")
            block = block[5:]
        _check_block(len(block))
        if flags & frames.END_HEADERS:
            self._take_block(flags, number, bytes(block))
        else:
            self._block = number, flags, bytearray(block)

    def _take_continuation(self, flags: int, number: int, payload: memoryview) -> None:
        if self._block is None or self._block[0] != number:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first_flags, block = self._block
        block += payload
        _check_block(len(block))
        if flags & frames.END_HEADERS:
            self._block = None
            self._take_block(first_flags, number, bytes(block))

    def _take_block(self, flags: int, number: int, block: bytes) -> None:
        """All header fields of a request are there, or of its end."""
        ends = bool(flags & frames.END_STREAM)
        stream = self._streams.get(number)
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
        if number <= self._highest or self._ending:  # of a stream that ended meanwhile, or came after GOAWAY
            if number <= self._highest:
                self._count_idle()
            self._highest = max(number, self._highest)
            self._fields.skip(block)
            return
        self._highest = self._last_stream = number
        try:
            request = self._fields.read(block)
        except Malformed as error:
            self._count_idle()
            raise StreamFault(number, error.code, str(error)) from None
        if self._at_work >= MAX_STREAMS or self.sender.unsent > MAX_UNSENT_BYTES:
            message = f"{self._at_work} streams are at work, {self.sender.unsent} bytes of answers are not taken in"
            raise StreamFault(number, ErrorCode.REFUSED_STREAM, message)
        self._idle_frames = 0
        self._at_work += 1
        stream = self._streams[number] = Stream(self, self.sender, number)
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
        stream = self._streams.get(number)
        if stream is not None:
            stream.abort()
        elif number > self._highest:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {number}, which was not begun")

    def _take_window(self, number: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        more = frames.UINT32.unpack(payload)[0] & frames.LARGEST_WINDOW
        if number == 0:
            self.sender.widen(more)
            self.sender.feed_waiting()
            return
        stream = self._streams.get(number)
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
                self.sender.put(frames.frame(frames.PING, frames.ACK, 0, 8), bytes(payload))
        elif kind == frames.SETTINGS:
            if not flags & frames.ACK:
                self._set(frames.read_settings(bytes(payload)))
            elif payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement of settings has no payload")
        # GOAWAY: the client begins no more streams, and hangs up when it has what it wants.

    def _set(self, values: list[tuple[int, int]]) -> None:
        """The peer's settings; of several values of one the last counts."""
        for name, value in dict(values).items():
            self.sender.heed(name, value, self._most_granted)
        self.sender.put(frames.frame(frames.SETTINGS, frames.ACK, 0, 0))
        self.sender.feed_waiting()

    def _most_granted(self) -> int:
        return max((stream.granted for stream in self._streams.values()), default=0)

    def _fail_stream(self, fault: StreamFault) -> None:
        logger.debug("%s: stream %d: %s (%s)", self.peer, fault.stream, fault, fault.code.name)
        self.sender.put(frames.reset(fault.stream, fault.code))
        stream = self._streams.get(fault.stream)
        if stream is not None:
            stream.abort()


def _unacknowledged(endpoint: Any) -> int:
    """Bytes that the system still has of what was sent: closed now, it would drop them if the peer sent anything."""
    try:
        answer = fcntl.ioctl(endpoint.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)


def _check_block(length: int) -> None:
    """Check how long a header block is so far."""
    if length > MAX_BLOCK_BYTES:
        raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_BLOCK_BYTES} bytes of header fields")


def _check(number: int, length: int, wanted: int, name: str) -> None:
    """Check a frame that has a size and belongs to a stream."""
    if number == 0:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{name} on the connection")
    if length != wanted:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"{name} of {length} bytes")


def _peer(address: Any) -> str:
    if not isinstance(address, tuple):
        return f"unix:{address or ''}"
    host, port = address[:2]
    host = host.removeprefix("::ffff:") if "." in host else host  # of IPv4, on a socket for both
    return f"ipv6:{quote(f'[{host}]', safe=':')}:{port}" if ":" in host else f"ipv4:{host}:{port}"
