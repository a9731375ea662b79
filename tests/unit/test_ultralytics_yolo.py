"""What YOLO heads mean, against plain loops; needs no library."""

import cv2
import numpy as np
import pytest
import torch

from vision_service.backends import _yolo, _yolo_architecture
from vision_service.config import Letterbox, PreprocessSpec
from vision_service.errors import ConfigError
from vision_service.imaging.masks import decode_rle
from vision_service.imaging.preprocess import preprocess
from vision_service.types import ImageMeta, Params

PARAMS = Params(score_threshold=0.3, iou_threshold=0.6, max_detections=300)
NAMES = ("apple", "bear", "cup")
AS_IS = ImageMeta((32, 48), (32, 48), (1.0, 1.0), (0.0, 0.0))


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def slow_suppress(boxes, scores, params):
    """Indices that stay, by the book: best class, threshold, filter, then greedily within each class."""
    best, class_ids = scores.max(axis=1), scores.argmax(axis=1)
    order = [i for i in np.argsort(-best, kind="stable") if best[i] >= params.score_threshold]
    if params.class_ids is not None:
        order = [i for i in order if class_ids[i] in params.class_ids]
    kept = []
    for i in order:
        if all(class_ids[i] != class_ids[j] or iou(boxes[i], boxes[j]) <= params.iou_threshold for j in kept):
            kept.append(i)
    return kept[: params.max_detections]


def crowd(count=200, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (count, 2))], axis=1).astype(np.float32)
    return boxes, rng.uniform(0, 1, (count, 3)).astype(np.float32)


def test_grid_is_cell_centres_level_by_level():
    centres, strides = _yolo.grid(64, 96, [8, 16, 32], torch.device("cpu"))
    expected = [(x + 0.5, y + 0.5, s) for s in (8, 16, 32) for y in range(64 // s) for x in range(96 // s)]
    np.testing.assert_array_equal(torch.cat((centres, strides)).T.numpy(), np.array(expected, np.float32))


def test_corners():
    boxes = _yolo.corners(torch.tensor([[[10.0, 20.0, 4.0, 6.0]]]))
    assert boxes.tolist() == [[[8.0, 17.0, 12.0, 23.0]]]


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        Params(score_threshold=0.0, iou_threshold=0.3, max_detections=300),
        Params(score_threshold=0.3, iou_threshold=0.6, max_detections=7),
        Params(score_threshold=0.3, iou_threshold=0.6, max_detections=300, class_ids=frozenset({2})),
        Params(score_threshold=0.3, iou_threshold=1.0, max_detections=300),
        Params(score_threshold=1.0, iou_threshold=0.6, max_detections=300),
    ],
    ids=str,
)
def test_suppression_by_the_book(params):
    boxes, scores = crowd()
    rows, index = _yolo.suppress(torch.from_numpy(boxes), torch.from_numpy(scores), params)
    expected = slow_suppress(boxes, scores, params)
    assert index.tolist() == expected
    np.testing.assert_array_equal(rows[:, :4].numpy(), boxes[expected])
    np.testing.assert_array_equal(rows[:, 4].numpy(), scores[expected].max(axis=1))
    np.testing.assert_array_equal(rows[:, 5].numpy(), scores[expected].argmax(axis=1))


def test_a_box_has_one_class_and_a_score_at_the_threshold_counts():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    params = Params(score_threshold=0.5, class_ids=frozenset({0}))
    assert len(_yolo.suppress(boxes, torch.tensor([[0.5, 0.4, 0.1]]), params)[0]) == 1
    # Class 0 passes the threshold as well, but the box is a bear.
    assert len(_yolo.suppress(boxes, torch.tensor([[0.6, 0.7, 0.1]]), params)[0]) == 0


def test_boxes_of_unequal_class_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(3, 1)
    scores = torch.tensor([[0.9, 0, 0], [0, 0.8, 0], [0.7, 0, 0]])
    rows, index = _yolo.suppress(boxes, scores, PARAMS)
    assert index.tolist() == [0, 1]
    assert rows[:, 5].tolist() == [0.0, 1.0]


def test_only_the_best_candidates_are_compared(monkeypatch):
    boxes, scores = crowd()
    monkeypatch.setattr(_yolo, "MAX_CANDIDATES", 20)
    _, index = _yolo.suppress(torch.from_numpy(boxes), torch.from_numpy(scores), PARAMS)
    best = np.argsort(-scores.max(axis=1), kind="stable")[:20]
    assert index.tolist() == [best[i] for i in slow_suppress(boxes[best], scores[best], PARAMS)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (Params(score_threshold=1.0), []),
        (Params(score_threshold=0.5), [0, 1, 2]),
        (Params(score_threshold=0.0, max_detections=2), [0, 1]),
        (Params(score_threshold=0.0, class_ids=frozenset({1})), [1, 3]),
        (Params(score_threshold=0.5, iou_threshold=0.0), [0, 1, 2]),  # nothing is suppressed
    ],
    ids=str,
)
def test_lists_are_only_filtered(params, expected):
    rows = torch.tensor([[0.0, 0.0, 9.0, 9.0, score, id_] for score, id_ in ((0.9, 0), (0.8, 1), (0.5, 0), (0.1, 1))])
    found, index = _yolo.listed(rows, params)
    assert index.tolist() == expected
    assert torch.equal(found, rows[expected])


def masked(count=40, seed=0):
    """Prototypes [M, h, w], coefficients [K, M], boxes [K, 4], for an input of 64 x 96."""
    rng = np.random.default_rng(seed)
    protos = cv2.blur(rng.normal(size=(16, 24, 8)).astype(np.float32), (3, 3)).transpose(2, 0, 1)
    corner = rng.uniform(-5, 60, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.2, 40, (count, 2))], axis=1).astype(np.float32)
    return protos, rng.normal(size=(count, 8)).astype(np.float32), boxes


def test_masks_are_combined_enlarged_cut_and_cropped():
    protos, coefficients, boxes = masked()
    found = _yolo.masks_in_input(*map(torch.from_numpy, (protos, coefficients, boxes)), (64, 96)).numpy()
    assert found.shape == (40, 64, 96)
    assert found.any()
    differ = 0
    for mask, weights, (x1, y1, x2, y2) in zip(found, coefficients, boxes, strict=True):
        plane = cv2.resize(np.tensordot(weights, protos, 1), (96, 64), interpolation=cv2.INTER_LINEAR)
        for y, x in np.ndindex(64, 96):
            differ += mask[y, x] != (plane[y, x] > 0 and x1 <= x < x2 and y1 <= y < y2)
    assert differ <= 2  # a value of rounding's size may fall to either side of 0


def test_no_objects_no_masks():
    protos, coefficients, boxes = masked()
    found = _yolo.masks_in_input(*map(torch.from_numpy, (protos, coefficients[:0], boxes[:0])), (64, 96))
    assert found.shape == (0, 64, 96)
    nothing = _yolo.detections(torch.empty((0, 6)), AS_IS, NAMES, torch.empty((0, 32, 48), dtype=torch.bool))
    assert (len(nothing), nothing.mask_rles) == (0, ())
    assert _yolo.detections(torch.empty((0, 6)), AS_IS, NAMES).mask_rles is None


def test_detections_return_to_the_original_and_drop_what_is_not_in_it():
    image = np.zeros((50, 100, 3), np.uint8)
    letterbox = PreprocessSpec(resize=Letterbox(size_hw=(64, 64), pad_multiple=None), interpolation="bilinear")
    _, meta = preprocess(image, letterbox)  # content is 32 high, 16 rows of padding above and below
    rows = torch.tensor(
        [
            [0.0, 16.0, 64.0, 48.0, 0.9, 2.0],
            [0.0, 0.0, 64.0, 10.0, 0.8, 1.0],  # in the padding
            [16.0, 20.0, 32.0, 28.0, 0.7, 0.0],
            [16.0, 20.0, 32.0, 28.0, 0.6, 1.0],  # its mask is empty
        ]
    )
    masks = torch.zeros((4, 64, 64), dtype=torch.bool)
    masks[0, 16:48] = masks[1, :10] = masks[2, 20:28, 16:32] = True
    found = _yolo.detections(rows, meta, NAMES, masks)
    assert found.class_names == ("cup", "apple")
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, 100, 50], [25, 6.25, 50, 18.75]], atol=1e-4)
    whole, part = (decode_rle(rle, (50, 100)) for rle in found.mask_rles)
    assert whole.all()
    expected = np.zeros((50, 100), bool)
    expected[6:19, 25:50] = True
    assert (part != expected).sum() <= 25  # a row of the edge, which lies between two pixels of the input


def architecture(**changes):
    return {
        "nc": 3,
        "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]]],
        "head": [[[0, 1], 1, "Detect", ["nc"]]],
    } | changes


def test_architectures_are_building_blocks():
    check = _yolo_architecture.check
    assert check("x", architecture(), _yolo_architecture.DETECTORS) == "Detect"
    assert check("x", architecture(activation="nn.ReLU()"), _yolo_architecture.DETECTORS) == "Detect"
    segment = architecture(head=[[[0, 1], 1, "Segment", ["nc", 32, 256]]])
    assert check("x", segment, _yolo_architecture.DETECTORS) == "Segment"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"activation": "__import__('os').system('true')"}, "activation"),
        ({"activation": "nn.ReLU() if open('/tmp/x', 'w') else 0"}, "activation"),
        ({"backbone": [[-1, 1, "check_requirements", ["evil"]]]}, "layer 0 is 'check_requirements'"),
        ({"backbone": [[-1, 1, "TorchVision", ["resnet18"]]]}, "layer 0 is 'TorchVision'"),
        ({"backbone": [[-1, 1, "nn.Module", []]]}, r"layer 0 is 'nn\.Module'"),
        ({"head": [[-1, 1, "Pose", ["nc"]]]}, "its head is 'Pose'"),
        ({"head": [[-1, 1, "Classify", ["nc"]]]}, "its head is 'Classify'.*ultralytics_classifier"),
        ({"head": 3}, "has a backbone and a head"),
        ({"backbone": [[-1, 1]]}, r"lists of \[from, repeats, module, args\]"),
        ({"head": [], "backbone": []}, "has a backbone and a head"),
    ],
)
def test_an_architecture_cannot_run_what_it_likes(changes, problem):
    with pytest.raises(ConfigError, match=problem):
        _yolo_architecture.check("x", architecture(**changes), _yolo_architecture.DETECTORS)


def test_packaged_architectures_by_size(tmp_path):
    folder = tmp_path / "cfg" / "models" / "v8"
    folder.mkdir(parents=True)
    for stem in ("yolov8", "yolov8-seg", "yolov9c", "yolov3-tiny"):
        (folder / f"{stem}.yaml").touch()
    for name, stem, size in [
        ("yolov8n", "yolov8", "n"),
        ("yolov8x-seg", "yolov8-seg", "x"),
        ("yolov9c", "yolov9c", ""),
        ("yolov3-tiny", "yolov3-tiny", ""),
    ]:
        assert _yolo_architecture.packaged(tmp_path, name) == (folder / f"{stem}.yaml", size)
    for name, near in [("yolo8n", "did you mean 'yolov8n'"), ("../yolov8n", "no architecture"), ("yolov8q", "yolov8")]:
        with pytest.raises(ConfigError, match=near):
            _yolo_architecture.packaged(tmp_path, name)
