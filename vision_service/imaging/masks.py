"""Masks as bytes and outlines, and back: COCO run lengths, polygons, PNG.

Reading treats its input as hostile: what is no mask raises `ValueError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from vision_service.errors import InvalidImage
from vision_service.imaging.decode import DecodeLimits, read_header
from vision_service.types import Float32Array, Int64Array

Mask = NDArray[np.bool_]

_LARGEST_COORDINATE = 1_000_000


def encode_rle(mask: Mask) -> bytes:
    """A mask as COCO's compressed run lengths.

    Args:
        mask: bool ``[H, W]``.

    Returns:
        What pycocotools calls ``counts``: ASCII, column-major.

    Raises:
        ValueError: not a bool matrix.
    """
    _check(mask)
    return cast(bytes, coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])


def decode_rle(counts: bytes, hw: tuple[int, int]) -> Mask:
    """COCO's compressed run lengths as a mask.

    Not by pycocotools, which trusts the runs to fit and writes behind its buffer when they don't.

    Args:
        counts: from `encode_rle` or pycocotools.
        hw: height and width of the mask.

    Returns:
        bool ``[H, W]``.

    Raises:
        ValueError: not run lengths, or not those of a mask of this size.
    """
    height, width = hw
    if height < 0 or width < 0 or height * width > DecodeLimits().max_pixels:
        raise ValueError(f"need a size of 0 to {DecodeLimits().max_pixels} pixels, got {height} x {width}")
    runs = _read_runs(counts)
    if runs.min(initial=0) < 0 or runs.max(initial=0) > height * width or runs.sum() != height * width:
        raise ValueError(f"run lengths do not add up to {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1  # the first run is outside
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def _read_runs(counts: bytes) -> Int64Array:
    """Run lengths out of COCO's string: 5 bits a character, low ones first, bit 5 says that more follow.

    From the fourth on, a run is stored as its difference to the one before the last (``maskApi.c``, ``rleFrString``).
    """
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if len(characters) == 0:
        return np.empty(0, np.int64)
    if characters.min() < 0 or characters.max() > 63 or characters[-1] & 0x20:
        raise ValueError("not COCO run lengths: a character out of place")
    is_last = (characters & 0x20) == 0
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    lengths = np.diff(np.append(starts, len(characters)))
    if lengths.max() > 7:
        raise ValueError("not COCO run lengths: a run of more than 32 bits")
    places = np.arange(len(characters)) - np.repeat(starts, lengths)
    runs: Int64Array = np.add.reduceat((characters & 0x1F) << (5 * places), starts)
    is_negative = (characters[is_last] & 0x10) != 0
    runs = runs - (is_negative.astype(np.int64) << (5 * lengths))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def to_polygons(mask: Mask) -> list[Float32Array]:
    """The outlines of a mask, holes included.

    Args:
        mask: bool ``[H, W]``.

    Returns:
        float32 ``[K, 2]`` each, x and y of pixel centres (the top-left pixel is 0, 0), without a repeated last point;
        one or two points for what is one pixel wide. To be filled by the even-odd rule.

    Raises:
        ValueError: not a bool matrix.
    """
    _check(mask)
    if mask.size == 0:
        return []
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [outline.reshape(-1, 2).astype(np.float32) for outline in outlines]


def from_polygons(polygons: Sequence[Float32Array], hw: tuple[int, int]) -> Mask:
    """Outlines, filled by the even-odd rule; what lies on an outline is inside.

    Args:
        polygons: float ``[K, 2]`` each, x and y of pixel centres.
        hw: height and width of the mask; what lies outside is cut away.

    Returns:
        bool ``[H, W]``.

    Raises:
        ValueError: an outline that is no list of points, or a coordinate that is not finite or far outside.
    """
    filled = np.zeros(hw, np.uint8)
    outlines = []
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
            raise ValueError(f"need an outline of points [K, 2], got {list(points.shape)}")
        if not bool((np.abs(points) <= _LARGEST_COORDINATE).all()):  # NaN is not
            raise ValueError(f"need finite coordinates of at most {_LARGEST_COORDINATE}")
        outlines.append(np.rint(points).astype(np.int32))
    if outlines and filled.size:
        cv2.fillPoly(filled, outlines, 1)
    return filled.astype(np.bool_)


def encode_png(mask: Mask) -> bytes:
    """A mask as a PNG of one 8-bit channel, 255 inside and 0 outside.

    Args:
        mask: bool ``[H, W]``, at least one pixel.

    Returns:
        Content of the file.

    Raises:
        ValueError: not a bool matrix, or an empty one, which no PNG can be.
    """
    _check(mask)
    if mask.size == 0:
        raise ValueError(f"a PNG has at least one pixel, got {list(mask.shape)}")
    _, png = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    return png.tobytes()


def decode_png(data: bytes) -> Mask:
    """A PNG as a mask.

    Args:
        data: content of the file; grey values above 127 are inside.

    Returns:
        bool ``[H, W]``.

    Raises:
        ValueError: not a PNG, damaged or too large.
    """
    try:
        header = read_header(data)
    except InvalidImage as error:
        raise ValueError(str(error)) from error
    limits = DecodeLimits()
    if header.format != "PNG" or header.height * header.width > limits.max_pixels:
        raise ValueError(
            f"need a PNG of at most {limits.max_pixels} pixels, got {header.format} {header.width} x {header.height}"
        )
    try:
        grey = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        grey = None
    if grey is None:
        raise ValueError("damaged PNG file: it could not be decoded")
    return grey > 127


def _check(mask: Mask) -> None:
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"need a mask of bool [H, W], got {mask.dtype} {list(mask.shape)}")
