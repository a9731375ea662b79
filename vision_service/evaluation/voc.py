"""Pascal VOC: an XML file an image with named boxes, lists of names for the splits, masks as palette pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from vision_service.errors import ConfigError, choices
from vision_service.evaluation.places import find_folder, listing
from vision_service.evaluation.samples import AnnotatedBoxes, Dataset, MaskFile, Sample, images_in
from vision_service.jobs.items import IMAGE_SUFFIXES
from vision_service.types import Task

__all__ = ["VOC_CLASSES", "AnnotatedBoxes", "read_voc_annotation", "voc_boxes", "voc_masks"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""In VOC's order; class ids in its masks count from 1."""

ANNOTATION_FOLDERS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images")
MASK_FOLDER = "SegmentationClass"


def read_voc_annotation(path: Path) -> AnnotatedBoxes:
    """One annotation file.

    VOC counts pixels from 1 and includes the last one, so 1 is taken from the upper left corner.

    Args:
        path: an XML file.

    Raises:
        ConfigError: it cannot be read, is no VOC annotation, or a box is inside out.
    """
    return _read(path)[0]


def voc_boxes(root: Path, split: str) -> Dataset:
    """A folder with ``Annotations/``, ``JPEGImages/`` and, for splits, ``ImageSets/Main/SPLIT.txt``.

    Args:
        root: the folder; ``annotations/`` and ``images/`` are taken as well.
        split: name of a list; empty: every annotated image.

    Raises:
        ConfigError: a folder, the split, or an annotation is missing or wrong; says what was looked for.
    """
    annotations = find_folder(root, ANNOTATION_FOLDERS, "the XML files of Pascal VOC")
    images = find_folder(root, IMAGE_FOLDERS, "the images of Pascal VOC")
    by_stem = {path.stem: path for path in images_in(images)}
    samples = []
    names: set[str] = set()
    for stem in _stems(root, "Main", split, annotations, "*.xml"):
        truth, declared_hw = _read(annotations / f"{stem}.xml")
        names.update(truth.class_names)
        image = by_stem.get(stem, images / f"{stem}.jpg")
        samples.append(Sample(image.relative_to(root).as_posix(), image, truth, declared_hw))
    return Dataset(root, "voc", split, Task.DETECT, tuple(sorted(names)), samples, _notes(root, "Main", split))


def voc_masks(root: Path, split: str) -> Dataset:
    """A folder with ``SegmentationClass/``, ``JPEGImages/`` and ``ImageSets/Segmentation/SPLIT.txt``.

    Raises:
        ConfigError: as `voc_boxes`.
    """
    masks = find_folder(root, (MASK_FOLDER,), "the masks of Pascal VOC")
    images = find_folder(root, IMAGE_FOLDERS, "the images of Pascal VOC")
    by_stem = {path.stem: path for path in images_in(images)}
    samples = []
    for stem in _stems(root, "Segmentation", split, masks, "*.png"):
        image = by_stem.get(stem, images / f"{stem}.jpg")
        samples.append(Sample(image.relative_to(root).as_posix(), image, MaskFile(masks / f"{stem}.png")))
    notes = _notes(root, "Segmentation", split)
    return Dataset(root, "voc", split, Task.SEGMENT, ("background", *VOC_CLASSES), samples, notes)


def _stems(root: Path, kind: str, split: str, folder: Path, pattern: str) -> list[str]:
    """Names of a split's images, without suffix."""
    if not split:
        return sorted(path.stem for path in folder.glob(pattern))
    lists = root / "ImageSets" / kind
    file = lists / f"{split}.txt"
    if not file.is_file():
        near = choices(split, _splits(lists)) if lists.is_dir() else f"there is no folder {lists}"
        raise ConfigError(f"no split {split!r}: looked for {file}; {near}")
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    stems = [words[0] for words in lines]
    return [stem[: -len(Path(stem).suffix)] if Path(stem).suffix.lower() in IMAGE_SUFFIXES else stem for stem in stems]


def _splits(lists: Path) -> list[str]:
    # Real VOC has a list a class as well (`cat_val.txt`), whose second column says whether it is in the image.
    return sorted(path.stem for path in lists.glob("*.txt") if not _is_of_a_class(path))


def _is_of_a_class(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as lines:
        return len(lines.readline().split()) > 1


def _notes(root: Path, kind: str, split: str) -> tuple[str, ...]:
    lists = root / "ImageSets" / kind
    if split or not lists.is_dir():
        return ()
    return (f"no split was chosen, so all annotated images count; there are {listing(_splits(lists))}",)


def _read(path: Path) -> tuple[AnnotatedBoxes, tuple[int, int] | None]:
    try:
        root = ET.fromstring(path.read_bytes())  # noqa: S314 expat refuses entity bombs, and fetches nothing
        objects = [
            (
                [float(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")],
                _text(item, "name"),
                (item.findtext("difficult") or "0").strip() == "1",
            )
            for item in root.findall("object")
        ]
        height, width = (int(root.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    except OSError as error:
        raise ConfigError(f"the annotation {path} cannot be read: {error.strerror}") from None
    except (ET.ParseError, ValueError) as error:
        raise ConfigError(f"{path} is not a Pascal VOC annotation: {error}") from None
    boxes = np.array([box for box, _, _ in objects], np.float64).reshape(-1, 4)
    boxes[:, :2] -= 1.0
    if not bool(np.all(boxes[:, 2:] > boxes[:, :2])):
        raise ConfigError(f"{path}: a box has no area or its corners are crossed")
    names, difficult = tuple(name for _, name, _ in objects), np.array([hard for _, _, hard in objects], np.bool_)
    return AnnotatedBoxes(boxes, names, difficult), (height, width) if height and width else None


def _text(item: ET.Element, path: str) -> str:
    text = item.findtext(path)
    if text is None:
        raise ValueError(f"an object has no {path}")
    return text.strip()
