"""COCO's forms: results that ``loadRes`` of pycocotools reads, and masks as run lengths."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vision_service.errors import ConfigError
from vision_service.jobs.outputs.kinds import Model, file_of, models_for
from vision_service.records import Record

_OF_MASK = ("class_id", "class_name", "score")


@dataclass(frozen=True, slots=True)
class Ids:
    """Ids of a dataset's images and classes, so that results can be compared with its annotations.

    Attributes:
        images: by file name, and by path where the dataset's names are paths.
        categories: by class name.
    """

    images: dict[str, int]
    categories: dict[str, int]

    @classmethod
    def read(cls, annotations: Path) -> Ids:
        """From a file of COCO annotations.

        Raises:
            ConfigError: it is none.
        """
        try:
            content = json.loads(annotations.read_text("utf-8"))
            return cls(
                {image["file_name"]: int(image["id"]) for image in content["images"]},
                {one["name"]: int(one["id"]) for one in content["categories"]},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--coco-ids {annotations} is no file of COCO annotations: {error}") from None

    def image(self, file: str) -> int | None:
        """Id of an image; its longest known tail counts: ``val/a.jpg`` before ``a.jpg``."""
        parts = PurePosixPath(file).parts
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((self.images[tail] for tail in tails if tail in self.images), None)


def write_coco(records: Iterable[Record], folder: Path, models: Sequence[Model], ids: Ids | None) -> None:
    """``coco.json``, one a model where there are several, and ``coco_images.json``: which ids mean what.

    Args:
        records: of a job, an image's next to each other.
        folder: where to.
        models: that answered.
        ids: of a dataset; boxes of other images and classes are left out. ``None``: images are counted from 1 in the
            order of the results, categories are class ids.
    """
    chosen = models_for("coco", models)
    with _lists([file_of(folder, "coco", ".json", model, chosen) for model in chosen]) as lists:
        by_model = {(model.name, model.version): add for model, add in zip(chosen, lists, strict=True)}
        with _lists([folder / "coco_images.json"], _about_images(chosen, ids)) as (add_image,):
            last, image_id = None, 0
            for record in records:
                if record["task"] != "detect":
                    continue
                if record["file"] != last:
                    last = record["file"]
                    found = image_id + 1 if ids is None else ids.image(last)
                    if found is not None:
                        image_id = found
                        size = {"height": record["height"], "width": record["width"]}
                        add_image({"id": image_id, "file_name": last, **size})
                if found is not None:
                    for row in _results(record, image_id, ids):
                        by_model[record["model"], record["version"]](row)


def write_rle(records: Iterable[Record], folder: Path) -> None:
    """``rle.json``: every mask in COCO's form (``segmentation``, ``area``, ``bbox``), with its file and class."""
    from pycocotools import mask as coco

    with _lists([folder / "rle.json"]) as (add,):
        for record in records:
            about: dict[str, Any] = {
                name: record[name] for name in ("file", "frame", "model", "version") if name in record
            }
            for one in (*record.get("detections", ()), *record.get("segments", ())):
                if "mask" in one:
                    mask = {**one["mask"], "counts": one["mask"]["counts"].encode()}
                    row: dict[str, Any] = {**about, **{key: one[key] for key in _OF_MASK if key in one}}
                    add({**row, "bbox": _xywh(one["box"]), "area": int(coco.area(mask)), "segmentation": one["mask"]})


def _results(record: Record, image_id: int, ids: Ids | None) -> Iterator[dict[str, Any]]:
    for one in record["detections"]:
        category = one["class_id"] if ids is None else ids.categories.get(one["class_name"])
        if category is not None:
            mask = {"segmentation": one["mask"]} if "mask" in one else {}
            place = {"image_id": image_id, "category_id": category, "bbox": _xywh(one["box"])}
            yield {**place, "score": one["score"], **mask}


def _xywh(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, round(right - left, 2), round(bottom - top, 2)]


def _about_images(models: Sequence[Model], ids: Ids | None) -> tuple[str, str]:
    """What stands around the list of images: with the categories it is a file of annotations without any."""
    names = {name: i for model in models for i, name in enumerate(model.classes)} if ids is None else ids.categories
    categories = json.dumps([{"id": i, "name": name} for name, i in sorted(names.items(), key=lambda pair: pair[1])])
    return f'{{"annotations": [],\n"categories": {categories},\n"images": ', "}\n"


@contextmanager
def _lists(paths: Sequence[Path], around: tuple[str, str] = ("", "")) -> Iterator[list[Any]]:
    """Files that each hold one JSON list, written entry by entry: functions that add one."""
    files = [path.open("w", encoding="utf-8") for path in paths]
    try:
        for file in files:
            file.write(around[0] + "[")
        yield [_adder(file) for file in files]
        for file in files:
            file.write("]\n" + around[1])
    finally:
        for file in files:
            file.close()


def _adder(file: IO[str]) -> Any:
    first = True

    def add(entry: dict[str, Any]) -> None:
        nonlocal first
        file.write(("" if first else ",\n") + json.dumps(entry))
        first = False

    return add
