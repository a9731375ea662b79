"""What a job works on, one by one, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from vision_service.errors import InvalidImage, VisionError
from vision_service.records import Record, error_to_record, to_record
from vision_service.types import Prediction, Result, UInt8Array

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"})


@dataclass(frozen=True, slots=True)
class Frame:
    """Which frame of a video.

    Attributes:
        index: from 0.
        time_s: when it is shown, seconds from the start.
    """

    index: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Item:
    """An image of a source.

    Attributes:
        file: what results call it: its path or URL as it was named; a frame of a video has ``#frame=30&t=1.001`` after
            the video's.
        name: its place below what was named, for files that are written about it.
        size_bytes: of the file, -1 when that is not known.
        stamp: changes when the content does: the time of the last change, or an ETag.
        frame: which frame of the video it is, else ``None``.
        pixels: uint8 ``[H, W, 3]`` RGB of a frame, which cannot be read on its own.
    """

    file: str
    name: PurePosixPath
    size_bytes: int = -1
    stamp: str = ""
    frame: Frame | None = None
    pixels: UInt8Array | None = field(default=None, compare=False, repr=False)

    @property
    def source(self) -> str:
        """The file that it is in: itself, or the video."""
        return self.file if self.frame is None else self.file.rpartition("#")[0]

    @property
    def is_video(self) -> bool:
        """Whether this is a whole video, whose frames are the images."""
        return self.frame is None and self.name.suffix.lower() in VIDEO_SUFFIXES

    def at(self, frame: Frame, pixels: UInt8Array | None = None) -> Item:
        """A frame of this video."""
        place = self.name.with_suffix("") / f"{frame.index:06d}_{round(1000 * frame.time_s)}ms.frame"
        named = f"{self.file}#frame={frame.index}&t={frame.time_s:.3f}"
        return replace(self, file=named, name=place, frame=frame, pixels=pixels)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image has no answer.

    Attributes:
        error: the reason.
        model: whose answer is missing; empty: the image could not be used at all.
        passing: the image is not to blame (it could not be read just now, a server was away), so trying again may help.
    """

    error: VisionError
    model: str = ""
    passing: bool = False

    @classmethod
    def of(cls, error: VisionError, model: str = "") -> Failure:
        """Of a model that was asked: some errors are about the image, the others of the moment."""
        return cls(error, model, error.status not in ("INVALID_ARGUMENT", "INTERNAL"))

    @classmethod
    def unreadable(cls, file: str, error: OSError, model: str = "") -> Failure:
        """Of a file that could not be read."""
        return cls(InvalidImage(f"{file} cannot be read: {error.strerror or error}"), model, passing=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an image.

    Attributes:
        item: the image.
        results: one a model that answered, in the order of the models.
        failures: one a model that did not, or one for the image.
        image: uint8 ``[H, W, 3]`` RGB, upright, where it was asked for.
    """

    item: Item
    results: tuple[Result[Prediction], ...] = ()
    failures: tuple[Failure, ...] = ()
    image: UInt8Array | None = field(default=None, compare=False, repr=False)

    def records(self, *, timings: bool = False) -> list[Record]:
        """The results as plain values.

        Args:
            timings: with what differs from run to run; without, equal images have equal records, byte for byte.
        """
        return [{**self._about(), **to_record(result, timings=timings)} for result in self.results]

    def failure_records(self) -> list[Record]:
        """The failures as plain values."""
        return [{**self._about(), "model": one.model, **error_to_record(one.error)} for one in self.failures]

    def _about(self) -> Record:
        frame = self.item.frame
        return {
            "file": self.item.file,
            **({} if frame is None else {"frame": frame.index, "time_s": round(frame.time_s, 3)}),
        }
