"""Header blocks: HEADERS and the CONTINUATION frames that belong to it, put together (RFC 9113, 6.2 and 6.10)."""

from __future__ import annotations

from vision_service.http2 import frames
from vision_service.http2.fields import MAX_BLOCK_BYTES
from vision_service.http2.frames import ConnectionFault, ErrorCode

Block = tuple[int, bytes]
"""The flags of HEADERS, and the block."""


class HeaderBlocks:
    """The header blocks of a connection, one after the other.

    Attributes:
        begun: whether there is a block of which more must come before any other frame.
    """

    def __init__(self) -> None:
        self.begun = False
        self._number = 0
        self._flags = 0
        self._parts = bytearray()

    def begin(self, flags: int, number: int, payload: memoryview) -> Block | None:
        """Take in HEADERS.

        Returns:
            The block; ``None`` while more of it must come.

        Raises:
            ConnectionFault: the frame breaks a rule, or is too large.
        """
        if number % 2 == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client's streams have odd numbers, not {number}")
        block = frames.without_padding(payload, flags)
        if flags & frames.PRIORITISED:
            if len(block) < 5:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for their priority")
            block = block[5:]
        _check_length(len(block))
        if flags & frames.END_HEADERS:
            return flags, bytes(block)
        self.begun, self._number, self._flags, self._parts = True, number, flags, bytearray(block)
        return None

    def go_on(self, flags: int, number: int, payload: memoryview) -> Block | None:
        """Take in CONTINUATION; returns and raises as `begin`."""
        if not self.begun or self._number != number:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._parts += payload
        _check_length(len(self._parts))
        if not flags & frames.END_HEADERS:
            return None
        block, self._parts = bytes(self._parts), bytearray()
        self.begun = False
        return self._flags, block


def _check_length(length: int) -> None:
    """Check how long a block is so far."""
    if length > MAX_BLOCK_BYTES:
        raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"more than {MAX_BLOCK_BYTES} bytes of header fields")
