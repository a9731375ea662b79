"""How outputs are read, on outputs written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import tiny_spec
from vision_service.backends import _detection
from vision_service.backends._classification import logits_to_classifications, scores_to_classifications, softmax
from vision_service.backends._detection import dense_to_detections
from vision_service.backends._outputs import check_finite
from vision_service.backends._segmentation import logits_to_maps
from vision_service.backends.table import create_backend
from vision_service.errors import InferenceFailed
from vision_service.types import VOID, ImageMeta, Params

NAMES = ("apple", "bear")
SAME_SIZE = ImageMeta((100, 100), (100, 100), (1.0, 1.0), (0.0, 0.0))
HALVED = ImageMeta((60, 80), (50, 50), (0.5, 0.5), (5.0, 10.0))  # letterboxed: content is 40 x 30 at (5, 10)

ONE_OBJECT = [[10.0, 10.0, 30.0, 30.0], [11.0, 11.0, 31.0, 31.0], [60.0, 60.0, 90.0, 90.0]]


def detect(boxes, scores, params=None, meta=SAME_SIZE):
    (found,) = dense_to_detections(
        torch.tensor([boxes]).reshape(1, -1, 4),
        torch.tensor([scores]).reshape(1, -1, 2),
        [meta],
        [params or Params()],
        NAMES,
    )
    return found


@pytest.mark.parametrize(
    ("scores", "params", "expected"),
    [
        ([[0.0, 0.0]] * 3, Params(score_threshold=0.1), []),
        ([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0]], Params(score_threshold=0.1), [("apple", 0.9), ("apple", 0.7)]),
        ([[0.8, 0.0], [0.9, 0.0], [0.7, 0.0]], Params(score_threshold=0.75), [("apple", 0.9)]),
        # Suppression is within a class, and a box may have two.
        ([[0.9, 0.6], [0.0, 0.8], [0.0, 0.0]], Params(score_threshold=0.1), [("apple", 0.9), ("bear", 0.8)]),
        (
            [[0.9, 0.0], [0.8, 0.0], [0.0, 0.0]],
            Params(score_threshold=0.1, iou_threshold=0.9),
            [("apple", 0.9), ("apple", 0.8)],
        ),
        ([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0]], Params(score_threshold=0.1, max_detections=1), [("apple", 0.9)]),
        # A filtered class neither appears nor takes a place.
        (
            [[0.9, 0.5], [0.8, 0.0], [0.7, 0.0]],
            Params(score_threshold=0.1, max_detections=1, class_ids=frozenset({1})),
            [("bear", 0.5)],
        ),
        ([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]], Params(score_threshold=0.5), [("apple", 0.5)]),
    ],
)
def test_which_boxes_are_kept(scores, params, expected):
    found = detect(ONE_OBJECT, scores, params)
    assert list(zip(found.class_names, [round(float(s), 4) for s in found.scores], strict=True)) == expected
    assert [NAMES[i] for i in found.class_ids] == list(found.class_names)
    assert found.boxes_xyxy.dtype == found.scores.dtype == np.float32


def test_boxes_return_to_the_original_and_are_clipped_to_it():
    boxes = [[5.0, 10.0, 25.0, 20.0], [0.0, 0.0, 50.0, 50.0], [0.0, 0.0, 50.0, 9.0]]
    found = detect(boxes, [[0.9, 0.0], [0.0, 0.8], [0.7, 0.0]], Params(score_threshold=0.1), HALVED)
    # The third lies in the padding and shows nothing of the image.
    assert found.boxes_xyxy.tolist() == [[0.0, 0.0, 40.0, 20.0], [0.0, 0.0, 80.0, 60.0]]


def test_images_of_a_batch_keep_to_themselves():
    boxes = torch.tensor([ONE_OBJECT, ONE_OBJECT, ONE_OBJECT])
    scores = torch.tensor([[[0.9, 0.0]] * 3, [[0.0, 0.0]] * 3, [[0.0, 0.4]] * 3])
    params = [Params(score_threshold=0.5), Params(score_threshold=0.1), Params(score_threshold=0.1)]
    found = dense_to_detections(boxes, scores, [SAME_SIZE] * 3, params, NAMES)
    assert [len(f) for f in found] == [2, 0, 2]
    assert found[2].class_names == ("bear", "bear")


def test_many_candidates_are_cut_to_the_best(monkeypatch):
    monkeypatch.setattr(_detection, "MAX_CANDIDATES", 2)
    scores = [[0.5, 0.0], [0.6, 0.0], [0.7, 0.0]]
    found = detect(ONE_OBJECT, scores, Params(score_threshold=0.0, iou_threshold=1.0))
    assert [round(float(s), 3) for s in found.scores] == [0.7, 0.6]


def test_a_threshold_of_zero_stays_affordable():
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 3549, 2, generator=rng) * 300
    boxes = torch.cat((corner, corner + 50), dim=2)
    scores = torch.rand(1, 3549, 80, generator=rng)
    names = tuple(map(str, range(80)))
    (found,) = dense_to_detections(
        boxes, scores, [ImageMeta((416, 416), (416, 416), (1, 1), (0, 0))], [Params()], names
    )
    assert len(found) == 100
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("most", [20, 4096])
@pytest.mark.parametrize("together", [30, 16384])
def test_a_gpus_way_keeps_what_the_cpus_keeps(monkeypatch, most, together):
    monkeypatch.setattr(_detection, "MAX_CANDIDATES", most)
    monkeypatch.setattr(_detection, "TOGETHER", together)
    rng = torch.Generator().manual_seed(1)
    corner = torch.rand(5, 200, 2, generator=rng) * 100 - 20
    boxes = torch.cat((corner, corner + 30 + torch.rand(5, 200, 2, generator=rng)), dim=2)
    scores = torch.rand(5, 200, 7, generator=rng)
    params = [
        Params(score_threshold=0.9),
        Params(score_threshold=0.8, iou_threshold=0.3, max_detections=3),
        Params(score_threshold=1.0),
        Params(score_threshold=0.5, class_ids=frozenset({2, 5}), iou_threshold=0.3),
        Params(score_threshold=0.95, class_ids=frozenset()),
    ]
    each, counts = _detection.select_each(boxes, scores, params)
    table, counts_together = _detection.select_together(boxes, scores, params)
    assert counts_together == counts
    assert counts[1] == 3
    assert counts[2] == counts[4] == 0
    np.testing.assert_array_equal(table, each)
    none, counts = _detection.select_together(boxes, scores, [Params(score_threshold=1.0)] * 5)
    assert (none.shape, counts) == ((0, 6), [0] * 5)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (Params(top_k=1, score_threshold=0.0), [1]),
        (Params(top_k=3, score_threshold=0.0), [1, 0, 2]),  # of equal scores the lower id comes first
        (Params(top_k=4, score_threshold=0.0), [1, 0, 2, 4]),
        (Params(top_k=9, score_threshold=0.0), [1, 0, 2, 4, 3]),
        (Params(top_k=9, score_threshold=0.2), [1, 0, 2, 4]),
        (Params(top_k=2, score_threshold=0.0, class_ids=frozenset({3, 4, 2})), [2, 4]),
        (Params(top_k=2, score_threshold=0.0, class_ids=frozenset()), []),
    ],
)
def test_which_classes_are_kept(params, expected):
    scores = torch.tensor([[0.2, 0.3, 0.2, 0.1, 0.2]])
    (found,) = scores_to_classifications(scores, [params], tuple("abcde"))
    assert found.class_ids.tolist() == expected
    assert found.class_names == tuple("abcde"[i] for i in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_probabilities_are_torchs(rows, dtype):
    logits = (torch.randn(rows, 1000, generator=torch.Generator().manual_seed(rows)) * 8).to(dtype)
    found = softmax(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logits.double().softmax(dim=1), rtol=1e-5, atol=1e-9)


def test_probabilities_of_the_largest_logits_are_finite():
    logits = torch.tensor([[3e38, -3e38, 3e38], [-3e38, -3e38, -3e38]])
    assert softmax(logits).tolist() == [[0.5, 0.0, 0.5], pytest.approx([1 / 3] * 3)]


def test_a_classifier_refuses_what_is_not_finite():
    logits = torch.zeros(3, 5)
    logits[1, 2] = -float("inf")
    with pytest.raises(InferenceFailed, match="image 1 of a batch of 3"):
        logits_to_classifications(logits, [Params()] * 3, tuple("abcde"))


def test_large_finite_outputs_are_not_taken_for_infinite_ones():
    check_finite(torch.full((2, 3), 3e38))
    with pytest.raises(InferenceFailed, match="image 1 of a batch of 2"):
        check_finite(torch.tensor([[1.0, 2.0], [float("inf"), -float("inf")]]), torch.ones(2, 1))


def segment(logits, params, meta, classes=("nothing", "person"), background_id=0):
    spec = tiny_spec(task="segment", classes=classes, background_id=background_id)
    (found,) = logits_to_maps(torch.tensor([logits]), [meta], [params], spec)
    return found


WIDE = ImageMeta((2, 4), (1, 2), (0.5, 0.5), (0.0, 0.0))


@pytest.mark.parametrize(
    ("threshold", "expected"),
    # Between the two pixels (probabilities 0.1 and 0.9) the probability, not the mask, is interpolated.
    [(0.0, [1, 1, 1, 1]), (0.2, [0, 1, 1, 1]), (0.5, [0, 0, 1, 1]), (0.8, [0, 0, 0, 1]), (0.95, [0, 0, 0, 0])],
)
def test_binary_masks_are_decided_at_the_originals_size(threshold, expected):
    low, high = -float(np.log(9)), float(np.log(9))
    found = segment([[[low, high]]], Params(score_threshold=threshold), WIDE)
    assert found.class_map.tolist() == [expected, expected]
    assert found.background_id == 0


def test_a_probability_at_the_threshold_is_foreground():
    assert segment([[[0.0, 0.0]]], Params(score_threshold=0.5), WIDE).class_map.all()


@pytest.mark.parametrize(("kept", "expected"), [({1}, 1), ({0}, 0), (set(), 0)])
def test_binary_class_filter(kept, expected):
    found = segment([[[5.0, 5.0]]], Params(class_ids=frozenset(kept)), WIDE)
    assert np.unique(found.class_map).tolist() == [expected]


def test_one_class_without_background_leaves_void():
    found = segment([[[-5.0, 5.0]]], Params(score_threshold=0.5), WIDE, classes=("cell",), background_id=None)
    assert found.class_map.tolist() == [[VOID, VOID, 0, 0]] * 2


TWO_PIXELS = ImageMeta((1, 2), (1, 2), (1.0, 1.0), (0.0, 0.0))
THREE = ("sky", "road", "tree")


@pytest.mark.parametrize(
    ("params", "background_id", "expected"),
    [
        (Params(), None, [1, 2]),
        (Params(score_threshold=0.7), None, [1, VOID]),
        (Params(score_threshold=0.7), 0, [1, 0]),
        (Params(class_ids=frozenset({2})), None, [VOID, 2]),
        (Params(class_ids=frozenset({2})), 0, [0, 2]),
    ],
)
def test_several_classes(params, background_id, expected):
    logits = np.log([[[0.05, 0.2]], [[0.9, 0.2]], [[0.05, 0.6]]]).astype(np.float32)  # [3, 1, 2]
    assert segment(logits.tolist(), params, TWO_PIXELS, THREE, background_id).class_map.tolist() == [expected]


def test_what_the_network_never_saw_is_no_class():
    """A centre crop: the original's first and last column lie outside the input."""
    cropped = ImageMeta((1, 4), (1, 2), (1.0, 1.0), (-1.0, 0.0))
    found = segment([[[5.0, 5.0]]], Params(score_threshold=0.0), cropped)
    assert found.class_map.tolist() == [[0, 1, 1, 0]]
    logits = [[[0.0, 0.0]], [[5.0, 5.0]], [[0.0, 0.0]]]
    assert segment(logits, Params(), cropped, THREE, None).class_map.tolist() == [[VOID, 1, 1, VOID]]


def test_channels_that_do_not_fit_the_classes():
    with pytest.raises(InferenceFailed, match="2 channels for 3 classes"):
        segment([[[0.0, 0.0]], [[0.0, 0.0]]], Params(), TWO_PIXELS, THREE, None)


def classify(logits, params):
    backend = create_backend(tiny_spec(backend="torchvision_classifier", classes=("a", "b", "c")))
    return backend.postprocess((torch.tensor([logits]),), [SAME_SIZE], [params])[0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (Params(), ["c", "a", "b"]),
        (Params(top_k=1), ["c"]),
        (Params(score_threshold=0.25), ["c", "a"]),
        (Params(score_threshold=0.99), []),
        (Params(top_k=1, class_ids=frozenset({0, 1})), ["a"]),
    ],
)
def test_classes_by_probability(params, expected):
    found = classify(np.log([0.3, 0.1, 0.6]).astype(np.float32).tolist(), params)
    assert list(found.class_names) == expected
    chances = {"a": 0.3, "b": 0.1, "c": 0.6}  # over all classes, whichever are kept
    np.testing.assert_allclose(found.scores, [chances[name] for name in expected], atol=1e-6)


def translate(image, meta):
    backend = create_backend(tiny_spec(backend="esrgan_slim", task="translate", classes=()))
    return backend.postprocess((torch.tensor(image)[None],), [meta], [Params()])[0].image


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-0.3, 0.0, 99.4 / 255, 99.6 / 255, 1.0, 1.7])
    image = values.view(1, 1, 6).expand(3, 2, 6).tolist()
    pixels = translate(image, ImageMeta((1, 3), (1, 3), (1.0, 1.0), (0.0, 0.0)))
    assert pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist() == [0, 0, 99, 100, 255, 255]


def test_padding_is_cut_off():
    padded = torch.zeros(3, 8, 12)
    padded[:, :6, :10] = 1.0  # 3 x 5, padded to 4 x 6, then doubled
    pixels = translate(padded.tolist(), ImageMeta((3, 5), (4, 6), (1.0, 1.0), (0.0, 0.0)))
    assert pixels.shape == (6, 10, 3)
    assert (pixels == 255).all()
