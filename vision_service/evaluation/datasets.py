"""The formats of datasets, and telling which one a folder has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vision_service.errors import ConfigError, choices
from vision_service.evaluation import coco, folders, pairs, voc
from vision_service.evaluation.places import inside, listing, read_text
from vision_service.evaluation.samples import Dataset, images_in
from vision_service.types import Task

Reader = Callable[[Path, str], Dataset]


def _yolo(root: Path, split: str) -> Dataset:
    from vision_service.evaluation.yolo import yolo_boxes  # needs a library of the extra

    return yolo_boxes(root, split)


FORMATS: dict[Task, dict[str, Reader]] = {
    Task.DETECT: {"coco": coco.coco_boxes, "voc": voc.voc_boxes, "yolo": _yolo},
    Task.SEGMENT: {"voc": voc.voc_masks, "masks": pairs.mask_pairs},
    Task.CLASSIFY: {
        "class-folders": folders.class_folders,
        "csv": folders.csv_classes,
        "file-names": folders.file_names,
    },
}
"""Formats by what is measured with them."""

LOOKED_FOR = {
    Task.DETECT: (
        "COCO (a JSON file, annotations/instances_*.json, */_annotations.coco.json), Pascal VOC (Annotations/*.xml and "
        "JPEGImages/), YOLO (data.yaml, images/, labels/)"
    ),
    Task.SEGMENT: "images/ and masks/, images.tif and masks.tif, Pascal VOC (SegmentationClass/ and JPEGImages/)",
    Task.CLASSIFY: (
        "a folder of images for each class, a CSV file with a column of images and one of classes, file names that "
        "start with a WordNet id (n01494475_...)"
    ),
}


def open_dataset(root: Path, task: Task, *, format: str = "", split: str = "", classes: Path | None = None) -> Dataset:
    """A dataset for a task.

    Args:
        root: a folder or file.
        task: of the model.
        format: one of `FORMATS`; empty: by what is there.
        split: part of it, by its name there.
        classes: a file of names, one a line, of the class ids in masks.

    Raises:
        ConfigError: there is no such format or no such thing; says what was looked for and where.
    """
    if task not in FORMATS:
        raise ConfigError(f"a {task} model cannot be evaluated; tasks are {listing(FORMATS)}")
    if not root.exists():
        raise ConfigError(f"the dataset {root} does not exist")
    readers = FORMATS[task]
    if format and format not in readers:
        raise ConfigError(f"no format {format!r} for a {task} model; {choices(format, readers)}")
    chosen = format or detect_format(root, task)
    if classes is not None and chosen != "masks":
        raise ConfigError(f"--classes names the class ids in masks; a dataset in format {chosen!r} has its own names")
    if chosen == "masks":
        dataset = pairs.mask_pairs(root, split, _class_names(classes) if classes else ())
    else:
        dataset = readers[chosen](root, split)
    _check(dataset)
    return dataset


def detect_format(root: Path, task: Task) -> str:
    """Which format a folder or file has.

    Raises:
        ConfigError: none that the task has; says what was looked for.
    """
    found = {Task.DETECT: _of_boxes, Task.SEGMENT: _of_masks, Task.CLASSIFY: _of_classes}[task](root)
    if found:
        return found
    what = f"has {inside(root)}" if root.is_dir() else "is a file"
    raise ConfigError(
        f"{root} is no dataset for a {task} model: looked for {LOOKED_FOR[task]}; it {what}. --format says which "
        "it is and then tells more"
    )


def _of_boxes(root: Path) -> str:
    if root.is_file():
        return {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}.get(root.suffix.lower(), "")
    if any(any((root / name).glob("*.xml")) for name in voc.ANNOTATION_FOLDERS):
        return "voc"
    if any((root / name).is_file() for name in ("data.yaml", "data.yml", "dataset.yaml")):
        return "yolo"
    return "coco" if coco.coco_files(root) else ""


def _of_masks(root: Path) -> str:
    if root.is_file():
        return ""
    if (root / voc.MASK_FOLDER).is_dir() and (root / "JPEGImages").is_dir():
        return "voc"
    splits = [path for path in root.iterdir() if path.is_dir()]
    return "masks" if pairs.has_pairs(root) or any(pairs.has_pairs(path) for path in splits) else ""


def _of_classes(root: Path) -> str:
    if root.is_file():
        return "csv" if root.suffix.lower() == ".csv" else ""
    if any(folders.has_image_table(path) for path in root.glob("*.csv")):
        return "csv"
    if folders.names_have_wordnet_ids(images_in(root)):
        return "file-names"
    with_images = [path for path in root.iterdir() if path.is_dir() and images_in(path, deep=True)]
    return "class-folders" if with_images else ""


def _class_names(file: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in read_text(file, "the class names").splitlines() if line.strip())
    if not names:
        raise ConfigError(f"{file} has no class names")
    return names


def _check(dataset: Dataset) -> None:
    if not dataset.samples:
        raise ConfigError(f"{dataset.root} has no images in format {dataset.format!r}, split {dataset.split!r}")
    seen: set[str] = set()
    for sample in dataset.samples:
        if sample.name in seen:
            raise ConfigError(f"{dataset.root}: the image {sample.name} comes twice")
        seen.add(sample.name)
