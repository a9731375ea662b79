"""YOLO folders: ``data.yaml`` with class names and splits, and a text file an image with relative boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vision_service.errors import ConfigError, choices
from vision_service.evaluation.places import inside, listing, read_text
from vision_service.evaluation.samples import AnnotatedBoxes, Dataset, Sample, images_in
from vision_service.types import Task

SPLITS = ("train", "val", "valid", "test")


def find_yaml(root: Path) -> Path | None:
    """The file that describes a YOLO dataset, if there is one."""
    if root.is_file():
        return root if root.suffix in {".yaml", ".yml"} else None
    places = [root / "data.yaml", root / "data.yml", root / "dataset.yaml", *sorted(root.glob("*.y*ml"))]
    return next((path for path in places if path.is_file()), None)


def yolo_boxes(root: Path, split: str) -> Dataset:
    """A folder with ``data.yaml``, ``images/`` and ``labels/`` (or the file itself).

    Args:
        root: the folder or its YAML file.
        split: a key of that file, as ``val``; empty: ``val``.

    Raises:
        ConfigError: a part is missing or wrong; says what was looked for.
    """
    file = find_yaml(root)
    if file is None:
        raise ConfigError(f"{root} has no data.yaml, so it is no YOLO dataset; it has {inside(root)}")
    data = _read_yaml(file)
    names = _names(data, file)
    split = split or ("valid" if "val" not in data and "valid" in data else "val")
    if split not in data:
        raise ConfigError(f"{file} has no split {split!r}; {choices(split, [key for key in SPLITS if key in data])}")
    images = [image for place in _places(data, file, split) for image in _images(place, file, split)]
    base = file.parent
    samples, without = [], 0
    for image in images:
        labels = _label_file(image)
        without += not labels.is_file()
        name = image.relative_to(base).as_posix() if image.is_relative_to(base) else image.as_posix()
        samples.append(Sample(name, image, _read_labels(labels, names)))
    if samples and without == len(samples):
        raise ConfigError(f"none of the {without} images has labels: looked for {_label_file(samples[0].image)}")  # type: ignore[arg-type]
    notes = (f"{without} images have no file of labels: by YOLO's rule they show nothing",) if without else ()
    return Dataset(root, "yolo", split, Task.DETECT, tuple(names[i] for i in sorted(names)), samples, notes)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(read_text(file, "the dataset file"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or "names" not in data:
        raise ConfigError(f"{file} has no `names`, so it does not describe a YOLO dataset")
    return data


def _names(data: dict[str, Any], file: Path) -> dict[int, str]:
    names = data["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(str(key).isdecimal() for key in names):
        raise ConfigError(f"{file}: `names` must be a list of class names, or ids with names")
    found = {int(key): str(value) for key, value in names.items()}
    if len(set(found.values())) != len(found):
        raise ConfigError(f"{file}: two classes have one name: {listing(found.values())}")
    return found


def _places(data: dict[str, Any], file: Path, split: str) -> list[Path]:
    """Folders or lists of images of a split: where they exist of the readings that are in use."""
    base = file.parent / str(data["path"]) if data.get("path") else file.parent
    entries = data[split] if isinstance(data[split], list) else [data[split]]
    found = []
    for entry in map(str, entries):
        # Exports write `../train/images` although the folder lies beside the file.
        tried = [base / entry, file.parent / entry, file.parent / entry.removeprefix("../")]
        place = next((path for path in tried if path.exists()), None)
        if place is None:
            raise ConfigError(f"{file}: {split} is {entry!r}; looked for {listing(dict.fromkeys(tried))}")
        found.append(place)
    return found


def _images(place: Path, file: Path, split: str) -> list[Path]:
    if place.is_file():  # a list of images, relative to it
        lines = [line.strip() for line in read_text(place, "the list of images").splitlines() if line.strip()]
        return [place.parent / line for line in lines]
    found = images_in(place, deep=True)
    if not found:
        raise ConfigError(f"{file}: there are no images for {split} in {place}")
    return found


def _label_file(image: Path) -> Path:
    """YOLO's rule: the last folder ``images`` in the path becomes ``labels``."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(path: Path, names: dict[int, str]) -> AnnotatedBoxes:
    lines = read_text(path, "the labels").splitlines() if path.is_file() else []
    class_names, boxes = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        class_id, box = _row(line, f"{path}, line {number}")
        if class_id not in names:
            raise ConfigError(f"{path}, line {number}: class {class_id} is not in `names` (0 to {max(names)})")
        class_names.append(names[class_id])
        boxes.append(box)
    array = np.array(boxes, np.float64).reshape(-1, 4)
    return AnnotatedBoxes(array, tuple(class_names), np.zeros(len(array), np.bool_), is_relative=True)


def _row(line: str, where: str) -> tuple[int, list[float]]:
    """Class and box (x1, y1, x2, y2, shares of the image) of ``class cx cy w h`` or ``class x y x y x y ...``."""
    words = line.split()
    try:
        class_id, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise ConfigError(f"{where}: need numbers, got {line[:60]!r}") from None
    if len(values) == 4:
        cx, cy, width, height = values
        box = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    elif len(values) >= 6 and len(values) % 2 == 0:  # the outline of a mask
        box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    else:
        raise ConfigError(f"{where}: need a class and 4 numbers, or an outline of 3 points or more, got {line[:60]!r}")
    if not bool(np.isfinite(box).all()) or box[2] < box[0] or box[3] < box[1] or max(map(abs, box)) > 2:
        raise ConfigError(f"{where}: boxes are shares of the image's size, 0 to 1, got {line[:60]!r}")
    return class_id, box
