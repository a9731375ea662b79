"""From pixels to an image file."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from vision_service.errors import InvalidInput
from vision_service.types import UInt8Array

FileFormat = Literal["png", "jpeg", "webp"]

_LARGEST_SIDE: dict[FileFormat, int] = {"png": 1_000_000, "jpeg": 65_500, "webp": 16_383}
"""What the formats, or their libraries, can hold."""


def encode_image(image: UInt8Array, format: FileFormat, quality: int = 90) -> bytes:
    """An image as a file.

    Args:
        image: uint8 ``[H, W, 3]`` RGB.
        format: ``png`` is lossless.
        quality: of JPEG and WebP, 1..100; means nothing for PNG.

    Returns:
        Content of the file.

    Raises:
        InvalidInput: unknown format, quality out of range, or an image that the format cannot hold.
        ValueError: not uint8 ``[H, W, 3]`` with at least one pixel.
    """
    if format not in _LARGEST_SIDE:
        raise InvalidInput("image_encoding", f"must be one of {', '.join(_LARGEST_SIDE)}, got {format!r}")
    if not 1 <= quality <= 100:
        raise InvalidInput("quality", f"must be from 1 to 100, got {quality}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"need uint8 [H, W, 3] with at least one pixel, got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    if max(height, width) > _LARGEST_SIDE[format]:
        raise InvalidInput(
            "image_encoding", f"{format} holds at most {_LARGEST_SIDE[format]} pixels a side, got {width} x {height}"
        )
    options = {
        "png": [],
        "jpeg": [cv2.IMWRITE_JPEG_QUALITY, quality],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
    }
    _, data = cv2.imencode(f".{format}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options[format])
    return data.tobytes()
