"""One stream of a connection: what is still to be sent, and how much may be sent and received (RFC 9113, 5)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from vision_service.http2.frames import LARGEST_WINDOW, ErrorCode, StreamFault, reset, window_update
from vision_service.http2.sender import Sender

if TYPE_CHECKING:
    from vision_service.http2.connection import Connection

RECEIVE_WINDOW = 1024 * 1024
"""So many bytes of a stream may come before somebody has wanted them: most images come in one go."""


class Exchange(Protocol):
    """What answers the request on a stream. Called on the event loop, and returns soon."""

    def received(self, data: memoryview) -> None:
        """A part of the request's content, valid during this call alone. Who has taken it in calls `Stream.grant`."""

    def ended(self) -> None:
        """The request is there."""

    def drained(self) -> None:
        """Everything that was to be sent is on its way."""

    def closed(self, *, aborted: bool) -> None:
        """Nothing can be sent any more: all of the answer is on its way, or, aborted, nobody wants it."""


class Stream:
    """A request and its response. Used on the event loop alone.

    Args:
        connection: whose stream it is.
        sender: of the connection.
        number: its number.

    Attributes:
        exchange: what answers, from when the request's header fields are read until the stream is closed.
        remote_ended: whether the peer has sent all.
        closed: whether nothing will be sent any more.
    """

    __slots__ = (
        "_connection",
        "_granted",
        "_released",
        "_sender",
        "_trailers",
        "_ungranted",
        "_unsent",
        "closed",
        "exchange",
        "number",
        "receive_window",
        "remote_ended",
    )

    def __init__(self, connection: Connection, sender: Sender, number: int) -> None:
        self._connection = connection
        self._sender = sender
        self.number = number
        self.exchange: Exchange | None = None
        self.remote_ended = False
        self.closed = False
        self.receive_window = RECEIVE_WINDOW
        self._released = False
        self._granted = 0  # beside the sender's `first_window`, less what was sent
        self._ungranted = 0
        self._unsent: deque[memoryview] = deque()
        self._trailers: bytes | None = None

    @property
    def peer(self) -> str:
        """Who is on the other end."""
        return self._connection.peer

    def send_fields(self, block: bytes) -> None:
        """Begin the response with header fields, of which more may follow as `send`, and `finish`."""
        if not self.closed:
            self._sender.put_fields(self.number, block, end=False)

    def send(self, data: bytes) -> bool:
        """Send a part of the response's content, as far as the peer takes it; the rest by and by.

        Args:
            data: at least one byte.

        Returns:
            Whether all of it is on its way; otherwise `Exchange.drained` will be called.
        """
        if self.closed:
            return True
        self._unsent.append(memoryview(data))
        self._sender.unsent += len(data)
        return self.feed()

    def finish(self, block: bytes) -> None:
        """End the response, when what was to be sent before is on its way.

        Args:
            block: its trailing fields, or all of its fields when there is no content.
        """
        if not self.closed:
            self._trailers = block
            self.feed()

    def gather(self, seconds: float) -> None:
        """See `Connection.gather`, of its connection."""
        self._connection.gather(seconds)

    def reset(self, code: ErrorCode) -> None:
        """End the stream as it is."""
        if not self.closed:
            self._sender.put(reset(self.number, code))
            self._close(aborted=True)

    def release(self) -> None:
        """Its exchange does nothing any more. Until then the stream counts as one of those that are at work."""
        if not self._released:
            self._released = True
            if self.closed:
                self._connection.stream_over()

    def grant(self, size: int) -> None:
        """So many bytes of the request were taken in, and the peer may send as many more."""
        self._ungranted += size
        if self._ungranted >= RECEIVE_WINDOW // 2 and not (self.remote_ended or self.closed):
            self._sender.put(window_update(self.number, self._ungranted))
            self.receive_window += self._ungranted
            self._ungranted = 0

    def feed(self) -> bool:
        """Send what the windows let through. Returns whether nothing is left."""
        sender, unsent = self._sender, self._unsent
        while unsent:
            data = unsent[0]
            sendable = sender.sendable()
            size = min(len(data), sender.first_window + self._granted, sendable)
            if size <= 0:
                if sendable <= 0:
                    sender.wait_for_turn(self)
                else:
                    sender.wait_for_window(self)
                self._connection.hurry()
                return False
            sender.put_data(self.number, data[:size])
            self._granted -= size
            if size == len(data):
                unsent.popleft()
            else:
                unsent[0] = data[size:]
        if self._trailers is not None and not self.closed:
            sender.put_fields(self.number, self._trailers, end=True)
            if not self.remote_ended:
                # The response is complete, and the rest of the request is of no use (RFC 9113, 8.1).
                sender.put(reset(self.number, ErrorCode.NO_ERROR))
            self._close(aborted=False)
        return True

    def resume(self) -> None:
        """There may be room again."""
        if self._unsent and self.feed() and self.exchange is not None:
            self.exchange.drained()

    @property
    def granted(self) -> int:
        """What the peer takes beside the sender's `first_window`, less what was sent, bytes."""
        return self._granted

    def widen(self, more: int) -> None:
        """The peer takes more.

        Raises:
            StreamFault: more than a window can have (RFC 9113, 6.9.1).
        """
        self._granted += more
        if self._sender.first_window + self._granted > LARGEST_WINDOW:
            raise StreamFault(self.number, ErrorCode.FLOW_CONTROL_ERROR, "the window is larger than 2^31-1 bytes")
        self._sender.note_granted(self._granted)

    def abort(self) -> None:
        """The peer has reset the stream or gone."""
        if not self.closed:
            self._close(aborted=True)

    def _close(self, *, aborted: bool) -> None:
        exchange, self.exchange = self.exchange, None  # the two know each other
        self.closed = True
        unsent = sum(map(len, self._unsent))
        self._unsent.clear()
        self._trailers = None
        self._sender.forget(self, unsent)
        self._connection.forget(self.number)
        if self._released:
            self._connection.stream_over()
        if exchange is not None:
            exchange.closed(aborted=aborted)
