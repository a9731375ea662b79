"""What trained networks are compared with: training sees boxes where the picture has them."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
training = importlib.import_module("train_fidelity")
recipes = importlib.import_module("trained")


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


def test_boxes_to_learn_from_are_of_the_networks_precision(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages/one.jpg")
    corners = "<xmin>1</xmin><ymin>2</ymin><xmax>21</xmax><ymax>12</ymax>"
    (tmp_path / "Annotations/one.xml").write_text(
        f"<annotation><size><width>40</width><height>30</height></size>"
        f"<object><name>RBC</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    image, target = training._cell(tmp_path / "JPEGImages/one.jpg", masks=True)
    assert image.shape == (3, 30, 40)
    assert target["boxes"].dtype == torch.float32  # FCOS's loss takes no other
    assert target["labels"].tolist() == [recipes.CELLS.index("RBC")]
    assert target["masks"].shape == (1, 30, 40)
