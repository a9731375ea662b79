"""Classification: a folder a class, a CSV file, or the class at the start of the file names."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from vision_service.errors import ConfigError, choices
from vision_service.evaluation.places import inside, listing, read_text
from vision_service.evaluation.samples import Dataset, Sample, images_in
from vision_service.types import Task

IMAGE_COLUMNS = ("image", "file", "file_name", "filename", "path")
CLASS_COLUMNS = ("class", "class_name", "label", "category", "wnid", "class_id")
SPLIT_COLUMN = "split"

WORDNET_NAME = re.compile(r"n\d{8}(?=_)")


def class_folders(root: Path, split: str) -> Dataset:
    """A folder with a folder of images for each class; ``SPLIT/CLASS/image.jpg`` when there are splits.

    Raises:
        ConfigError: there is no such folder, or none with images; says what was looked for.
    """
    base = root / split if split else root
    if not base.is_dir():
        raise ConfigError(f"there is no folder {base}; {root} has {inside(root)}")
    splits = [] if split else looks_split(root)
    if splits:
        raise ConfigError(f"{root}: its folders are splits, choose one by --split ({listing(sorted(splits))})")
    by_class = {path.name: images_in(path, deep=True) for path in sorted(base.iterdir()) if path.is_dir()}
    by_class = {name: images for name, images in by_class.items() if images}
    if not by_class:
        raise ConfigError(f"{base} has no folders with images, one a class; it has {inside(base)}")
    samples = [
        Sample(image.relative_to(root).as_posix(), image, name) for name, images in by_class.items() for image in images
    ]
    return Dataset(root, "class-folders", split, Task.CLASSIFY, tuple(by_class), samples)


def looks_split(root: Path) -> list[str]:
    """Names of splits, when the folders of a folder are splits with a folder a class, and not classes."""
    folders = [path for path in root.iterdir() if path.is_dir()]
    named = [path.name for path in folders if path.name in {"train", "val", "valid", "validation", "test"}]
    return named if folders and len(named) == len(folders) else []


def csv_classes(root: Path, split: str) -> Dataset:
    """A CSV file with a header: a column of images, one of classes, maybe one of splits.

    Args:
        root: the file, or a folder with one CSV file. Images are relative to the file's folder, or its ``images/``.
        split: rows to take, by the column ``split``.

    Raises:
        ConfigError: no file, a column or the split is missing, or a row has no class.
    """
    file = root if root.is_file() else _only_csv(root)
    rows = list(csv.DictReader(io.StringIO(read_text(file, "the table"))))
    columns = list(rows[0]) if rows else []
    image_column, class_column = _column(file, columns, IMAGE_COLUMNS), _column(file, columns, CLASS_COLUMNS)
    if split:
        if SPLIT_COLUMN not in columns:
            raise ConfigError(
                f"{file} has no column {SPLIT_COLUMN!r} to choose {split!r} from; it has {listing(columns)}"
            )
        splits = {row[SPLIT_COLUMN] for row in rows}
        rows = [row for row in rows if row[SPLIT_COLUMN] == split]
        if not rows:
            raise ConfigError(f"{file} has no rows of split {split!r}; {choices(split, splits)}")
    bases = [file.parent, file.parent / "images"]
    base = next((b for b in bases if any((b / row[image_column]).is_file() for row in rows[:20])), None)
    if base is None:
        raise ConfigError(
            f"the images of {file} were not found: looked for {listing(row[image_column] for row in rows[:2])} in "
            f"{listing(bases)}"
        )
    for number, row in enumerate(rows, start=2):
        if not row[class_column]:
            raise ConfigError(f"{file}, row {number}: no class in column {class_column!r}")
    samples = [Sample(row[image_column], base / row[image_column], row[class_column].strip()) for row in rows]
    return Dataset(root, "csv", split, Task.CLASSIFY, _classes(samples), samples)


def has_image_table(path: Path) -> bool:
    """Whether a CSV file has a column of images and one of classes."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = {name.strip() for name in file.readline().split(",")}
    return bool(header & set(IMAGE_COLUMNS) and header & set(CLASS_COLUMNS))


def file_names(root: Path, split: str) -> Dataset:
    """A folder of images whose names start with the class, up to the first ``_``: ``n01494475_hammerhead.JPEG``.

    Raises:
        ConfigError: no images, or a name without ``_``.
    """
    base = root / split if split else root
    images = images_in(base) if base.is_dir() else []
    if not images:
        raise ConfigError(f"there are no images in {base}; it has {inside(base)}")
    without = [image.name for image in images if "_" not in image.stem]
    if without:
        raise ConfigError(
            f"the class must stand before the first '_' of a file's name; {listing(without, 5)} have none"
        )
    samples = [Sample(image.relative_to(root).as_posix(), image, image.stem.split("_", 1)[0]) for image in images]
    return Dataset(root, "file-names", split, Task.CLASSIFY, _classes(samples), samples)


def names_have_wordnet_ids(images: Iterable[Path]) -> bool:
    """Whether file names start with WordNet ids, as ImageNet's do."""
    names = [image.name for image in images]
    return bool(names) and all(WORDNET_NAME.match(name) for name in names)


def _classes(samples: Iterable[Sample]) -> tuple[str, ...]:
    return tuple(sorted({str(sample.truth) for sample in samples}))


def _only_csv(root: Path) -> Path:
    found = sorted(path for path in root.glob("*.csv") if has_image_table(path)) if root.is_dir() else []
    if len(found) != 1:
        what = f"several: {listing(path.name for path in found)}; name one" if found else f"none; it has {inside(root)}"
        raise ConfigError(f"looked in {root} for one CSV file with a column of images and one of classes: {what}")
    return found[0]


def _column(file: Path, columns: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ConfigError(f"{file} needs one of the columns {listing(wanted)}; it has {listing(columns)}")
