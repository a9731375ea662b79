from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.segmentation import DiceScore

from vision_service.errors import InvalidImage
from vision_service.evaluation.classes import map_classes
from vision_service.evaluation.compare import resampled
from vision_service.evaluation.pictures import found_map
from vision_service.evaluation.samples import Dataset, MaskFile, Sample
from vision_service.evaluation.segment import SegmentationScorer, SegmentOptions
from vision_service.types import VOID, Result, SegmentationMap, Task

NAMES = ("background", "cat", "dog")


def dataset_of(tmp_path, masks, names=NAMES, binary=False):
    samples = []
    for index, mask in enumerate(masks):
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), mask)
        samples.append(Sample(f"{index}.png", path, MaskFile(path, binary)))
    return Dataset(tmp_path, "masks", "", Task.SEGMENT, names, samples)


def scored(dataset, found, model_names=NAMES, **options):
    mapping = map_classes(model_names, dataset.class_names, is_binary=dataset.class_names[-1] == "foreground")
    scorer = SegmentationScorer(dataset, mapping, SegmentOptions(**options))
    for sample, class_map in zip(dataset.samples, found, strict=True):
        scorer.add(sample, Result(SegmentationMap(class_map, tuple(model_names), 0), class_map.shape, "m", "1"))
    return scorer.finish()


def test_a_case_by_hand(tmp_path):
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, VOID]], np.uint8)
    found = np.array([[0, 1, 1, 1], [0, 0, 0, 1]], np.uint8)
    scores = scored(dataset_of(tmp_path, [truth]), [found])
    # background: 3 in both, 4 there, 4 found; cat: 2 in both, 3 there, 3 found (the void pixel does not count)
    by_class = {row["class_name"]: (row["iou"], row["dice"]) for row in scores.per_class}
    assert by_class["background"] == pytest.approx((3 / 5, 6 / 8))
    assert by_class["cat"] == pytest.approx((2 / 4, 4 / 6))
    assert by_class["dog"] == (None, None)
    assert scores.metrics == pytest.approx({"miou": 0.55, "mdice": (0.75 + 2 / 3) / 2, "pixel_accuracy": 5 / 7})


def random_maps(seed, count=6):
    rng = np.random.default_rng(seed)
    truths = [rng.integers(0, 3, (17, 23)).astype(np.uint8) for _ in range(count)]
    for truth in truths:
        truth[rng.random(truth.shape) < 0.1] = VOID
    found = [np.where(rng.random(t.shape) < 0.7, np.minimum(t, 2), rng.integers(0, 3, t.shape)) for t in truths]
    return truths, [one.astype(np.uint8) for one in found]


def test_figures_are_those_of_the_whole_dataset(tmp_path):
    truths, found = random_maps(1)
    scores = scored(dataset_of(tmp_path, truths), found)
    kept = np.concatenate([t.ravel() for t in truths]) != VOID
    t, p = (np.concatenate([one.ravel() for one in maps])[kept] for maps in (truths, found))
    iou = [((t == k) & (p == k)).sum() / ((t == k) | (p == k)).sum() for k in range(3)]
    dice = [2 * ((t == k) & (p == k)).sum() / ((t == k).sum() + (p == k).sum()) for k in range(3)]
    assert scores.metrics == pytest.approx(
        {"miou": np.mean(iou), "mdice": np.mean(dice), "pixel_accuracy": (t == p).mean()}, abs=1e-6
    )
    library = DiceScore(num_classes=3, average="none", input_format="index", aggregation_level="global")
    library.update(torch.from_numpy(p.astype(np.int64))[None], torch.from_numpy(t.astype(np.int64))[None])
    assert [row["dice"] for row in scores.per_class] == pytest.approx(library.compute().tolist(), abs=1e-6)


def test_weighted_images_are_repeated_images(tmp_path):
    truths, found = random_maps(2)
    scores = scored(dataset_of(tmp_path, truths), found)
    weigher = resampled(Task.SEGMENT, scores.images, 3)
    assert weigher.metrics(np.ones(6)) == pytest.approx(scores.metrics, abs=1e-6)
    weights = np.array([2, 0, 0, 3, 1, 0])
    (tmp_path / "again").mkdir()
    again = scored(
        dataset_of(tmp_path / "again", [truths[i] for i in np.repeat(np.arange(6), weights)]),
        [found[i] for i in np.repeat(np.arange(6), weights)],
    )
    assert weigher.metrics(weights.astype(np.float64)) == pytest.approx(again.metrics, abs=1e-6)


def test_records_keep_what_was_found(tmp_path):
    truths, found = random_maps(3, count=1)
    (record,) = scored(dataset_of(tmp_path, truths), found).images
    assert np.array_equal(found_map(record), found[0])


def test_binary_masks_and_a_model_of_one_class(tmp_path):
    truth = np.array([[0, 255], [255, 255]], np.uint8)
    found = np.array([[0, 1], [1, 0]], np.uint8)
    scores = scored(
        dataset_of(tmp_path, [truth], ("background", "foreground"), binary=True), [found], ("background", "person")
    )
    assert [row["iou"] for row in scores.per_class] == pytest.approx([1 / 2, 2 / 3])


def test_classes_that_only_the_model_has(tmp_path):
    truth = np.array([[0, 1]], np.uint8)
    found = np.array([[2, 1]], np.uint8)  # a bird where the dataset has background
    dataset = dataset_of(tmp_path, [truth], ("background", "cat"))
    names = ("background", "cat", "bird")
    ignored = scored(dataset, [found], names, unmapped="ignore")
    counted = scored(dataset, [found], names, unmapped="count")
    assert ignored.metrics["miou"] == pytest.approx(1.0)
    assert counted.metrics["miou"] == pytest.approx(0.5)
    assert counted.metrics["pixel_accuracy"] == pytest.approx(0.5)


def test_the_threshold_is_asked_for(tmp_path):
    dataset = dataset_of(tmp_path, [np.zeros((2, 2), np.uint8)])
    mapping = map_classes(NAMES, NAMES)
    assert SegmentationScorer(dataset, mapping, SegmentOptions()).overrides().score_threshold is None
    assert SegmentationScorer(dataset, mapping, SegmentOptions(0.7)).overrides().score_threshold == 0.7


@pytest.mark.parametrize(
    ("mask", "clause"),
    [
        (np.zeros((3, 2), np.uint8), "the mask is 2x3, the image 2x2"),
        (np.full((2, 2), 7, np.uint8), "has the id 7; there are classes 0 to 2"),
        (np.array([[[0, 0, 9]] * 2] * 2, np.uint8), "has colours"),
    ],
)
def test_masks_that_do_not_fit(tmp_path, mask, clause):
    with pytest.raises(InvalidImage, match=clause):
        scored(dataset_of(tmp_path, [mask]), [np.zeros((2, 2), np.uint8)])
