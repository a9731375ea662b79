"""What an image may be on its way in, before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ColorOrder = Literal["rgb", "bgr"]


@dataclass(frozen=True, slots=True)
class RawPixels:
    """Uncompressed 8-bit pixels as they came over the wire; checked when they are decoded.

    Attributes:
        data: ``height * width * channels`` bytes, row by row from the top, channels interleaved.
        height: rows.
        width: columns.
        channels: 1 (grey), 3 or 4 (alpha last).
        color_order: of the three colour channels; means nothing when there is one channel.
    """

    data: bytes
    height: int
    width: int
    channels: int
    color_order: ColorOrder = "rgb"


ImageInput = bytes | RawPixels | NDArray[np.uint8] | Path | str
"""An image as a caller has it:

- ``bytes``: the content of an image file (JPEG, PNG, WebP, BMP, TIFF);
- `RawPixels`: pixels with their layout;
- an array: uint8 ``[H, W]`` grey, ``[H, W, 3]`` RGB or ``[H, W, 4]`` RGBA;
- ``Path`` or ``str``: the path of an image file. Never a URL.
"""


def describe(image: Any) -> str:
    """A short name of an image for messages: its path, else what kind of value it is."""
    if isinstance(image, (str, Path)):
        return str(image)
    if isinstance(image, bytes):
        return f"{len(image)} bytes"
    if isinstance(image, RawPixels):
        return f"raw pixels {image.height}x{image.width}x{image.channels}"
    if isinstance(image, np.ndarray):
        return f"array {image.dtype} {list(image.shape)}"
    return type(image).__name__
