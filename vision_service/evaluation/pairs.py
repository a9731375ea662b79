"""Image and mask pairs: two folders with files of the same names, or two stacks (TIFF) with as many pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vision_service.errors import ConfigError
from vision_service.evaluation.places import find_folder, inside, listing, read_text
from vision_service.evaluation.samples import (
    Dataset,
    MaskFile,
    Page,
    Sample,
    images_in,
    page_count,
    read_page,
)
from vision_service.types import VOID, Task

IMAGE_FOLDERS = ("images", "image", "imgs", "JPEGImages", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "SegmentationClass", "gt")
MASK_ENDINGS = ("", "_mask", "-mask", "_gt", "_label", "_labels")
STACKS = (("images.tif", "masks.tif"), ("train-volume.tif", "train-labels.tif"), ("image.tif", "mask.tif"))
BINARY_NAMES = ("background", "foreground")


def mask_pairs(root: Path, split: str, class_names: tuple[str, ...] = ()) -> Dataset:
    """A folder with images and masks.

    Masks hold class ids (grey or palette, 255 does not count), for which ``classes.txt`` or the argument has the names;
    or, without names, 0 and one other value: then what is not 0 is "foreground".

    Args:
        root: with ``images/`` and ``masks/`` or other usual names, or with ``images.tif`` and ``masks.tif`` or other
            usual names.
        split: a folder below ``root``, or below both folders; empty: none.
        class_names: the index is the id in the masks.

    Raises:
        ConfigError: a part is missing, or images and masks do not pair; says what was looked for.
    """
    base = root / split if split and (root / split).is_dir() else root
    stack = _stack(base)
    if stack is not None:
        pairs = _pages(*stack)
    else:
        images = find_folder(base, IMAGE_FOLDERS, "images")
        masks = find_folder(base, MASK_FOLDERS, "masks")
        if split and base == root:
            images, masks = find_folder(images, (split,), "images"), find_folder(masks, (split,), "masks")
        pairs = _pair(images, masks)
    names = class_names or _class_names(base, root)
    samples = [
        Sample(_name(image, root), image, MaskFile(mask, is_binary=not names))
        for image, mask in ((image, mask) for found in pairs for image, mask in _opened(*found))
    ]
    if not names:
        _check_binary(samples[0])
    return Dataset(root, "masks", split, Task.SEGMENT, names or BINARY_NAMES, samples)


def has_pairs(root: Path) -> bool:
    """Whether a folder looks like one of pairs."""
    folders = [next((root / name for name in names if (root / name).is_dir()), None) for names in _BOTH]
    return _stack(root) is not None or all(folders)


_BOTH = (IMAGE_FOLDERS, MASK_FOLDERS)


def _stack(base: Path) -> tuple[Path, Path] | None:
    for one, other in STACKS:
        for suffix in ("", "f"):
            image, mask = base / f"{one}{suffix}", base / f"{other}{suffix}"
            if image.is_file() and mask.is_file():
                return image, mask
    return None


def _pages(image: Path, mask: Path) -> list[tuple[Path, Path]]:
    counts = [page_count(path) for path in (image, mask)]
    if counts[0] != counts[1]:
        raise ConfigError(f"{image} has {counts[0]} pictures and {mask} {counts[1]}; there must be a mask an image")
    return [(image, mask)]


def _pair(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images with their masks, which have the same name up to the suffix and an ending such as ``_mask``."""
    by_name: dict[str, Path] = {}
    for mask in images_in(masks, deep=True):
        by_name[mask.relative_to(masks).with_suffix("").as_posix()] = mask
    found, without = [], []
    for image in images_in(images, deep=True):
        stem = image.relative_to(images).with_suffix("").as_posix()
        mask_of_it = next((by_name[stem + end] for end in MASK_ENDINGS if stem + end in by_name), None)
        if mask_of_it is None:
            without.append(stem)
        else:
            found.append((image, mask_of_it))
    if not found and not without:
        raise ConfigError(f"there are no images in {images}; it has {inside(images)}")
    if without:
        raise ConfigError(
            f"{len(without)} of {len(found) + len(without)} images have no mask: {listing(without, 5)}; looked in "
            f"{masks} for files of the same name, with nothing or {listing(MASK_ENDINGS[1:])} behind it; it has "
            f"{inside(masks)}"
        )
    return found


def _opened(image: Path, mask: Path) -> list[tuple[Path | Page, Path | Page]]:
    """Page by page for TIFF files that are stacks, else the files as they are."""
    if image.suffix.lower() not in {".tif", ".tiff"} or page_count(image) == 1:
        return [(image, mask)]
    _pages(image, mask)
    return [(Page(image, number), Page(mask, number)) for number in range(page_count(image))]


def _name(image: Path | Page, root: Path) -> str:
    if isinstance(image, Page):
        return f"{image.path.relative_to(root).as_posix()}[{image.number}]"
    return image.relative_to(root).as_posix()


def _class_names(*places: Path) -> tuple[str, ...]:
    for place in places:
        if (place / "classes.txt").is_file():
            lines = read_text(place / "classes.txt", "the class names").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    return ()


def _check_binary(sample: Sample) -> None:
    """Refuse class ids without names: the first mask shows which kind they are."""
    assert isinstance(sample.truth, MaskFile)
    source = sample.truth.source
    values = np.unique(read_page(source if isinstance(source, Page) else Page(source, 0)))
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ConfigError(
            f"the mask of {sample.name} has the values {listing(values.tolist(), 8)}: class ids need names, in a file "
            f"classes.txt beside the folders or by --classes FILE, a name a line from id 0 on ({VOID} does not count)"
        )
