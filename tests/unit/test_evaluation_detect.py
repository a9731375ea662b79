from __future__ import annotations

import json

import numpy as np
import pytest

from tests.coco_by_hand import coco_stats, guessed, guesses_of, voc_to_coco
from vision_service.errors import ConfigError
from vision_service.evaluation.classes import map_classes
from vision_service.evaluation.compare import resampled
from vision_service.evaluation.detect import DetectionScorer, DetectOptions
from vision_service.evaluation.samples import AnnotatedBoxes, Dataset, Sample
from vision_service.evaluation.voc import voc_boxes
from vision_service.types import Detections, Result, Task


def detections(rows, names):
    return Detections(
        np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4),
        np.array([names.index(name) for _, name, _ in rows], np.int64),
        tuple(name for _, name, _ in rows),
        np.array([score for _, _, score in rows], np.float32),
    )


def result(prediction, hw=(480, 640)):
    return Result(prediction, hw, "m", "1")


def scored(dataset, predictions, model_names, **options):
    scorer = DetectionScorer(dataset, map_classes(model_names, dataset.class_names), DetectOptions(**options))
    for sample, prediction in zip(dataset.samples, predictions, strict=True):
        scorer.add(sample, result(prediction))
    return scorer, scorer.finish()


def truth(rows, difficult=()):
    boxes = np.array([box for box, _ in rows], np.float64).reshape(-1, 4)
    flags = np.array([i in difficult for i in range(len(rows))], np.bool_)
    return AnnotatedBoxes(boxes, tuple(name for _, name in rows), flags)


def made(tmp_path, truths, names):
    samples = [Sample(f"{i}.jpg", tmp_path / f"{i}.jpg", one) for i, one in enumerate(truths)]
    return Dataset(tmp_path, "voc", "", Task.DETECT, tuple(names), samples)


def random_dataset(tmp_path, rng, count=25, names=("cat", "cow", "dog")):
    """A dataset of random boxes, some of them difficult, and what a bad detector finds; both raw and as ours."""
    truths, raw = [], {"images": [], "annotations": [], "categories": []}
    raw["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    for image_id in range(1, count + 1):
        raw["images"].append({"id": image_id})
        rows, difficult = [], set()
        for k in range(int(rng.integers(0, 6))):
            x, y = rng.uniform(0, 300, 2)
            w, h = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            category = int(rng.integers(len(names)))
            rows.append(([x, y, x + w, y + h], names[category]))
            if rng.random() < 0.15:
                difficult.add(k)
            raw["annotations"].append(
                {
                    "id": len(raw["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(k in difficult),
                }
            )
        truths.append(truth(rows, difficult))
    guesses = [guessed(raw, image_id, rng, names) for image_id in range(1, count + 1)]
    return made(tmp_path, truths, names), raw, [detections(rows, list(names)) for rows in guesses]


def check_against_oracle(scores, raw, predictions):
    stats, by_class = coco_stats(raw, guesses_of(predictions, raw))
    for name, value in stats.items():
        if name in scores.metrics:
            assert scores.metrics[name] == pytest.approx(value, abs=1e-9), name
    assert {row["class_name"]: row["ap"] for row in scores.per_class} == pytest.approx(by_class, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_pycocotools(tmp_path, seed):
    dataset, raw, predictions = random_dataset(tmp_path, np.random.default_rng(seed))
    _, scores = scored(dataset, predictions, dataset.class_names)
    assert scores.metrics["map50"] > 0.1
    check_against_oracle(scores, raw, predictions)


def test_the_files_that_are_saved_give_the_same_figures(tmp_path):
    dataset, _, predictions = random_dataset(tmp_path, np.random.default_rng(8))
    scorer, scores = scored(dataset, predictions, dataset.class_names)
    scorer.write_coco(tmp_path / "coco")
    saved = [json.loads((tmp_path / "coco" / f"{name}.json").read_text()) for name in ("annotations", "predictions")]
    stats, _ = coco_stats(*saved)
    assert scores.metrics["map"] == pytest.approx(stats["map"], abs=1e-9)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_bccd_agrees_with_pycocotools(shared, split):
    root = shared / "data/bccd"
    dataset = voc_boxes(root, split)
    stems = (root / "ImageSets/Main" / f"{split}.txt").read_text().split()
    raw = voc_to_coco([root / "Annotations" / f"{stem}.xml" for stem in stems])
    rng = np.random.default_rng(5)
    names = ["RBC", "WBC", "Platelets"]
    ordered = [category["name"] for category in raw["categories"]]
    predictions = [detections(guessed(raw, image["id"], rng, ordered), names) for image in raw["images"]]
    _, scores = scored(dataset, predictions, names)
    check_against_oracle(scores, raw, predictions)


def test_voc30_agrees_with_pycocotools(shared):
    dataset = voc_boxes(shared / "data/voc30", "")
    raw = voc_to_coco(sorted((shared / "data/voc30/annotations").glob("*.xml")))
    rng = np.random.default_rng(6)
    ordered = [category["name"] for category in raw["categories"]]
    predictions = [detections(guessed(raw, image["id"], rng, ordered), ordered) for image in raw["images"]]
    _, scores = scored(dataset, predictions, ordered)
    assert sum(row["iscrowd"] for row in raw["annotations"]) == 8
    check_against_oracle(scores, raw, predictions)


def test_weighted_images_are_repeated_images(tmp_path):
    rng = np.random.default_rng(3)
    dataset, raw, predictions = random_dataset(tmp_path, rng, count=12)
    _, scores = scored(dataset, predictions, dataset.class_names)
    weigher = resampled(Task.DETECT, scores.images, len(dataset.class_names))
    whole = weigher.metrics(np.ones(12))
    assert whole == pytest.approx({name: scores.metrics[name] for name in whole}, abs=1e-12)
    for _ in range(5):
        weights = rng.multinomial(12, np.full(12, 1 / 12))
        repeated = {"images": [], "annotations": [], "categories": raw["categories"]}
        found = []
        for at in np.repeat(np.arange(12), weights):
            new_id = len(found) + 1
            repeated["images"].append({"id": new_id})
            repeated["annotations"] += [
                row | {"id": len(repeated["annotations"]) + 1 + k, "image_id": new_id}
                for k, row in enumerate(r for r in raw["annotations"] if r["image_id"] == at + 1)
            ]
            found.append(predictions[at])
        stats, _ = coco_stats(repeated, guesses_of(found, repeated))
        weighed = weigher.metrics(weights.astype(np.float64))
        assert weighed == pytest.approx({name: stats[name] for name in weighed}, abs=1e-9)


CAT, DOG, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [100.0, 100.0, 120.0, 120.0]


def test_a_record_says_which_is_which(tmp_path):
    dataset = made(tmp_path, [truth([(CAT, "cat"), (DOG, "cat"), (FAR, "cat")], difficult={2})], ["cat"])
    rows = [(CAT, "cat", 0.9), (CAT, "cat", 0.8), (FAR, "cat", 0.7), ([0.0, 0.0, 10.0, 6.2], "cat", 0.6)]
    _, scores = scored(dataset, [detections(rows, ["cat"])], ["cat"])
    (record,) = scores.images
    assert [row[6] for row in record["truth"]] == [0, -1, 2]
    assert [row[6] for row in record["found"]] == [1023, 0, 0, 0]
    assert [row[7] for row in record["found"]] == [0, 0, 1023, 0]
    assert (record["right"], record["wrong"], record["missed"]) == (1, 0, 1)
    assert scores.metrics["best_f1_score"] == pytest.approx(0.9)
    assert scores.metrics["best_f1"] == pytest.approx(2 / 3)


def test_unmapped_predictions_are_dropped_or_errors(tmp_path):
    dataset = made(tmp_path, [truth([(CAT, "cat")])], ["cat"])
    rows = [(FAR, "giraffe", 0.95), (CAT, "cat", 0.9)]
    prediction = detections(rows, ["cat", "giraffe"])
    _, ignored = scored(dataset, [prediction], ["cat", "giraffe"], unmapped="ignore")
    _, counted = scored(dataset, [prediction], ["cat", "giraffe"], unmapped="count")
    assert ignored.metrics["map"] == counted.metrics["map"] == pytest.approx(1.0)
    assert [one.images[0]["wrong"] for one in (ignored, counted)] == [0, 1]
    assert [row[0] for row in counted.images[0]["found"]] == [-1, 0]
    assert counted.images[0]["truth"][0][6] == 1  # the index counts dropped ones too


def test_classes_that_the_model_lacks_count_as_zero(tmp_path):
    dataset = made(tmp_path, [truth([(CAT, "cat"), (DOG, "dog")])], ["cat", "dog"])
    _, scores = scored(dataset, [detections([(CAT, "cat", 0.9)], ["cat"])], ["cat"])
    assert scores.metrics["map"] == pytest.approx(0.5)
    assert scores.metrics["map_known_classes"] == pytest.approx(1.0)


def test_difficult_can_be_counted(tmp_path):
    dataset = made(tmp_path, [truth([(CAT, "cat"), (DOG, "cat")], difficult={1})], ["cat"])
    found = [detections([(CAT, "cat", 0.9)], ["cat"])]
    _, ignored = scored(dataset, found, ["cat"])
    _, counted = scored(dataset, found, ["cat"], difficult="count")
    assert ignored.metrics["map50"] == pytest.approx(1.0)
    assert counted.metrics["map50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize(("most", "expected"), [(1, 51 / 101), (5, 1.0), (100, 1.0)])
def test_most_detections_count(tmp_path, most, expected):
    dataset = made(tmp_path, [truth([(CAT, "cat"), (DOG, "cat")])], ["cat"])
    found = detections([(CAT, "cat", 0.9), (DOG, "cat", 0.8)], ["cat"])
    scorer, scores = scored(dataset, [found], ["cat"], max_detections=most, score_threshold=0.2, iou_threshold=0.7)
    assert scores.metrics["map50"] == pytest.approx(expected)
    asked = scorer.overrides()
    assert (asked.max_detections, asked.score_threshold, asked.iou_threshold) == (most, 0.2, 0.7)


def test_nothing_found_is_zero_as_for_pycocotools(tmp_path):
    dataset = made(tmp_path, [truth([(CAT, "cat"), (FAR, "cat")]), truth([])], ["cat", "dog"])
    _, scores = scored(dataset, [Detections.empty()] * 2, ["cat", "dog"])
    metrics = scores.metrics
    assert (metrics["map"], metrics["map_small"], metrics["map_large"]) == (0.0, 0.0, None)
    assert scores.images[0]["missed"] == 2
    weigher = resampled(Task.DETECT, scores.images, 2)
    assert weigher.metrics(np.ones(2))["map"] == 0.0
    assert np.isnan(weigher.metrics(np.array([0.0, 2.0]))["map"])


def test_no_objects_at_all(tmp_path):
    scorer = DetectionScorer(made(tmp_path, [truth([])], ["cat"]), map_classes(["cat"], ["cat"]), DetectOptions())
    scorer.add(Sample("a", tmp_path, truth([])), result(Detections.empty()))
    with pytest.raises(ConfigError, match="nothing to measure"):
        scorer.finish()
