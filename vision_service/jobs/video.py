"""Frames of a video, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import cv2

from vision_service.errors import ConfigError, InvalidImage
from vision_service.jobs.items import Frame, Item
from vision_service.types import UInt8Array


@dataclass(frozen=True, slots=True)
class Step:
    """Which frames are wanted.

    Attributes:
        frames: every n-th, from the first on.
        seconds: instead, the first frame at or after each multiple of so many seconds.

    Raises:
        ConfigError: both are given, or one is not above 0.
    """

    frames: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.seconds is not None:
            raise ConfigError("--every counts frames and --every-s seconds: choose one")
        if (self.frames is not None and self.frames < 1) or (self.seconds is not None and not self.seconds > 0):
            raise ConfigError("--every and --every-s must be above 0")


def frames_of(video: Item, step: Step, wanted: Callable[[Item], bool] = lambda _: True) -> Iterator[Item]:
    """The frames of a video that a step picks, with their pixels.

    Args:
        video: the file.
        step: which frames.
        wanted: asked before a frame is converted; one that is not wanted is left out.

    Raises:
        InvalidImage: it cannot be opened.
    """
    capture = cv2.VideoCapture(video.file)
    try:
        if not capture.isOpened():
            raise InvalidImage(f"{video.file} cannot be opened as a video")
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        index, next_s = 0, 0.0
        while capture.grab():
            shown_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
            # Some containers hold no times: then frames come at the stated rate.
            time_s = shown_ms / 1000 if shown_ms > 0 or index == 0 else index / rate
            due = time_s >= next_s - 1e-6
            picked = index % (step.frames or 1) == 0 if step.seconds is None else due
            if picked:
                if step.seconds is not None:
                    next_s = step.seconds * (math.floor((time_s + 1e-6) / step.seconds) + 1)
                frame = Frame(index, time_s)
                if wanted(video.at(frame)):
                    got, pixels = capture.retrieve()
                    if got:
                        yield video.at(frame, cast(UInt8Array, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))
            index += 1
    finally:
        capture.release()


def count_frames(video: Item, step: Step) -> int:
    """How many frames a step picks, as far as the container says."""
    capture = cv2.VideoCapture(video.file)
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    finally:
        capture.release()
    apart = step.frames or 1 if step.seconds is None else max(1.0, step.seconds * rate)
    return math.ceil(max(0, total) / apart)
