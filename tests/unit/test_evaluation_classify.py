from __future__ import annotations

import numpy as np
import pytest

from vision_service.errors import ConfigError
from vision_service.evaluation.classes import map_classes
from vision_service.evaluation.classify import ClassificationScorer, ClassifyOptions
from vision_service.evaluation.compare import resampled
from vision_service.evaluation.samples import Dataset, Sample
from vision_service.types import Classification, Result, Task

NAMES = tuple("abcdefg")


def answer(scores, names=NAMES):
    scores = np.asarray(scores, np.float32)
    order = np.argsort(-scores, kind="stable")
    return Classification(order, tuple(names[i] for i in order), scores[order])


def dataset_of(tmp_path, truths, names=NAMES):
    samples = [Sample(f"{i}.jpg", tmp_path / f"{i}.jpg", truth) for i, truth in enumerate(truths)]
    return Dataset(tmp_path, "csv", "", Task.CLASSIFY, tuple(names), samples)


def scored(dataset, answers, model_names=NAMES, **options):
    scorer = ClassificationScorer(dataset, map_classes(model_names, dataset.class_names), ClassifyOptions(**options))
    for sample, one in zip(dataset.samples, answers, strict=True):
        scorer.add(sample, Result(one, (4, 4), "m", "1"))
    return scorer.finish()


def random_answers(seed, count=200):
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 7, count)
    logits = rng.normal(0, 1, (count, 7))
    logits[np.arange(count), truths] += 1.5
    scores = np.exp(2 * logits)
    return truths, (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


def ece_by_hand(scores, truths, bins=15):
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == truths
    total = 0.0
    for low in range(bins):
        inside = (confidence >= low / bins) & (confidence < (low + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_figures_by_hand(tmp_path):
    truths, scores = random_answers(1)
    found = scored(dataset_of(tmp_path, [NAMES[t] for t in truths]), [answer(row) for row in scores])
    ranks = (scores > scores[np.arange(len(truths)), truths][:, None]).sum(axis=1) + 1
    expected = {"top1": (ranks == 1).mean(), "top5": (ranks <= 5).mean(), "ece": ece_by_hand(scores, truths)}
    assert found.metrics == pytest.approx(expected, abs=1e-6)
    confusion = np.zeros((7, 7), int)
    np.add.at(confusion, (truths, scores.argmax(axis=1)), 1)
    ours = np.zeros((7, 8), int)
    for t, p, n in found.curves["confusion"]:
        ours[t, p] = n
    assert np.array_equal(ours[:, :7], confusion)
    assert ours[:, 7].sum() == 0
    for k, row in enumerate(found.per_class):
        assert row["top1"] == pytest.approx(confusion[k, k] / confusion[k].sum())
        assert row["precision"] == pytest.approx(confusion[k, k] / confusion[:, k].sum())
        assert row["images"] == confusion[k].sum()
    assert sum(count for _, _, count in found.curves["reliability"]) == 200


def test_weighted_images_are_repeated_images(tmp_path):
    truths, scores = random_answers(2, 40)
    found = scored(dataset_of(tmp_path, [NAMES[t] for t in truths]), [answer(row) for row in scores])
    weigher = resampled(Task.CLASSIFY, found.images, 7)
    assert weigher.metrics(np.ones(40)) == pytest.approx(found.metrics, abs=1e-6)
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40))
    rows = np.repeat(np.arange(40), weights)
    again = scored(dataset_of(tmp_path, [NAMES[t] for t in truths[rows]]), [answer(row) for row in scores[rows]])
    assert weigher.metrics(weights.astype(np.float64)) == pytest.approx(again.metrics, abs=1e-6)


def test_classes_that_only_the_model_has_compete_unless_ignored(tmp_path):
    dataset = dataset_of(tmp_path, ["a", "b"], ("a", "b"))
    answers = [answer([0.3, 0.1, 0, 0, 0, 0, 0.6]), answer([0.1, 0.8, 0, 0, 0, 0, 0.1])]
    counted, ignored = (scored(dataset, answers, unmapped=how) for how in ("count", "ignore"))
    assert counted.metrics["top1"] == pytest.approx(0.5)
    assert ignored.metrics["top1"] == pytest.approx(1.0)
    assert ignored.images[0]["score"] == pytest.approx(0.75)
    assert ignored.metrics["top5"] is None  # of two classes
    assert counted.images[0]["top"][0] == [6, pytest.approx(0.6)]  # past the dataset's two: the fifth of c to g
    assert counted.curves["confusion"] == [[0, 2, 1], [1, 1, 1]]


def test_two_classes_of_the_model_can_be_one_of_the_dataset(tmp_path):
    (tmp_path / "map.toml").write_text('a = "pet"\nb = "pet"\nc = "car"\n')
    dataset = dataset_of(tmp_path, ["pet"], ("pet", "car"))
    mapping = map_classes(NAMES, dataset.class_names, tmp_path / "map.toml")
    scorer = ClassificationScorer(dataset, mapping, ClassifyOptions())
    scorer.add(dataset.samples[0], Result(answer([0.3, 0.3, 0.4, 0, 0, 0, 0]), (4, 4), "m", "1"))
    assert scorer.finish().images[0]["top"][0] == [0, pytest.approx(0.6)]


def test_a_class_that_the_model_lacks_is_always_wrong(tmp_path):
    dataset = dataset_of(tmp_path, ["A new one", "b"], ("A new one", "b"))
    answers = [answer([0, 1, 0, 0, 0, 0, 0])] * 2
    found = scored(dataset, answers)
    assert found.metrics["top1"] == found.metrics["top5"] == pytest.approx(0.5)
    assert found.images[0]["rank"] == 8


def test_all_scores_are_asked_for(tmp_path):
    scorer = ClassificationScorer(dataset_of(tmp_path, ["a"]), map_classes(NAMES, NAMES), ClassifyOptions())
    assert (scorer.overrides().top_k, scorer.overrides().score_threshold) == (7, 0.0)


def test_one_class_is_nothing_to_tell(tmp_path):
    with pytest.raises(ConfigError, match="takes two"):
        ClassificationScorer(dataset_of(tmp_path, ["a"], "a"), map_classes("a", "a"), ClassifyOptions())
