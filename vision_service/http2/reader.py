"""Cuts what comes on a connection into frames (RFC 9113, 3.4 and 4)."""

from __future__ import annotations

from collections.abc import Callable

from vision_service.http2 import frames
from vision_service.http2.frames import ConnectionFault, ErrorCode

READ_BYTES = 512 * 1024
"""Most that is read in one go; the largest frame has room in it as a whole, for the sake of those with padding."""

MAX_FRAME_BYTES = 256 * 1024
"""Largest frame: an image in one costs a third less than in frames of 16 kB. Content is taken in as it comes; other
frames, and those with padding, have to be there as a whole."""


_AT_A_TIME = 1000
"""So many frames of one connection are taken in before the event loop does something else: half a megabyte may be fifty
thousand of them."""


class NotHttp2(Exception):
    """The peer speaks something else.

    Args:
        got: how it began.
    """

    def __init__(self, got: bytes) -> None:
        super().__init__(f"it began with {got[:16]!r}")
        self.got = got


class FrameReader:
    """Frames of one connection.

    Args:
        buffer: where it is read into, `READ_BYTES`; readers that take turns may share it.
        greet: called when the preface is there, before any frame.
        take: called with each frame: type, flags, stream and payload, which is valid during the call alone. Content may
            come in several pieces, of which the last one has the flags.

    Attributes:
        stopped: whether no further frames are wanted.
    """

    def __init__(
        self,
        buffer: memoryview,
        greet: Callable[[], None],
        take: Callable[[int, int, int, memoryview], None],
    ) -> None:
        self._buffer = buffer
        self._greet = greet
        self._take = take
        self._rest = b""  # of what was read: a part of a frame
        self._coming = 0, 0, 0  # content that is not there yet: its stream, its flags, how many bytes
        self._greeted = False
        self.stopped = False

    def room(self) -> memoryview:
        """Where to read into, right before `read`, whatever its size."""
        rest = len(self._rest)
        self._buffer[:rest] = self._rest
        return self._buffer[rest:]

    def read(self, size: int) -> bool:
        """Take in as many bytes of `room`.

        Returns:
            Whether there are more frames, which a further call takes in, with a size of 0.

        Raises:
            NotHttp2: the first bytes are not those of HTTP/2.
            ConnectionFault: a frame is too large, or what ``take`` raises.
        """
        filled = len(self._rest) + size
        self._rest = b""
        at = 0 if self._greeted else self._look_for_preface(filled)
        taken = 0
        while self._greeted and not self.stopped and taken < _AT_A_TIME:
            kind, start = frames.DATA, at
            number, flags, length = self._coming
            if not length:
                if filled - at < frames.HEADER_BYTES:
                    break
                high, low, kind, flags, number = frames.FRAME.unpack_from(self._buffer, at)
                number &= frames.LARGEST_STREAM
                start, length = at + frames.HEADER_BYTES, high << 8 | low
                if length > MAX_FRAME_BYTES:
                    message = f"a frame of {length} bytes; at most {MAX_FRAME_BYTES}"
                    raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, message)
            there = filled - start
            if there >= length:
                self._coming = 0, 0, 0
            elif there and kind == frames.DATA and not flags & frames.PADDED:
                self._coming = number, flags, length - there
                flags, length = 0, there  # it ends with what comes later
            else:
                break
            at = start + length
            taken += 1
            self._take(kind, flags, number, self._buffer[start:at])
        if self.stopped:
            return False
        self._rest = bytes(self._buffer[at:filled])
        return taken == _AT_A_TIME

    def _look_for_preface(self, filled: int) -> int:
        """Returns how many bytes of it are done with: all or none."""
        got = bytes(self._buffer[: min(filled, len(frames.PREFACE))])
        if not frames.PREFACE.startswith(got):
            raise NotHttp2(got)
        if len(got) < len(frames.PREFACE):
            return 0
        self._greeted = True
        self._greet()
        return len(got)
