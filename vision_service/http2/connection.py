"""One connection of a client, from its first byte to hanging up; `receiver` takes in its frames, `sender` sends ours.

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
from vision_service.http2.fields import MAX_FIELDS_BYTES, Request
from vision_service.http2.frames import ConnectionFault, ErrorCode
from vision_service.http2.gather import Gatherer
from vision_service.http2.reader import MAX_FRAME_BYTES, FrameReader, NotHttp2
from vision_service.http2.receiver import CONNECTION_WINDOW, MAX_STREAMS, Receiver
from vision_service.http2.sender import Sender
from vision_service.http2.stream import RECEIVE_WINDOW, Exchange, Stream

logger = logging.getLogger(__name__)

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
        self._buffer = buffer
        self._begin = begin
        self._opened = opened
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._gatherer: Gatherer
        self._receiver: Receiver
        self._reader: FrameReader
        self.sender: Sender
        self.peer = ""
        self._greeted = False
        self._hung_up = False  # nothing is sent any more, and what is heard is dropped
        self._patient = True  # with a peer that goes on talking then
        self._heard = False  # something, since it was last asked whether to close
        self._timer: asyncio.TimerHandle | None = None

    # What the event loop calls

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._transport = transport
        self._gatherer = Gatherer(self.socket, self._loop)
        self.sender = Sender(transport, self._loop)
        self.peer = _peer(transport.get_extra_info("peername"))
        self._receiver = Receiver(
            self.peer, self.sender, self._loop.time, lambda number: Stream(self, self.sender, number), self._begin
        )
        self._reader = FrameReader(self._buffer, self._greet, self._receiver.take)
        self._timer = self._loop.call_later(_PREFACE_S, transport.abort)
        self._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._hung_up = True
        self._receiver.stop_accepting()
        if self._timer is not None:
            self._timer.cancel()
        self.sender.drop()
        self._receiver.abort()
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
        self._receiver.replenish()
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
        self._receiver.forget(number)

    def gather(self, seconds: float) -> None:
        """Take in what comes in larger portions for so long, unless answers wait for a window; see `Gatherer`."""
        if not self.sender.unsent:
            self._gatherer.gather(seconds)

    def hurry(self) -> None:
        """An answer waits for a window, which may be on its way."""
        self._gatherer.stop()

    def stream_over(self) -> None:
        """A stream is closed and its exchange has ended."""
        self._receiver.over()
        if not self._receiver.accepting and not self._receiver.streams:
            self._hang_up()

    # What the server calls

    def drain(self) -> None:
        """Take no further requests; hang up when those under way are answered."""
        if self._transport is None or not self._receiver.accepting:
            return
        self._receiver.stop_accepting()
        if self._greeted:  # nothing comes before our settings
            self.sender.put(frames.goaway(self._receiver.last_stream, ErrorCode.NO_ERROR, "the server is stopping"))
        if not self._receiver.streams:
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
        return bool(self._receiver.streams) or self.undelivered() > 0

    def abort(self) -> None:
        """Hang up, and forget what was not sent."""
        self._transport.abort()

    def close(self) -> None:
        """Hang up, whatever is under way."""
        self._patient = False
        self._receiver.stop_accepting()
        self._receiver.abort()
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
        self.sender.put(frames.goaway(self._receiver.last_stream, code, message))
        self.close()


def _unacknowledged(endpoint: Any) -> int:
    """Bytes that the system still has of what was sent: closed now, it would drop them if the peer sent anything."""
    try:
        answer = fcntl.ioctl(endpoint.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)


def _peer(address: Any) -> str:
    if not isinstance(address, tuple):
        return f"unix:{address or ''}"
    host, port = address[:2]
    host = host.removeprefix("::ffff:") if "." in host else host  # of IPv4, on a socket for both
    return f"ipv6:{quote(f'[{host}]', safe=':')}:{port}" if ":" in host else f"ipv4:{host}:{port}"
