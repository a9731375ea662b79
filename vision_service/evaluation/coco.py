"""COCO's JSON for objects ("instances"): images, categories, boxes in one file."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from vision_service.errors import ConfigError, choices
from vision_service.evaluation.places import inside, listing, read_text
from vision_service.evaluation.samples import AnnotatedBoxes, Dataset, Sample
from vision_service.types import Task


def coco_boxes(root: Path, split: str) -> Dataset:
    """A JSON file, or a folder that has one.

    Args:
        root: the file; or a folder with ``annotations/instances_SPLIT.json``, ``SPLIT/_annotations.coco.json`` or one
            JSON file that is COCO's.
        split: of a folder that has several.

    Raises:
        ConfigError: no such file, several and no split, or not COCO's; says what was looked for.
    """
    file = root if root.is_file() else _find(root, split)
    try:
        data = json.loads(read_text(file, "the annotation file"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    try:
        return _dataset(data, file, root, split)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} is not COCO's format: {type(error).__name__} {error}; it needs lists `images` (id, file_name), "
            "`categories` (id, name) and `annotations` (image_id, category_id, bbox)"
        ) from None


def coco_files(root: Path) -> list[Path]:
    """The JSON files in a folder that could hold objects in COCO's format."""
    found = [*root.glob("*.json"), *root.glob("annotations/*.json"), *root.glob("*/_annotations.coco.json")]
    return sorted({path for path in found if is_coco(path)})


def is_coco(path: Path) -> bool:
    """Whether a JSON file starts like, or has the name of, an object annotation in COCO's format."""
    name = path.name.lower()
    if name.startswith(("captions_", "person_keypoints_", "panoptic_", "stuff_")):
        return False
    if name.startswith("instances_") or name == "_annotations.coco.json":
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(4096).lstrip("\ufeff \n\r\t")
    keys = ('"images"', '"annotations"', '"categories"', '"info"', '"licenses"')
    return start.startswith("{") and any(key in start for key in keys)


def _find(root: Path, split: str) -> Path:
    files = coco_files(root)
    chosen = [path for path in files if not split or _split_of(path) == split]
    if len(chosen) == 1:
        return chosen[0]
    if chosen or files:
        problem = f"no split {split!r}" if split else "there are several, say which by --split"
        raise ConfigError(f"{root}: {problem}; {choices(split, {_split_of(path) for path in files})}")
    raise ConfigError(
        f"{root} has no annotations in COCO's format: looked for annotations/instances_SPLIT.json, "
        f"SPLIT/_annotations.coco.json and *.json; it has {inside(root)}"
    )


def _split_of(path: Path) -> str:
    if path.name == "_annotations.coco.json":
        return path.parent.name
    return path.stem.removeprefix("instances_")


def _dataset(data: Any, file: Path, root: Path, split: str) -> Dataset:
    names = {int(row["id"]): str(row["name"]) for row in data["categories"]}
    if len(set(names.values())) != len(names):
        raise ConfigError(f"{file}: two categories have one name: {listing(sorted(names.values()))}")
    rows: dict[int, list[Any]] = defaultdict(list)
    for row in data["annotations"]:
        rows[int(row["image_id"])].append(row)
    unknown = rows.keys() - {int(image["id"]) for image in data["images"]}
    if unknown:
        raise ConfigError(f"{file}: annotations are of images that it does not list: {listing(sorted(unknown))}")
    folder = _image_folder(file, root, split, [str(image["file_name"]) for image in data["images"][:20]])
    samples = []
    for image in data["images"]:
        truth = _truth(rows.get(int(image["id"]), []), names, f"{file}: image {image['file_name']}")
        declared = (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None
        samples.append(Sample(str(image["file_name"]), folder / str(image["file_name"]), truth, declared))
    return Dataset(root, "coco", split, Task.DETECT, tuple(names[i] for i in sorted(names)), samples)


def _truth(rows: list[Any], names: dict[int, str], where: str) -> AnnotatedBoxes:
    xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    if not bool(np.isfinite(xywh).all() and (xywh[:, 2:] >= 0).all()):
        raise ConfigError(f"{where}: a box is not finite or has a negative size")
    missing = {int(row["category_id"]) for row in rows} - names.keys()
    if missing:
        raise ConfigError(f"{where}: category {listing(sorted(missing))} is not among the categories")
    areas = [float(row.get("area", width * height)) for row, (_, _, width, height) in zip(rows, xywh, strict=True)]
    return AnnotatedBoxes(
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        tuple(names[int(row["category_id"])] for row in rows),
        np.array([bool(row.get("iscrowd", 0)) for row in rows], np.bool_),
        np.array(areas, np.float64),
    )


def _image_folder(file: Path, root: Path, split: str, names: list[str]) -> Path:
    """Where the images lie that a file names; the first folder that has any of them."""
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    wanted = dict.fromkeys(
        [
            file.parent,
            base / _split_of(file),
            base / "images" / _split_of(file),
            base / "images",
            base / "JPEGImages",
            base / "data",
            base,
            *([root / split] if root.is_dir() and split else []),
        ]
    )
    for folder in wanted:
        if any((folder / name).is_file() for name in names):
            return folder
    raise ConfigError(
        f"the images of {file} were not found: looked for {listing(names, 2)} in {listing(wanted)}; put the file "
        "beside the images, or the images into a folder of one of these names"
    )
