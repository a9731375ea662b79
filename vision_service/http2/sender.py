"""The sending half of a connection: what waits for the socket, and for the peer's windows (RFC 9113, 5.2 and 6.9)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vision_service.http2 import frames
from vision_service.http2.frames import ConnectionFault, ErrorCode

if TYPE_CHECKING:
    from vision_service.http2.stream import Stream

logger = logging.getLogger(__name__)

_WRITE_BYTES = 1024 * 1024
"""So many bytes of content are handed to the socket in one go, for all streams together."""

_AT_A_TIME = 64
"""So many streams have their turn before the event loop does something else."""

_MOST_UNREAD = 8 * 1024 * 1024
"""Bytes that a peer may leave unread. Content stops long before, so it is answers to frames that it goes on sending."""


class Sender:
    """What is sent on a connection. Used on the event loop alone.

    Args:
        transport: asyncio's.
        loop: the event loop.

    Attributes:
        first_window: how much of each stream the peer takes beside what it grants that stream, bytes.
        unsent: bytes of answers that wait for their turn or for a window, of all streams.
        paused: whether the socket takes no more for now.
        answered: whether something that was asked for was sent; for whoever sets it back.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._out: list[bytes | memoryview] = []
        self._content = 0
        self._flush_due = False
        self._held = False
        self._waiting: dict[Stream, None] = {}  # for their turn, in order
        self._blocked: dict[Stream, None] = {}  # by their own windows
        self._turn_due = False
        self._most_granted = 0  # at least what any stream was granted beyond what it sent
        self._window = frames.DEFAULT_WINDOW
        self._max_frame = frames.DEFAULT_MAX_FRAME
        self._before_block = b""
        self._ended = False
        self.first_window = frames.DEFAULT_WINDOW
        self.unsent = 0
        self.paused = False
        self.answered = False

    def put(self, *parts: bytes | memoryview) -> None:
        """Send frames, soon: those that are put until the event loop's next turn, or until `let_go`, go together."""
        self._out.extend(parts)
        if not self._flush_due and not self._held:
            self._flush_due = True
            self._loop.call_soon(self._flush_in_turn)

    def _flush_in_turn(self) -> None:
        self._flush_due = False
        self.flush()

    def hold(self) -> None:
        """More is put soon, and then `let_go` is called, which sends it."""
        self._held = True

    def let_go(self) -> None:
        """Send what was put, at once."""
        self._held = False
        if self._out:
            self.flush()

    def put_fields(self, number: int, block: bytes, *, end: bool) -> None:
        """Send header fields, in as many frames as they need."""
        self.answered = True
        block, self._before_block = self._before_block + block, b""
        flags = frames.END_STREAM if end else 0
        first, rest = block[: self._max_frame], block[self._max_frame :]
        self.put(frames.frame(frames.HEADERS, flags | (0 if rest else frames.END_HEADERS), number, len(first)), first)
        while rest:
            part, rest = rest[: self._max_frame], rest[self._max_frame :]
            self.put(frames.frame(frames.CONTINUATION, 0 if rest else frames.END_HEADERS, number, len(part)), part)

    def put_data(self, number: int, data: memoryview) -> None:
        """Send content, at most `sendable` bytes."""
        self.answered = True
        self._window -= len(data)
        self.unsent -= len(data)
        self._content += len(data)
        self.put(frames.frame(frames.DATA, 0, number, len(data)), data)

    def sendable(self) -> int:
        """Bytes of content that may be sent in a frame now, on whichever stream; none while the peer does not read."""
        if self.paused:
            return 0
        return min(self._window, self._max_frame, _WRITE_BYTES - self._content)

    def wait_for_turn(self, stream: Stream) -> None:
        """Call a stream's `resume` once more may be sent on the connection."""
        self._waiting[stream] = None

    def wait_for_window(self, stream: Stream) -> None:
        """Call a stream's `resume` once the peer takes more of every stream; what it grants this one alone it knows."""
        self._blocked[stream] = None

    def forget(self, stream: Stream, unsent: int) -> None:
        """A stream is closed, waits for nothing, and has so many bytes that nobody wants any more."""
        self._waiting.pop(stream, None)
        self._blocked.pop(stream, None)
        self.unsent -= unsent

    def feed_waiting(self) -> None:
        """More may be sent: let streams that wait have their turn, some now and the others soon."""
        for _ in range(min(len(self._waiting), _AT_A_TIME)):
            if self.sendable() <= 0 or not self._waiting:
                return
            stream = next(iter(self._waiting))
            del self._waiting[stream]
            stream.resume()
        if self._waiting and not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_due = False
        self.feed_waiting()

    def note_granted(self, granted: int) -> None:
        """A stream has so much more than `first_window`."""
        self._most_granted = max(self._most_granted, granted)

    def widen(self, more: int) -> None:
        """The peer takes more on the connection.

        Raises:
            ConnectionFault: by nothing, or more than a window can have.
        """
        if more == 0 or self._window + more > frames.LARGEST_WINDOW:
            code = ErrorCode.FLOW_CONTROL_ERROR if more else ErrorCode.PROTOCOL_ERROR
            raise ConnectionFault(code, f"WINDOW_UPDATE by {more} bytes")
        self._window += more

    def heed(self, name: int, value: int, granted: Callable[[], int]) -> None:
        """A setting of the peer's.

        Args:
            name: which.
            value: its value.
            granted: the most that any stream has been granted beyond what it sent; asked only where it may be too much.

        Raises:
            ConnectionFault: a window is more than a window can have (RFC 9113, 6.9.2).
        """
        if name == frames.INITIAL_WINDOW_SIZE:
            if value + self._most_granted > frames.LARGEST_WINDOW:
                self._most_granted = granted()
            if value + self._most_granted > frames.LARGEST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window is larger than 2^31-1 bytes")
            if value > self.first_window and self._blocked:
                self._waiting.update(self._blocked)
                self._blocked.clear()
            self.first_window = value
        elif name == frames.MAX_FRAME_SIZE:
            self._max_frame = value
        elif name == frames.HEADER_TABLE_SIZE:
            # We use no dynamic table, and say so where the peer makes its smaller (RFC 7541, 4.2).
            self._before_block = b"\x20"

    def flush(self) -> None:
        """Hand what there is to the socket."""
        parts, self._out, self._content = self._out, [], 0
        if not parts or self._ended or self._transport.is_closing():
            return
        self._transport.write(b"".join(parts))
        if self._transport.get_write_buffer_size() > _MOST_UNREAD:
            logger.warning("a client goes on sending and does not read; hanging up")
            self._transport.abort()
            return
        self.feed_waiting()

    def end(self) -> None:
        """Send what there is, and nothing after it."""
        self.flush()
        if not self._ended and not self._transport.is_closing():
            self._ended = True
            with suppress(OSError):  # the peer has gone already
                self._transport.write_eof()

    def drop(self) -> None:
        """Forget what was not sent."""
        self._out.clear()
        self._waiting.clear()
        self._blocked.clear()
