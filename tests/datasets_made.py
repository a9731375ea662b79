"""Tiny datasets out of the project's photos, in every format."""

import csv
import json
import shutil

import cv2
import numpy as np

from tests.helpers import ROOT

SIZES = {"astronaut": (512, 512), "chelsea": (300, 451), "coffee": (400, 600)}
"""Height and width."""
BOXES = {
    "astronaut": [("person", (20, 10, 400, 511)), ("chair", (300, 1, 420, 100))],
    "chelsea": [("cat", (60, 20, 440, 299))],
    "coffee": [("cup", (150, 60, 440, 290)), ("dining table", (1, 1, 600, 400))],
}
"""Rough ones: x1, y1, x2, y2 in pixels, edges."""
NAMES = ("cat", "chair", "cup", "dining table", "person")


def photo(name):
    return ROOT / "samples" / f"{name}.jpg"


def make_voc(root, masks=False):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, rows in BOXES.items():
        shutil.copy(photo(name), root / "JPEGImages")
        height, width = SIZES[name]
        objects = "".join(
            f"<object><name>{what.replace('dining table', 'diningtable')}</name><difficult>0</difficult><bndbox>"
            f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for what, (x1, y1, x2, y2) in rows
        )
        text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets/Main/val.txt").write_text("astronaut\ncoffee\n")
    (root / "ImageSets/Main/all.txt").write_text("astronaut\nchelsea\ncoffee\n")
    (root / "ImageSets/Main/cat_val.txt").write_text("astronaut -1\n")
    return root


def coco_dict():
    images, annotations = [], []
    for index, (name, rows) in enumerate(BOXES.items(), start=7):
        height, width = SIZES[name]
        images.append({"id": index, "file_name": f"{name}.jpg", "height": height, "width": width})
        for what, (x1, y1, x2, y2) in rows:
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": index, "category_id": 10 * NAMES.index(what) + 1}
            annotations.append(row | {"bbox": box, "area": box[2] * box[3] / 2, "iscrowd": 0})
    categories = [{"id": 10 * index + 1, "name": name} for index, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_coco(root, split="val2017"):
    (root / "annotations").mkdir(parents=True)
    (root / split).mkdir()
    for name in BOXES:
        shutil.copy(photo(name), root / split)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(coco_dict()))
    (root / f"annotations/captions_{split}.json").write_text("{}")
    return root


def make_yolo(root):
    for folder in ("images/val", "labels/val"):
        (root / folder).mkdir(parents=True)
    for name, rows in BOXES.items():
        shutil.copy(photo(name), root / "images/val")
        height, width = SIZES[name]
        lines = [
            f"{NAMES.index(what)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
            f"{(x2 - x1) / width} {(y2 - y1) / height}"
            for what, (x1, y1, x2, y2) in rows
        ]
        (root / "labels/val" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    names = "\n".join(f"  {index}: {name}" for index, name in enumerate(NAMES))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return root


def make_masks(root, suffix=".png"):
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name, rows in BOXES.items():
        shutil.copy(photo(name), root / "images")
        mask = np.zeros(SIZES[name], np.uint8)
        for what, (x1, y1, x2, y2) in rows:
            if what == "person":
                mask[y1:y2, x1:x2] = 255
        cv2.imwrite(str(root / "masks" / f"{name}{suffix}"), mask)
    return root


CLASSES = {"astronaut": "space_shuttle", "chelsea": "Egyptian_cat", "coffee": "espresso"}
WORDNET = {"astronaut": "n04266014", "chelsea": "n02124075", "coffee": "n07920052"}


def make_class_folders(root):
    for name, what in CLASSES.items():
        (root / what).mkdir(parents=True)
        shutil.copy(photo(name), root / what)
    return root


def make_csv(root):
    (root / "images").mkdir(parents=True)
    with (root / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "class", "split"])
        for name, what in CLASSES.items():
            shutil.copy(photo(name), root / "images")
            table.writerow([f"{name}.jpg", what, "train" if name == "coffee" else "test"])
    return root


def make_file_names(root):
    root.mkdir(parents=True)
    for name, wordnet_id in WORDNET.items():
        shutil.copy(photo(name), root / f"{wordnet_id}_{name}.jpg")
    return root
