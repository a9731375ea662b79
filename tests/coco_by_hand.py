"""pycocotools, called as its documentation says, from raw annotations: an oracle without code of the package."""

import contextlib
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

STATS = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("recall_1", "recall_10", "recall_max", "recall_small", "recall_medium", "recall_large"),
)


def voc_to_coco(files):
    """COCO's dictionary of Pascal VOC's XML files by the usual rule (as in Detectron): from 0, end excluded."""
    images, annotations, names = [], [], []
    for image_id, file in enumerate(files, start=1):
        images.append({"id": image_id, "file_name": Path(file).stem})
        for item in ET.parse(file).getroot().iter("object"):
            name = item.find("name").text
            if name not in names:
                names.append(name)
            x1, y1, x2, y2 = (float(item.find("bndbox").find(k).text) for k in ("xmin", "ymin", "xmax", "ymax"))
            width, height = x2 - (x1 - 1), y2 - (y1 - 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": names.index(name) + 1,
                    "bbox": [x1 - 1, y1 - 1, width, height],
                    "area": width * height,
                    "iscrowd": int(item.find("difficult") is not None and item.find("difficult").text.strip() == "1"),
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_stats(truths, guesses):
    """The twelve figures that pycocotools prints, by name, and the AP of each category."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = json.loads(json.dumps(truths))
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(json.loads(json.dumps(guesses))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {name: None if value < 0 else value for name, value in zip(STATS, evaluation.stats.tolist(), strict=True)}
    by_class = {}
    for index, category in enumerate(truths["categories"]):
        precision = evaluation.eval["precision"][:, :, index, 0, 2]
        by_class[category["name"]] = float(precision.mean()) if precision.min() >= 0 else None
    return stats, by_class


def guesses_of(predictions, truths, names=None):
    """Result dictionaries of `Detections`, an image each in the order of the truths; ``names`` renames classes."""
    ids = {category["name"]: category["id"] for category in truths["categories"]}
    rows = []
    for image, found in zip(truths["images"], predictions, strict=True):
        for box, name, score in zip(found.boxes_xyxy, found.class_names, found.scores, strict=True):
            category = ids.get((names or {}).get(name, name))
            if category is not None:
                x1, y1, x2, y2 = (float(v) for v in box)
                rows.append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(score),
                    }
                )
    return rows


def guessed(truths, image_id, rng, names):
    """A detector that errs: boxes that are moved, of the wrong class, twice, or where nothing is."""
    rows = []
    for row in truths["annotations"]:
        if row["image_id"] != image_id or rng.random() < 0.15:
            continue
        x, y, w, h = row["bbox"]
        for _ in range(1 + (rng.random() < 0.2)):
            dx, dy, dw, dh = rng.normal(0, 0.12, 4)
            name = names[row["category_id"] - 1] if rng.random() < 0.9 else names[rng.integers(len(names))]
            box = [x + dx * w, y + dy * h, x + dx * w + w * np.exp(dw), y + dy * h + h * np.exp(dh)]
            rows.append((box, name, round(float(rng.uniform(0.2, 1.0)), 2)))  # two digits, so that scores tie
    for _ in range(int(rng.integers(0, 5))):
        x, y, w, h = rng.uniform(0, 300, 2).tolist() + rng.uniform(5, 150, 2).tolist()
        rows.append(([x, y, x + w, y + h], names[rng.integers(len(names))], round(float(rng.uniform(0, 0.7)), 2)))
    rows.sort(key=lambda row: -row[2])
    return rows
