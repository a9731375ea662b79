"""Our Darknet networks against OpenCV 4.14's reader of the same cfg and weights, before suppression.

The vectors in tests/data were made by OpenCV (scripts/reference_darknet.py). The other tests run it, on files that are
not part of the project.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.e2e.test_packaging import pip_install
from tests.helpers import ROOT
from vision_service.networks.darknet import Darknet
from vision_service.networks.darknet_weights import read_weights, write_weights

DATA = ROOT / "tests" / "data"


@pytest.fixture
def opencv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import opencv_darknet

    return opencv_darknet


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with OpenCV 4.14."""
    folder = tmp_path_factory.mktemp("opencv")
    pip_install(folder, "opencv-python-headless==4.14.0.94")
    return folder


@pytest.fixture(scope="module")
def tiny():
    vectors = np.load(DATA / "reference_darknet_tiny.npz")
    network = Darknet((DATA / "darknet_tiny.cfg").read_text()).eval()
    read_weights(network, vectors["weights"].tobytes())
    return network, torch.from_numpy(vectors["image"]).permute(0, 3, 1, 2) / 255, vectors


def test_a_layer_of_every_kind_is_as_in_opencv(tiny, opencv):
    network, x, vectors = tiny
    with torch.inference_mode():
        boxes, scores = network(x)
    assert (boxes.shape, scores.shape) == ((1, 704, 4), (1, 704, 3))
    np.testing.assert_allclose(opencv.as_parts(boxes.numpy(), (64, 64)), vectors["boxes"], atol=1e-5)
    np.testing.assert_allclose(scores.numpy(), vectors["scores"], atol=1e-5)
    assert vectors["scores"].std(axis=1).min() > 0.005, "the vectors must tell places apart"
    assert vectors["boxes"][..., 2:].std() > 0.05


def test_batch_memory_format_and_fusing_do_not_matter(tiny):
    network, x, vectors = tiny
    fused = Darknet((DATA / "darknet_tiny.cfg").read_text()).eval()
    read_weights(fused, vectors["weights"].tobytes())
    fused.fuse()
    batch = torch.cat((x, x.flip(3), x.flip(2)))
    with torch.inference_mode():
        alone = network(x)
        together = network(batch)
        turned = fused.to(memory_format=torch.channels_last)(batch.contiguous(memory_format=torch.channels_last))
    for one, many, other in zip(alone, together, turned, strict=True):
        torch.testing.assert_close(many[:1], one, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(other, many, atol=1e-4, rtol=1e-5)


def test_half_precision_finds_the_same_boxes(tiny):
    network, x, vectors = tiny
    half = Darknet((DATA / "darknet_tiny.cfg").read_text()).eval()
    read_weights(half, vectors["weights"].tobytes())
    half.fuse()
    half.half()
    with torch.inference_mode():
        boxes, scores = network(x)
        half_boxes, half_scores = half(x.half())
    assert half_boxes.dtype == half_scores.dtype == torch.float32
    assert half.layers[22].anchors.dtype == torch.float32
    assert half.layers[22].anchors[2].tolist() == [40.5, 61.0]
    torch.testing.assert_close(half_scores, scores, atol=5e-3, rtol=0)
    torch.testing.assert_close(half_boxes, boxes, atol=0.5, rtol=0)  # pixels of 64


def agree(opencv, folder, cfg, weights, images):
    """Largest differences of boxes, in parts of the input, and of scores; and the largest score there is."""
    network = Darknet(cfg, images.shape[2:]).eval()
    read_weights(network, weights)
    network.fuse()
    with torch.inference_mode():
        boxes, scores = network(torch.from_numpy(images))
    their_boxes, their_scores = opencv.detect(folder, cfg, weights, images)
    ours = opencv.as_parts(boxes.numpy(), images.shape[2:])
    return np.abs(ours - their_boxes).max(), np.abs(scores.numpy() - their_scores).max(), their_scores.max()


def test_real_weights(opencv, installed, shared):
    folder = shared / "testweights/yolo-fastest-1.1-xl"
    photos = sorted((shared / "data/voc30/images").iterdir())[:4]
    images = np.stack([photo_input(photo, 320) for photo in photos])
    cfg = (folder / "yolo-fastest-1.1-xl.cfg").read_text()
    boxes, scores, best = agree(opencv, installed, cfg, (folder / "yolo-fastest-1.1-xl.weights").read_bytes(), images)
    assert boxes <= 1e-4
    assert scores <= 1e-4
    assert best > 0.8, "the photos must show something that the network knows"


def photo_input(path, side):
    import cv2

    pixels = cv2.resize(cv2.imread(str(path), cv2.IMREAD_COLOR), (side, side))[..., ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / 255


@pytest.mark.parametrize(
    ("name", "parameters"), [("yolov3-tiny", 8_858_734), ("yolov4-tiny", 6_062_814), ("yolov4", 64_429_405)]
)
def test_published_cfgs_with_random_weights(name, parameters, opencv, installed, shared):
    """Reduced to 160 x 160. The counts follow from the lengths of the published weight files."""
    cfg = (shared / f"testweights/darknet-cfg/{name}.cfg").read_text()
    weights = write_weights(opencv.randomise(Darknet(cfg, (160, 160)), seed=0))
    assert len(weights) == 20 + 4 * parameters
    images = np.random.RandomState(1).rand(2, 3, 160, 160).astype(np.float32)
    boxes, scores, best = agree(opencv, installed, cfg, weights, images)
    assert boxes <= 1e-4
    assert scores <= 1e-4
    assert best > 0.2
