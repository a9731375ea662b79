"""How trained networks are compared: who is whose partner; and that training sees boxes where the picture has them."""

import importlib
import sys

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from vision_service.types import Detections

sys.path.insert(0, str(ROOT / "scripts"))
trained = importlib.import_module("fidelity_trained")
training = importlib.import_module("train_fidelity")
recipes = importlib.import_module("trained")

BOXES = np.array([[0, 0, 100, 100], [50, 50, 90, 90], [200, 0, 300, 80]], np.float32)


def ours(boxes=BOXES, scores=(0.9, 0.8, 0.7), ids=(1, 2, 2)):
    return Detections(boxes, np.array(ids), tuple("c" for _ in ids), np.array(scores, np.float32))


def theirs(boxes=BOXES, scores=(0.9, 0.8, 0.7), ids=(1, 2, 2)):
    return {"boxes": torch.from_numpy(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(ids)}


@pytest.mark.parametrize(
    ("other", "pairs"),
    [
        (theirs(), {(0, 0), (1, 1), (2, 2)}),
        (theirs(BOXES[::-1].copy(), (0.7, 0.8, 0.9), (2, 2, 1)), {(0, 2), (1, 1), (2, 0)}),
        (theirs(scores=(0.9, 0.82, 0.7)), {(0, 0), (2, 2)}),
        (theirs(ids=(2, 2, 2)), {(1, 1), (2, 2)}),
        (theirs(BOXES + np.float32([0, 0, 3, 0])), set()),
        (theirs(BOXES[:0], (), ()), set()),
    ],
)
def test_partners_are_of_one_class_with_nearly_the_same_box_and_score(other, pairs):
    found, overlaps, gaps = trained._pairs(ours(), other)
    assert set(found) == pairs
    assert len(overlaps) == len(gaps) == len(pairs)
    assert (overlaps >= 0.98).all()
    assert (gaps <= 0.01).all()


def test_a_partner_is_taken_once():
    twins = ours(np.stack([BOXES[0], BOXES[0]]), (0.9, 0.9), (1, 1))
    assert len(trained._pairs(twins, theirs())[0]) == 1


@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_picture_has_its_boxes_and_masks_where_it_shows_them(axis):
    image = torch.zeros(3, 40, 60)
    image[:, 10:20, 5:30] = 1
    target = {"boxes": torch.tensor([[5.0, 10.0, 30.0, 20.0]]), "masks": image[:1].bool()}
    mirrored, moved = training._mirrored(image, target, axis)
    x1, y1, x2, y2 = moved["boxes"][0].int().tolist()
    assert mirrored[0, y1:y2, x1:x2].all()
    assert mirrored[0].sum() == (y2 - y1) * (x2 - x1)
    assert torch.equal(moved["masks"][0], mirrored[0].bool())
    back, restored = training._mirrored(mirrored, moved, axis)
    assert torch.equal(back, image)
    assert torch.equal(restored["boxes"], target["boxes"])


def test_an_ellipse_touches_the_sides_of_its_box():
    mask = training._ellipse(np.array([10, 20, 50, 80]), (100, 100))
    rows, columns = np.nonzero(mask)
    assert abs(np.array([columns.min(), rows.min(), columns.max(), rows.max()]) - [10, 20, 50, 80]).max() <= 1


def test_a_recipe_is_one_network_in_two_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CACHE", tmp_path)
    name = "ssdlite320_mobilenet_v3_large"
    network = recipes.library(name)
    importlib.import_module("safetensors.torch").save_file(network.state_dict(), recipes.weights_file(name))
    spec = recipes.served(name)
    assert spec.classes == recipes.CELLS
    assert spec.preprocess.resize.size_hw == network.transform.fixed_size
    backend = importlib.import_module("vision_service.backends.table").create_backend(spec)
    assert len(backend.build().network.detector.state_dict()) == len(network.state_dict())
