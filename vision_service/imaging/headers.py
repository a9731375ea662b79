"""What an image file says about itself, read without decoding it.

The size must be known before a decoder allocates memory for it, and two things are wrong without anyone noticing if
they are not looked up here: decoders fill what a cut-off file lacks with grey, and OpenCV drops transparency.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vision_service.errors import InvalidImage

ImageFormat = Literal["JPEG", "PNG", "WebP", "BMP", "TIFF"]

ACCEPTED = "accepted are JPEG, PNG, WebP, BMP and TIFF files"

_MAX_PARTS = 4096
"""JPEG segments before the pixels, or TIFF tags. Real files have some dozens; a hostile one has millions."""

_MAX_CHUNKS = 65_536
"""Chunks of a PNG. Usual are 8 kB of pixels each; this many take 20 ms to walk."""

_JPEG_END = b"\xff\xd9"

_OTHERS = (
    (b"GIF8", 0, "a GIF file"),
    (b"%PDF", 0, "a PDF file"),
    (b"\0\0\0\x0cJXL ", 0, "a JPEG XL file"),
    (b"\0\0\0\x0cjP  ", 0, "a JPEG 2000 file"),
    (b"8BPS", 0, "a Photoshop file"),
    (b"ftypavif", 4, "an AVIF file"),
    (b"ftyphei", 4, "a HEIC file"),
    (b"ftypmif1", 4, "a HEIC file"),
    (b"ftyp", 4, "a video file"),
)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What is known of an image file before it is decoded.

    Attributes:
        format: what kind of file it is, by its first bytes.
        height: rows as stored, before EXIF orientation.
        width: columns as stored, before EXIF orientation.
        needs_pillow: the file has something that OpenCV gets wrong: transparency, an EXIF orientation in a WebP
            (before 4.11), several frames in a WebP (before 4.11), CIELAB colours.
    """

    format: ImageFormat
    height: int
    width: int
    needs_pillow: bool = False


def read_header(data: bytes) -> ImageHeader:
    """The kind and size of an image file, from its header alone.

    Args:
        data: content of the file.

    Returns:
        Its header.

    Raises:
        InvalidImage: empty, of no accepted format, damaged, or recognisably cut off.
    """
    name, reader = next(((name, reader) for magic, name, reader in _READERS if data.startswith(magic)), (None, None))
    if name is None or reader is None or (name == "WebP" and data[8:12] != b"WEBP"):
        raise InvalidImage(f"{_kind(data)}; {ACCEPTED}")
    try:
        header = reader(data)
    except (struct.error, IndexError, ValueError, OverflowError):
        # Each reader only looks at fixed places and follows lengths: a miss is a place behind the end.
        raise _truncated(name) from None
    if header.height < 1 or header.width < 1:
        raise InvalidImage(f"damaged {header.format} file: it says {header.width} x {header.height} pixels")
    return header


def _kind(data: bytes) -> str:
    if not data:
        return "no bytes"
    for magic, position, name in _OTHERS:
        if data.startswith(magic, position):
            return name
    start = data[:256]
    if all(byte in b"\t\n\r" or byte >= 32 for byte in start) and _is_utf8(start):
        return f"text that starts with {start[:20].decode(errors='ignore')!r}, not an image"
    return f"not an image that is known here: it starts with bytes {data[:8].hex(' ')}"


def _is_utf8(start: bytes) -> bool:
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start > len(start) - 4  # a character that was cut in two
    return True


def _truncated(name: ImageFormat) -> InvalidImage:
    return InvalidImage(f"truncated {name} file: it ends before its picture does; send all of its bytes")


def _jpeg(data: bytes) -> ImageHeader:
    position, size = 2, None
    for _ in range(_MAX_PARTS):
        position = data.index(b"\xff", position)  # as libjpeg, skip what is no marker
        while data[position] == 0xFF:
            position += 1
        code = data[position]
        position += 1
        if code in (0x00, 0x01) or 0xD0 <= code <= 0xD8:
            continue
        if code == 0xD9:
            break
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC) and size is None:
            size = struct.unpack_from(">HH", data, position + 3)
        (length,) = struct.unpack_from(">H", data, position)
        position += length
        if code == 0xDA and size is not None:
            # Within compressed data FF is followed by 00 or a restart marker, so this is no pixel by chance.
            if not data.endswith(_JPEG_END) and data.find(_JPEG_END, position) < 0:
                raise _truncated("JPEG")
            return ImageHeader("JPEG", *size)
    raise InvalidImage("damaged JPEG file: no picture in it")


def _png(data: bytes) -> ImageHeader:
    name, width, height, depth, color_type = struct.unpack_from(">4sIIBB", data, 12)
    if name != b"IHDR":
        raise InvalidImage("damaged PNG file: it does not start with its header")
    position, has_key = 8, False
    for _ in range(_MAX_CHUNKS):
        length, name = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if position > len(data):
            # OpenCV 5 allocates what a chunk claims to hold, gigabytes of it, before it reads.
            raise _truncated("PNG")
        has_key = has_key or name == b"tRNS"
        if name == b"IEND":
            # Pillow clips 16-bit grey, so its colour key (one grey value) is ignored rather than the picture spoilt.
            has_alpha = color_type in (4, 6) or (has_key and (depth, color_type) != (16, 0))
            return ImageHeader("PNG", height, width, needs_pillow=has_alpha)
    raise InvalidImage(f"damaged PNG file: no end within {_MAX_CHUNKS} chunks")


def _webp(data: bytes) -> ImageHeader:
    riff_bytes, _, name = struct.unpack_from("<I4s4s", data, 4)
    if len(data) < riff_bytes + 8:
        raise _truncated("WebP")
    if name == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("WebP", height & 0x3FFF, width & 0x3FFF)
    if name == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("WebP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, needs_pillow=bool(bits >> 28 & 1))
    if name == b"VP8X":
        flags, low_width, high_width, low_height, high_height = struct.unpack_from("<B3xHBHB", data, 20)
        width, height = (high_width << 16) + low_width + 1, (high_height << 16) + low_height + 1
        return ImageHeader("WebP", height, width, needs_pillow=bool(flags & 0x1A))  # alpha, EXIF, animation
    raise InvalidImage(f"damaged WebP file: it starts with a part called {name!r}")


def _bmp(data: bytes) -> ImageHeader:
    offset, header_bytes = struct.unpack_from("<II", data, 10)
    if header_bytes == 12:
        width, height, _, depth = struct.unpack_from("<HHHH", data, 18)
        compression, has_alpha = 0, False
    else:
        width, height, _, depth, compression = struct.unpack_from("<iiHHI", data, 18)
        has_masks = compression in (3, 6) and (header_bytes >= 56 or compression == 6)
        has_alpha = depth == 32 and has_masks and struct.unpack_from("<I", data, 66)[0] != 0
    height = abs(height)  # negative: rows from the top
    if compression in (0, 3, 6) and len(data) < offset + (width * depth + 31) // 32 * 4 * height:
        raise _truncated("BMP")
    return ImageHeader("BMP", height, width, needs_pillow=has_alpha)


def _tiff(data: bytes) -> ImageHeader:
    tags = _tiff_tags(data)
    depth, compression, samples, photometric, height, width, tile_height, tile_width = (
        int(tags[tag][0]) if tag in tags else default
        for tag, default in ((258, 1), (259, 1), (277, 1), (262, 1), (257, 0), (256, 0), (323, 0), (322, 0))
    )
    if depth > 16:
        raise InvalidImage(f"TIFF file with {depth} bits a sample; at most 16 are accepted: convert it to 8 bits")
    if max(tile_height, tile_width) > 4096 and tile_height * tile_width > 4 * height * width:
        raise InvalidImage(f"damaged TIFF file: tiles of {tile_width} x {tile_height} in {width} x {height} pixels")
    packed_bytes = height * width * samples * depth // 8 if compression == 1 and photometric != 6 else 0
    for starts, sizes in ((273, 279), (324, 325)):  # of strips, of tiles
        if starts in tags and sizes in tags and len(tags[starts]) == len(tags[sizes]):
            lengths = tags[sizes].astype(np.uint64)
            if (tags[starts].astype(np.uint64) + lengths).max() > len(data) or lengths.sum() < packed_bytes:
                raise _truncated("TIFF")
    # Pillow does not read 16-bit grey with alpha; its alpha is ignored rather than the file refused.
    has_alpha = (photometric, samples) == (2, 4) or (photometric in (0, 1) and (samples, depth) == (2, 8))
    return ImageHeader("TIFF", height, width, needs_pillow=has_alpha or photometric == 8)


def _tiff_tags(data: bytes) -> dict[int, NDArray[np.unsignedinteger[Any]]]:
    """The values of the integer tags of the first page."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in (data[2], data[3])
    address, count_kind, inline_bytes = ("Q", "Q", 8) if is_big else ("I", "H", 4)
    (start,) = struct.unpack_from(order + address, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + count_kind, data, start)
    if not 0 < count <= _MAX_PARTS:
        raise InvalidImage(f"damaged TIFF file: {count} tags")
    start += struct.calcsize(count_kind)
    tags: dict[int, NDArray[np.unsignedinteger[Any]]] = {}
    for position in range(start, start + count * (4 + 2 * inline_bytes), 4 + 2 * inline_bytes):
        tag, kind, values = struct.unpack_from(order + "HH" + address, data, position)
        if kind not in _TIFF_KINDS or values == 0 or tag in tags:
            continue
        dtype = np.dtype(order + _TIFF_KINDS[kind])
        place = position + 4 + inline_bytes
        if values * dtype.itemsize > inline_bytes:
            (place,) = struct.unpack_from(order + address, data, place)
        tags[tag] = np.frombuffer(data, dtype, values, place)
    (next_page,) = struct.unpack_from(order + address, data, start + count * (4 + 2 * inline_bytes))
    if next_page >= len(data):
        raise _truncated("TIFF")
    return tags


_TIFF_KINDS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}

_READERS: tuple[tuple[bytes, ImageFormat, Callable[[bytes], ImageHeader]], ...] = (
    (b"\xff\xd8\xff", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"RIFF", "WebP", _webp),
    (b"BM", "BMP", _bmp),
    (b"II*\0", "TIFF", _tiff),
    (b"MM\0*", "TIFF", _tiff),
    (b"II+\0", "TIFF", _tiff),
    (b"MM\0+", "TIFF", _tiff),
)
