"""Cuts what comes on a connection into frames (RFC 9113, 3.4 and 4)."""

from __future__ import annotations

from collections.abc import Callable

from vision_service.http2 import frames
from vision_service.http2.frames import ConnectionFault, ErrorCode

READ_BYTES = 512 * 1024
"""Most that is read in one go; the largest frame has room in it as a whole, for the sake of those with padding."""

MAX_DATA_BYTES = 256 * 1024
"""Largest frame of content: an image in one costs a third less than in frames of 16 kB. It is taken in as it comes;
other frames have to be there as a whole, and are no larger than they are by default."""


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
        """Where to read into, before `read`, with nothing in between."""
        rest = len(self._rest)
        self._buffer[:rest] = self._rest
        return self._buffer[rest:]

    def read(self, size: int) -> None:
        """Take in as many bytes of `room`.

        Raises:
            NotHttp2: the first bytes are not those of HTTP/2.
            ConnectionFault: a frame is too large, or what ``take`` raises.
        """
        filled = len(self._rest) + size
        self._rest = b""
        at = 0 if self._greeted else self._look_for_preface(filled)
        while self._greeted and not self.stopped:
            kind, start = frames.DATA, at
            number, flags, length = self._coming
            if not length:
                if filled - at < frames.HEADER_BYTES:
                    break
                high, low, kind, flags, number = frames.FRAME.unpack_from(self._buffer, at)
                number &= frames.LARGEST_STREAM
                start, length = at + frames.HEADER_BYTES, high << 8 | low
                _check_length(kind, length)
            there = filled - start
            if there >= length:
                self._coming = 0, 0, 0
            elif there and kind == frames.DATA and not flags & frames.PADDED:
                self._coming = number, flags, length - there
                flags, length = 0, there  # it ends with what comes later
            else:
                break
            at = start + length
            self._take(kind, flags, number, self._buffer[start:at])
        if not self.stopped:
            self._rest = bytes(self._buffer[at:filled])

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


def _check_length(kind: int, length: int) -> None:
    most = MAX_DATA_BYTES if kind == frames.DATA else frames.DEFAULT_MAX_FRAME
    if length > most:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {most}")
