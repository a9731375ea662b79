"""Pictures of a job, read a second time, for outputs that are made when it is through."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import cast

import cv2

from vision_service.errors import InvalidImage
from vision_service.imaging.decode import DecodeLimits, decode_image
from vision_service.jobs.items import Failure, Item
from vision_service.jobs.reading import read_item
from vision_service.records import Record
from vision_service.types import UInt8Array


def image_of(record: Record, limits: DecodeLimits | None = None) -> UInt8Array:
    """The image that a record is about: uint8 ``[H, W, 3]`` RGB.

    Raises:
        InvalidImage: it is not there any more.
    """
    file, limits = record["file"], limits or DecodeLimits()
    try:
        if "frame" not in record:
            return decode_image(read_item(Item(file, PurePosixPath(Path(file).name)), limits), limits)
    except OSError as error:
        raise Failure.unreadable(file, error).error from None
    return _frame(file.rpartition("#")[0], record["frame"])


def _frame(video: str, index: int) -> UInt8Array:
    capture = cv2.VideoCapture(video)
    try:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        got, pixels = capture.read()
    finally:
        capture.release()
    if not got:
        raise InvalidImage(f"{video} has no frame {index} any more")
    return cast(UInt8Array, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
