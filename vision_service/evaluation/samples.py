"""A dataset as evaluation sees it: images by name, and what people say about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision_service.errors import ConfigError, InvalidImage
from vision_service.imaging.source import ImageInput
from vision_service.jobs.items import IMAGE_SUFFIXES
from vision_service.types import VOID, Task, UInt8Array

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class AnnotatedBoxes:
    """What an image shows, according to people.

    Attributes:
        boxes_xyxy: float64 ``[N, 4]``, pixels of the upright image, as everywhere here: the whole image is
            ``0, 0, W, H``. With ``is_relative`` they are shares of its width and height.
        class_names: N names.
        difficult: bool ``[N]``: hard to recognise (VOC) or a crowd (COCO): neither counted when found nor when missed.
        areas: float64 ``[N]``, pixels, by which objects are sorted into small, medium and large; ``None``: the boxes'.
        is_relative: see ``boxes_xyxy``.
    """

    boxes_xyxy: NDArray[np.floating]
    class_names: tuple[str, ...]
    difficult: NDArray[np.bool_]
    areas: Float64Array | None = None
    is_relative: bool = False

    def in_pixels(self, size_hw: tuple[int, int]) -> AnnotatedBoxes:
        """The same in pixels of an image of that height and width."""
        if not self.is_relative:
            return self
        height, width = size_hw
        boxes = np.asarray(self.boxes_xyxy, np.float64) * np.array([width, height, width, height], np.float64)
        return replace(self, boxes_xyxy=boxes, is_relative=False)


@dataclass(frozen=True, slots=True)
class Page:
    """A picture in a file of several, such as a TIFF stack; ``number`` counts from 0."""

    path: Path
    number: int


@dataclass(frozen=True, slots=True)
class MaskFile:
    """Where an image's mask lies.

    Attributes:
        source: a file of class ids, or one page of it.
        is_binary: what is not 0 is class 1.
    """

    source: Path | Page
    is_binary: bool = False


Truth = AnnotatedBoxes | MaskFile | str
"""Boxes; where the mask is; or the name of the class."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image of a dataset.

    Attributes:
        name: its path below the dataset, by which reports call it and are compared.
        image: where it lies.
        truth: what people say about it.
        declared_hw: height and width according to the annotation; ``None`` when it says nothing.
    """

    name: str
    image: Path | Page
    truth: Truth
    declared_hw: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images with annotations for one task.

    Attributes:
        root: what was named on the command line.
        format: how it is written, see `datasets.FORMATS`.
        split: which part; empty when it has none, or for all of it.
        task: what can be measured with it.
        class_names: the index is the class id in reports.
        samples: in the order in which they are evaluated.
        notes: what a reader of the figures should know.
    """

    root: Path
    format: str
    split: str
    task: Task
    class_names: tuple[str, ...]
    samples: Sequence[Sample]
    notes: tuple[str, ...] = field(default=())


def read_image(image: Path | Page) -> ImageInput:
    """What a pipeline or a client takes: the path of a file, the pixels of a page.

    Raises:
        InvalidImage: a page cannot be read.
    """
    return image if isinstance(image, Path) else to_eight_bits(read_page(image))


def read_mask(mask: MaskFile, class_count: int) -> UInt8Array:
    """Class ids of each pixel: uint8 ``[H, W]``, `VOID` where nothing is said.

    Args:
        mask: where it lies.
        class_count: how many classes the dataset has.

    Raises:
        InvalidImage: it cannot be read, is a colour picture, or has an id without a class.
    """
    page = mask.source if isinstance(mask.source, Page) else Page(mask.source, 0)
    pixels = read_page(page)
    if pixels.ndim == 3:
        if bool((pixels[..., :3] != pixels[..., :1]).any()):
            raise InvalidImage(f"the mask {page.path} has colours; it must have class ids (grey or palette)")
        pixels = pixels[..., 0]
    if mask.is_binary:
        return np.asarray(pixels != 0, np.uint8)
    known = (pixels >= 0) & (pixels < class_count) | (pixels == VOID)
    if not bool(known.all()):
        raise InvalidImage(
            f"the mask {page.path} has the id {int(pixels[~known][0])}; there are classes 0 to {class_count - 1}, "
            f"and {VOID} for pixels that do not count"
        )
    return np.asarray(pixels, np.uint8)


def read_page(page: Page) -> NDArray[Any]:
    """Values as they are in the file, ``[H, W]`` or ``[H, W, C]``; palette indices, not colours.

    Raises:
        InvalidImage: there is no such page, or it cannot be decoded.
    """
    try:
        with Image.open(page.path) as file:
            file.seek(page.number)
            return np.asarray(file)
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        what = f"{page.path}" if page.number == 0 else f"page {page.number} of {page.path}"
        raise InvalidImage(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def to_eight_bits(pixels: NDArray[Any]) -> UInt8Array:
    """Pixels of a page as uint8; wider ones lose their low bits."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.bool_:
        return np.where(pixels, np.uint8(255), np.uint8(0))
    if pixels.dtype == np.uint16:
        return (np.asarray(pixels, np.uint16) >> np.uint16(8)).astype(np.uint8)
    raise InvalidImage(f"pixels are {pixels.dtype}; 8 and 16 bits can be read")


def page_count(path: Path) -> int:
    """How many pictures a file holds.

    Raises:
        ConfigError: it is no picture.
    """
    try:
        with Image.open(path) as file:
            return int(getattr(file, "n_frames", 1))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}") from None


def images_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The images in a folder, in order of their names (numbers by value, so 2 is before 10)."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(
        (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()), key=natural_order
    )


def natural_order(path: Path) -> tuple[str, int, str]:
    """Sorts paths so that numbers without leading zeros come by value."""
    return (str(path.parent), len(path.stem) if path.stem.isdecimal() else 0, path.name)
