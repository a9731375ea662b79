from __future__ import annotations

import numpy as np
import pytest

from vision_service.errors import ConfigError
from vision_service.evaluation.detection import score_detections
from vision_service.evaluation.voc import AnnotatedBoxes, read_voc_annotation
from vision_service.types import Detections

CAT, DOG = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]


def truth(*rows, difficult=()):
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    flags = np.array([index in difficult for index in range(len(rows))], np.bool_)
    return AnnotatedBoxes(boxes, tuple(name for _, name in rows), flags)


def found(*rows):
    return Detections(
        np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4),
        np.zeros(len(rows), np.int64),
        tuple(name for _, name, _ in rows),
        np.array([score for _, _, score in rows], np.float32),
    )


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([found()], {"cat": 0.0, "dog": 0.0}),
        ([found((CAT, "cat", 0.9), (DOG, "dog", 0.8))], {"cat": 1.0, "dog": 1.0}),
        ([found((CAT, "cat", 0.9), (DOG, "cat", 0.8))], {"cat": 1.0, "dog": 0.0}),
        ([found((DOG, "cat", 0.9), (CAT, "cat", 0.8))], {"cat": 0.5, "dog": 0.0}),
        ([found((CAT, "cat", 0.9), (CAT, "elephant", 0.95))], {"cat": 1.0, "dog": 0.0}),
    ],
)
def test_average_precision_by_hand(predictions, expected):
    score = score_detections(predictions, [truth((CAT, "cat"), (DOG, "dog"))])
    assert score.ap50_by_class == pytest.approx(expected, abs=1e-6)
    assert score.map50 == pytest.approx(sum(expected.values()) / 2, abs=1e-6)


def test_overlap_counts_in_the_stricter_figure():
    shifted = [0.0, 0.0, 10.0, 6.2]  # overlap 0.62: passes at 0.5, 0.55 and 0.6 of ten
    score = score_detections([found((shifted, "cat", 0.9))], [truth((CAT, "cat"))])
    assert (score.map50, score.map50_95) == pytest.approx((1.0, 0.3), abs=1e-6)


def test_difficult_objects_neither_help_nor_hurt():
    annotation = truth((CAT, "cat"), (DOG, "cat"), difficult={1})
    missed = score_detections([found((CAT, "cat", 0.5))], [annotation])
    seen = score_detections([found((CAT, "cat", 0.5), (DOG, "cat", 0.9))], [annotation])
    counted = score_detections([found((CAT, "cat", 0.5))], [truth((CAT, "cat"), (DOG, "cat"))])
    assert missed.map50 == seen.map50 == pytest.approx(1.0)
    assert counted.map50 == pytest.approx(0.5, abs=0.01)


def test_images_are_told_apart():
    score = score_detections([found(), found((CAT, "cat", 0.9))], [truth((CAT, "cat")), truth()])
    assert score.map50 == 0.0


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="1 predictions for 0"):
        score_detections([found()], [])
    with pytest.raises(ValueError, match="nothing to measure"):
        score_detections([found()], [truth()])


OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>{}</xmax>"
    "<ymax>8</ymax></bndbox></object>"
)


def test_voc_counts_from_one(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{OBJECT.format('cat', 0, 10)}{OBJECT.format('dog', 1, 5)}</annotation>")
    annotation = read_voc_annotation(path)
    assert annotation.boxes_xyxy.tolist() == [[0.0, 1.0, 10.0, 8.0], [0.0, 1.0, 5.0, 8.0]]
    assert annotation.class_names == ("cat", "dog")
    assert annotation.difficult.tolist() == [False, True]


def test_voc_image_without_objects(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation></annotation>")
    assert read_voc_annotation(tmp_path / "a.xml").boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        ("", "not a Pascal VOC annotation"),
        ("<annotation><object></object></annotation>", "no bndbox/xmin"),
        (f"<annotation>{OBJECT.format('cat', 0, 'ten')}</annotation>", "not a Pascal VOC annotation"),
        (f"<annotation>{OBJECT.format('cat', 0, 0)}</annotation>", "has no area"),
    ],
)
def test_wrong_voc_files(tmp_path, content, clause):
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(ConfigError, match=clause):
        read_voc_annotation(tmp_path / "a.xml")


def test_missing_voc_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.xml cannot be read"):
        read_voc_annotation(tmp_path / "none.xml")
