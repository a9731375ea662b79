from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import datasets_made as made
from vision_service.errors import ConfigError, InvalidImage
from vision_service.evaluation.datasets import open_dataset
from vision_service.evaluation.samples import MaskFile, Page, read_image, read_mask
from vision_service.types import VOID, Task

MAKERS = {"voc": made.make_voc, "coco": made.make_coco, "yolo": made.make_yolo}


@pytest.mark.parametrize("format", MAKERS)
def test_boxes_come_back_from_every_format(tmp_path, format):
    root = MAKERS[format](tmp_path / "data")
    dataset = open_dataset(root, Task.DETECT)
    assert dataset.format == format
    assert sorted(name.replace("diningtable", "dining table") for name in dataset.class_names) == sorted(made.NAMES)
    found = {}
    for sample in dataset.samples:
        assert isinstance(sample.image, Path)
        assert sample.image.is_file()
        assert (root / sample.name).is_file() or format == "coco"
        truth = sample.truth.in_pixels(made.SIZES[sample.image.stem])
        names = [name.replace("diningtable", "dining table") for name in truth.class_names]
        found[sample.image.stem] = [
            (n, pytest.approx(b, abs=1e-6)) for n, b in zip(names, truth.boxes_xyxy.tolist(), strict=True)
        ]
        if format != "yolo":
            assert sample.declared_hw == made.SIZES[sample.image.stem]
    assert {name: [(w, list(map(float, b))) for w, b in rows] for name, rows in made.BOXES.items()} == found


def test_coco_keeps_areas_crowds_and_the_order_of_categories(tmp_path):
    data = made.coco_dict()
    data["annotations"][0]["iscrowd"] = 1
    data["categories"].reverse()
    (tmp_path / "a.json").write_text(json.dumps(data))
    for name in made.BOXES:
        (tmp_path / f"{name}.jpg").write_bytes(made.photo(name).read_bytes())
    dataset = open_dataset(tmp_path / "a.json", Task.DETECT)
    truth = dataset.samples[0].truth
    assert truth.areas.tolist() == [380 * 501 / 2, 120 * 99 / 2]
    assert truth.difficult.tolist() == [True, False]
    assert dataset.class_names == made.NAMES


def test_splits_of_voc(tmp_path):
    root = made.make_voc(tmp_path / "data")
    assert len(open_dataset(root, Task.DETECT, split="val").samples) == 2
    everything = open_dataset(root, Task.DETECT)
    assert len(everything.samples) == 3
    assert everything.notes == ("no split was chosen, so all annotated images count; there are all, val",)
    with pytest.raises(ConfigError, match=r"no split 'vall': looked for .*vall.txt; did you mean 'val'"):
        open_dataset(root, Task.DETECT, split="vall")


def test_masks_of_voc_are_palette_pictures(tmp_path):
    root = made.make_voc(tmp_path / "data")
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets/Segmentation").mkdir()
    (root / "ImageSets/Segmentation/val.txt").write_text("chelsea\n")
    mask = np.zeros(made.SIZES["chelsea"], np.uint8)
    mask[:10], mask[10:12] = 8, VOID
    picture = Image.fromarray(mask).convert("P")
    picture.putpalette([value for index in range(256) for value in (index * 7 % 256, index * 3 % 256, index)])
    picture.save(root / "SegmentationClass/chelsea.png")
    dataset = open_dataset(root, Task.SEGMENT, split="val")
    assert (dataset.format, dataset.class_names[8]) == ("voc", "cat")
    assert np.array_equal(read_mask(dataset.samples[0].truth, len(dataset.class_names)), mask)


def test_yolo_rules(tmp_path):
    root = made.make_yolo(tmp_path / "data")
    (root / "labels/val/chelsea.txt").unlink()
    (root / "labels/val/coffee.txt").write_text("2 0.1 0.1 0.5 0.2 0.3 0.6\n")  # an outline
    dataset = open_dataset(root / "data.yaml", Task.DETECT)
    boxes = {sample.image.stem: sample.truth.boxes_xyxy.tolist() for sample in dataset.samples}
    assert boxes["chelsea"] == []
    assert boxes["coffee"] == [pytest.approx([0.1, 0.1, 0.5, 0.6])]
    assert "1 images have no file of labels" in dataset.notes[0]


@pytest.mark.parametrize(
    ("line", "clause"),
    [
        ("9 0.5 0.5 0.1 0.1", "line 1: class 9 is not in `names`"),
        ("0 0.5 0.5 0.1", "need a class and 4 numbers"),
        ("0 50 50 10 10", "shares of the image's size"),
        ("cat 0.5 0.5 0.1 0.1", "need numbers"),
    ],
)
def test_wrong_labels_of_yolo(tmp_path, line, clause):
    root = made.make_yolo(tmp_path / "data")
    (root / "labels/val/coffee.txt").write_text(line)
    with pytest.raises(ConfigError, match=clause):
        open_dataset(root, Task.DETECT)


def test_binary_masks(tmp_path):
    dataset = open_dataset(made.make_masks(tmp_path / "data"), Task.SEGMENT)
    assert dataset.class_names == ("background", "foreground")
    mask = read_mask(dataset.samples[0].truth, 2)
    assert mask[10:511, 20:400].all()
    assert mask.sum() == 380 * 501


def test_class_ids_need_names(tmp_path):
    root = made.make_masks(tmp_path / "data")
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3).save(root / "masks/astronaut.png")
    with pytest.raises(ConfigError, match=r"has the values 0, 1, 2: class ids need names, in a file classes.txt"):
        open_dataset(root, Task.SEGMENT)
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    dataset = open_dataset(root, Task.SEGMENT)
    assert dataset.class_names == ("background", "cat", "dog")
    assert read_mask(dataset.samples[0].truth, 3).max() == 2
    (tmp_path / "names").write_text("a\nb\nc\n")
    assert open_dataset(root, Task.SEGMENT, classes=tmp_path / "names").class_names == ("a", "b", "c")


def test_stacks(tmp_path):
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (3, 8, 9), np.uint8), 255 * rng.integers(0, 2, (3, 8, 9), np.uint8)
    for name, pages in (("train-volume.tif", images), ("train-labels.tif", masks)):
        first, *others = (Image.fromarray(page) for page in pages)
        first.save(tmp_path / name, save_all=True, append_images=others)
    dataset = open_dataset(tmp_path, Task.SEGMENT)
    assert [sample.name for sample in dataset.samples] == [f"train-volume.tif[{i}]" for i in range(3)]
    for at, sample in enumerate(dataset.samples):
        assert np.array_equal(read_image(sample.image), images[at])
        assert np.array_equal(read_mask(sample.truth, 2), masks[at] // 255)
    first, *others = (Image.fromarray(page) for page in masks[:2])
    first.save(tmp_path / "train-labels.tif", save_all=True, append_images=others)
    with pytest.raises(ConfigError, match=r"3 pictures and .* 2; there must be a mask an image"):
        open_dataset(tmp_path, Task.SEGMENT)


def test_a_missing_page():
    with pytest.raises(InvalidImage, match=r"page 3 of .* cannot be read"):
        read_mask(MaskFile(Page(made.photo("coffee"), 3)), 2)


@pytest.mark.parametrize(
    ("make", "format", "classes"),
    [
        (made.make_class_folders, "class-folders", made.CLASSES),
        (made.make_csv, "csv", made.CLASSES),
        (made.make_file_names, "file-names", made.WORDNET),
    ],
)
def test_classes_come_back_from_every_format(tmp_path, make, format, classes):
    dataset = open_dataset(make(tmp_path / "data"), Task.CLASSIFY)
    assert dataset.format == format
    assert {sample.image.stem.split("_")[-1]: sample.truth for sample in dataset.samples} == classes
    assert sorted(dataset.class_names) == sorted(classes.values())


def test_splits_of_classes(tmp_path):
    assert len(open_dataset(made.make_csv(tmp_path / "csv"), Task.CLASSIFY, split="test").samples) == 2
    with pytest.raises(ConfigError, match="no rows of split 'val'; there are: 'test', 'train'"):
        open_dataset(tmp_path / "csv", Task.CLASSIFY, split="val")
    made.make_class_folders(tmp_path / "folders/val")
    assert len(open_dataset(tmp_path / "folders", Task.CLASSIFY, split="val").class_names) == 3


def test_several_coco_files_need_a_split(tmp_path):
    root = made.make_coco(tmp_path / "data")
    (root / "annotations/instances_train2017.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"there are several, say which by --split; there are: 'train2017', 'val2017'"
    ):
        open_dataset(root, Task.DETECT)
    assert len(open_dataset(root, Task.DETECT, split="val2017").samples) == 3


def _without_images(root):
    made.make_coco(root)
    for path in (root / "val2017").iterdir():
        path.unlink()


def _unknown_category(root):
    made.make_coco(root)
    file = root / "annotations/instances_val2017.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["category_id"] = 5
    file.write_text(json.dumps(data))


def _one_mask_short(root):
    made.make_masks(root)
    (root / "masks/coffee.png").unlink()


def _splits_only(root):
    made.make_class_folders(root / "train")
    made.make_class_folders(root / "test")


@pytest.mark.parametrize(
    ("prepare", "task", "format", "clause"),
    [
        (lambda root: root.mkdir(), Task.DETECT, "", r"looked for COCO .*Pascal VOC .*YOLO .*it has nothing in it"),
        (made.make_masks, Task.DETECT, "", "is no dataset for a detect model: .*it has images/, masks/"),
        (made.make_masks, Task.DETECT, "voc", r"no folder for the XML files of Pascal VOC: looked for Annotations"),
        (made.make_masks, Task.DETECT, "yolo", "has no data.yaml"),
        (made.make_masks, Task.DETECT, "coco", "no annotations in COCO's format: looked for annotations/instances"),
        (made.make_voc, Task.SEGMENT, "", r"looked for images/ and masks/"),
        (made.make_voc, Task.SEGMENT, "masks", "no folder for masks: looked for masks"),
        (
            made.make_masks,
            Task.DETECT,
            "masks",
            "no format 'masks' for a detect model; there are: 'coco', 'voc', 'yolo'",
        ),
        (made.make_masks, Task.TRANSLATE, "", "a translate model cannot be evaluated"),
        (_without_images, Task.DETECT, "", r"images of .* were not found: looked for astronaut.jpg.* in .*val2017"),
        (_unknown_category, Task.DETECT, "", "astronaut.jpg: category 5 is not among the categories"),
        (_one_mask_short, Task.SEGMENT, "", "1 of 3 images have no mask: coffee; looked in .*masks for files"),
        (made.make_voc, Task.CLASSIFY, "csv", "one CSV file with a column of images and one of classes: none; it has"),
        (_splits_only, Task.CLASSIFY, "csv", "none; it has test/, train/"),
    ],
)
def test_wrong_datasets_say_what_was_looked_for(tmp_path, prepare, task, format, clause):
    prepare(tmp_path / "data")
    with pytest.raises(ConfigError, match=clause):
        open_dataset(tmp_path / "data", task, format=format)


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"the dataset .*none does not exist"):
        open_dataset(tmp_path / "none", Task.DETECT)


def test_folders_of_splits_are_not_classes(tmp_path):
    _splits_only(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"its folders are splits, choose one by --split \(test, train\)"):
        open_dataset(tmp_path / "data", Task.CLASSIFY)
    assert len(open_dataset(tmp_path / "data", Task.CLASSIFY, split="test").samples) == 3


def test_names_for_masks_alone(tmp_path):
    (tmp_path / "names").write_text("a\n")
    with pytest.raises(ConfigError, match="--classes names the class ids in masks"):
        open_dataset(made.make_voc(tmp_path / "data"), Task.DETECT, classes=tmp_path / "names")


@pytest.mark.parametrize("what", ["bccd", "voc30", "isbi2012", "imagenet100"])
def test_the_shared_data_is_recognised(shared, what):
    task, format, count = {
        "bccd": (Task.DETECT, "voc", 364),
        "voc30": (Task.DETECT, "voc", 30),
        "isbi2012": (Task.SEGMENT, "masks", 30),
        "imagenet100": (Task.CLASSIFY, "file-names", 100),
    }[what]
    dataset = open_dataset(shared / "data" / what, task)
    assert (dataset.format, len(dataset.samples)) == (format, count)
