"""From what a client sends to pixels: uint8 ``[H, W, 3]`` RGB, upright, on white.

Files are hostile: bytes and pixels are capped before a decoder sees them, and whatever a decoder does with a damaged
file comes out as `InvalidImage`. OpenCV decodes; Pillow decodes the few kinds that OpenCV gets wrong, which
`ImageHeader.needs_pillow` tells.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vision_service.config import PreprocessSpec
from vision_service.errors import InvalidImage
from vision_service.imaging import geometry
from vision_service.imaging.headers import ImageHeader, read_header
from vision_service.types import UInt8Array

__all__ = ["DecodeLimits", "ImageHeader", "decode_for", "decode_image", "from_array", "from_raw", "read_header"]

_READ_RGB: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)  # from OpenCV 4.11 on
_READ_BGR = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """How large an image may be.

    Attributes:
        max_bytes: of a file, or of raw pixels.
        max_pixels: height times width.

    Raises:
        ValueError: a limit is below 1.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ValueError(f"both limits must be 1 or more, got {self}")


def decode_image(data: bytes, limits: DecodeLimits | None = None) -> UInt8Array:
    """The picture in an image file: a JPEG, PNG, WebP, BMP or TIFF (its first page or frame).

    EXIF orientation is applied, alpha is composed on white, 16 bits become 8 (the high byte), CMYK is converted
    without a colour profile.

    Args:
        data: content of the file.
        limits: largest file and picture; ``None``: the defaults.

    Returns:
        uint8 ``[H, W, 3]`` RGB, C-contiguous.

    Raises:
        InvalidImage: too large, not of an accepted format, truncated or damaged.
    """
    return _decode(data, _checked_header(data, limits or DecodeLimits()), 1)


def decode_for(
    data: bytes, spec: PreprocessSpec, limits: DecodeLimits | None = None
) -> tuple[UInt8Array, tuple[int, int]]:
    """The picture in an image file, no larger than a model needs it: a large JPEG at a half, a quarter or an eighth.

    The scaled picture is at least `geometry.OVERSAMPLING` times as large as its place in the network's input.

    Args:
        data: content of the file.
        spec: of the model; with ``exact_decode`` every file is decoded whole.
        limits: as in `decode_image`; they hold for the size that the file has.

    Returns:
        The picture, as `decode_image` returns it, and the height and width that it has unscaled, upright.

    Raises:
        InvalidImage: as in `decode_image`.
    """
    header = _checked_header(data, limits or DecodeLimits())
    factor = 1
    if header.format == "JPEG" and not (header.needs_pillow or spec.exact_decode):
        factor = geometry.reduction(spec.resize, header.height, header.width)
    image = _decode(data, header, factor)
    return image, (image.shape[0] * factor, image.shape[1] * factor)


def from_raw(
    data: bytes,
    height: int,
    width: int,
    channels: int,
    color_order: Literal["rgb", "bgr"] = "rgb",
    limits: DecodeLimits | None = None,
) -> UInt8Array:
    """An image from pixels without a container.

    Args:
        data: ``height * width * channels`` bytes, row by row from the top, channels interleaved.
        height: rows.
        width: columns.
        channels: 1 (grey), 3 or 4 (alpha last, composed on white).
        color_order: of the three colour channels; ignored when there is one.
        limits: largest image; ``None``: the defaults.

    Returns:
        uint8 ``[H, W, 3]`` RGB, C-contiguous; for RGB a read-only view of ``data``.

    Raises:
        InvalidImage: a size is not positive, the channels are not 1, 3 or 4, the length does not fit, or it is too
            large. Names the field.
    """
    limits = limits or DecodeLimits()
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise InvalidImage(f"must be 1 or more, got {value}", f"image.raw.{name}")
    if channels not in (1, 3, 4):
        raise InvalidImage(f"must be 1 (grey), 3 or 4 (alpha last), got {channels}", "image.raw.channels")
    if color_order not in ("rgb", "bgr"):
        raise InvalidImage(f"must be 'rgb' or 'bgr', got {color_order!r}", "image.raw.color_order")
    _check_pixels(height, width, limits, "image.raw")
    if len(data) > limits.max_bytes:
        raise InvalidImage(f"{len(data)} bytes; at most {limits.max_bytes} are accepted", "image.raw.data")
    if len(data) != height * width * channels:
        raise InvalidImage(
            f"need height * width * channels = {height} * {width} * {channels} = {height * width * channels} bytes, "
            f"got {len(data)}",
            "image.raw.data",
        )
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, channels)
    if channels == 1:
        return _grey_to_rgb(pixels)
    if color_order == "bgr":
        code = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGBA
        pixels = cast(UInt8Array, cv2.cvtColor(pixels, code))
    return _on_white(pixels) if channels == 4 else pixels


def from_array(array: NDArray[Any]) -> UInt8Array:
    """An image that a caller has in memory, checked.

    Args:
        array: uint8 ``[H, W]`` or ``[H, W, 1]`` grey, ``[H, W, 3]`` RGB, or ``[H, W, 4]`` RGBA (composed on white).

    Returns:
        uint8 ``[H, W, 3]`` RGB, C-contiguous; the same memory where that is possible.

    Raises:
        InvalidImage: another dtype or shape, or no pixels.
    """
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidImage(f"need an array of uint8, 0..255, got {got}")
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 3, 4) or array.size == 0:
        raise InvalidImage(
            f"need uint8 [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA with at least one pixel, got {list(array.shape)}"
        )
    pixels = np.ascontiguousarray(array)
    if channels == 1:
        return _grey_to_rgb(pixels)
    return _on_white(pixels) if channels == 4 else pixels


def _check_pixels(height: int, width: int, limits: DecodeLimits, field: str = "image") -> None:
    if height * width > limits.max_pixels:
        raise InvalidImage(
            f"{width} x {height} is {height * width} pixels; at most {limits.max_pixels} are accepted: scale it down",
            field,
        )


def _checked_header(data: bytes, limits: DecodeLimits) -> ImageHeader:
    if len(data) > limits.max_bytes:
        raise InvalidImage(
            f"a file of {len(data)} bytes; at most {limits.max_bytes} are accepted: scale it down or compress it more"
        )
    header = read_header(data)
    _check_pixels(header.height, header.width, limits)
    return header


def _decode(data: bytes, header: ImageHeader, factor: int) -> UInt8Array:
    """The picture, its sides divided by a factor, which they are a multiple of."""
    image = _decode_pillow(data, header) if header.needs_pillow else _decode_opencv(data, header, factor)
    height, width = header.height // factor, header.width // factor
    if image.shape[:2] not in ((height, width), (width, height)):
        raise InvalidImage(f"damaged {header.format} file: its header and its picture differ in size")
    return image


def _decode_opencv(data: bytes, header: ImageHeader, factor: int) -> UInt8Array:
    buffer = np.frombuffer(data, np.uint8)
    in_rgb = _READ_RGB is not None and factor == 1
    flag = _READ_RGB if _READ_RGB is not None and in_rgb else _READ_BGR[factor]
    try:
        image = cv2.imdecode(buffer, flag)
        if image is not None and not in_rgb:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    except cv2.error:
        image = None
    if image is None:
        raise _damaged(header)
    return cast(UInt8Array, image)


def _decode_pillow(data: bytes, header: ImageHeader) -> UInt8Array:
    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as file:
            file.load()
            upright = ImageOps.exif_transpose(file)
            if upright.mode == "LAB":
                return np.array(upright.convert("RGB"))
            return _on_white(np.asarray(upright.convert("RGBA")))
    except Exception as error:  # plugins raise whatever their parsing runs into
        raise _damaged(header) from error


def _damaged(header: ImageHeader) -> InvalidImage:
    return InvalidImage(f"damaged or unusual {header.format} file: it could not be decoded; save it anew")


def _grey_to_rgb(pixels: UInt8Array) -> UInt8Array:
    return cast(UInt8Array, cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))


def _on_white(rgba: UInt8Array) -> UInt8Array:
    """RGBA composed on white: ``color * alpha / 255`` rounded, plus ``255 - alpha``."""
    alpha = cv2.cvtColor(np.ascontiguousarray(rgba[:, :, 3]), cv2.COLOR_GRAY2RGB)
    color = cv2.multiply(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), alpha, scale=1 / 255)
    return cast(UInt8Array, cv2.add(color, cv2.bitwise_not(alpha)))
