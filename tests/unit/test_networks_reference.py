"""Our networks with the weights that ship, against what the original engines returned.

The vectors in tests/data come from ONNX Runtime, LiteRT, TensorFlow.js and torchvision; scripts/reference_vectors.py
wrote them, and none of our networks took part. NanoDet-g and selfie segmentation are published in half precision,
so the weights that ship are the original's, bit by bit; MobileNetV2's were rounded to half precision.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from vision_service.backends.table import create_backend
from vision_service.networks.nanodet import cell_centres, decode_boxes
from vision_service.weights.manifest import find_model


def reference(name):
    return np.load(ROOT / "tests" / "data" / f"reference_{name}.npz")


def served(name):
    """The network as it is served, normalisation included."""
    spec = find_model(name)
    return create_backend(spec).build().eval()


@torch.inference_mode()
def run(network, image):
    return network(torch.from_numpy(image)[None], torch.tensor([image.shape[:2]]))


@torch.inference_mode()
def nanodet_levels():
    """Scores and distance logits of each stride, from our network and from the original."""
    vectors, network = reference("nanodet_g"), served("nanodet_g")
    x = torch.from_numpy(vectors["image"]).permute(2, 0, 1)[None].flip(1).float()
    levels, _ = network.network.raw((x - network.mean) * network.inverse_std)
    for stride, raw in zip((8, 16, 32), levels, strict=True):
        scores, distances = raw[..., :80].sigmoid().flatten(), raw[..., 80:].flatten()
        for kind, ours in (("score", scores), ("distance", distances)):
            positions = vectors[f"{kind}_positions_{stride}"]
            yield ours[positions].numpy(), vectors[f"{kind}s_{stride}"]


def test_nanodet_g_is_the_original():
    for ours, original in nanodet_levels():
        assert len(original) >= 1000
        np.testing.assert_allclose(ours, original, atol=1e-4, rtol=0)


def test_nanodet_g_vectors_hold_more_than_background():
    vectors = reference("nanodet_g")
    assert max(vectors[f"scores_{stride}"].max() for stride in (8, 16, 32)) > 0.3


def test_nanodet_g_decodes_what_the_original_returns():
    vectors = reference("nanodet_g")
    boxes, scores = run(served("nanodet_g"), vectors["image"])
    assert boxes.shape == (1, 3549, 4)
    assert scores.shape == (1, 3549, 80)
    positions = vectors["score_positions_8"]  # stride 8 comes first
    np.testing.assert_allclose(scores[0, :2704].flatten()[positions], vectors["scores_8"], atol=1e-4)


def test_boxes_are_expected_distances_from_the_cell_centre():
    """By hand: one cell of stride 8 at column 1, row 0, each side certain of its distance."""
    centres = cell_centres(1, 2, 8, torch.device("cpu"))
    assert centres.tolist() == [[4.0, 4.0], [12.0, 4.0]]
    logits = torch.full((1, 1, 4, 11), -50.0)
    for side, distance in enumerate((1, 0, 2, 10)):
        logits[0, 0, side, distance] = 50.0
    boxes = decode_boxes(logits.flatten(2), centres[1:], 8)
    torch.testing.assert_close(boxes, torch.tensor([[[12.0 - 8, 4.0 - 0, 12.0 + 16, 4.0 + 80]]]))
    half_way = torch.zeros(1, 1, 44)  # uniform: the mean of 0..10 is 5
    torch.testing.assert_close(decode_boxes(half_way, centres[1:], 8), torch.tensor([[[-28.0, -36.0, 52.0, 44.0]]]))


def test_boxes_stay_float32_in_half_precision():
    centres = torch.tensor([[400.125, 300.25]])
    boxes = decode_boxes(torch.zeros(1, 1, 44, dtype=torch.half), centres, 8)
    torch.testing.assert_close(boxes, torch.tensor([[[360.125, 260.25, 440.125, 340.25]]]))


def test_selfie_segmentation_is_the_original():
    vectors = reference("selfie_segmentation")
    (logits,) = run(served("selfie_segmentation"), vectors["image"])
    ours = logits.sigmoid().flatten()[vectors["positions"]].numpy()
    np.testing.assert_allclose(ours, vectors["probabilities"], atol=1e-4, rtol=0)
    unsure = (vectors["probabilities"] > 0.05) & (vectors["probabilities"] < 0.95)
    assert unsure.sum() > 100, "the vectors must hold more than clear cases"


def test_esrgan_slim_is_the_original():
    vectors = reference("esrgan_slim_x2")
    (image,) = run(served("esrgan_slim_x2"), vectors["image"])
    ours = image[0].permute(1, 2, 0).numpy()  # 0..1, the original has 0..255
    assert ours.shape == (56, 64, 3)
    np.testing.assert_allclose(ours, vectors["output"] / 255, atol=1e-4, rtol=0)
    assert np.ptp(ours) > 0.5


def test_mobilenet_v2_is_the_original_but_for_rounding():
    vectors = reference("mobilenet_v2")
    (logits,) = run(served("mobilenet_v2"), vectors["image"])
    ours, original = logits.softmax(1)[0].numpy(), torch.from_numpy(vectors["logits"]).softmax(0).numpy()
    np.testing.assert_allclose(ours, original, atol=2e-3)
    assert np.argsort(ours)[-3:].tolist() == np.argsort(original)[-3:].tolist()


@pytest.mark.parametrize("name", ["mobilenet_v2", "nanodet_g", "selfie_segmentation", "esrgan_slim_x2"])
def test_memory_format_and_batch_do_not_matter(name):
    network = served(name).network
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 64, 96, generator=rng)
    with torch.inference_mode():
        plain = network(x)
        turned = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        alone = network(x[1:2])
    as_tuple = [out if isinstance(out, tuple) else (out,) for out in (plain, turned, alone)]
    for a, b, c in zip(*as_tuple, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a[1:2], c, atol=1e-4, rtol=1e-4)


def in_half(name):
    """Outputs in float32 and in half precision, on the reference's image."""
    image, network = reference(name)["image"], served(name)
    return run(network, image), run(network.half(), image)


def test_half_precision_finds_the_same_boxes():
    (boxes, scores), (half_boxes, half_scores) = in_half("nanodet_g")
    assert half_boxes.dtype == half_scores.dtype == torch.float32
    torch.testing.assert_close(half_scores, scores, atol=5e-3, rtol=0)
    torch.testing.assert_close(half_boxes, boxes, atol=0.5, rtol=0)  # pixels of 416


def test_half_precision_draws_the_same_mask():
    (logits,), (half_logits,) = in_half("selfie_segmentation")
    assert half_logits.dtype == torch.half
    assert ((logits > 0) != (half_logits > 0)).float().mean() < 1e-3


def test_half_precision_makes_the_same_image():
    (image,), (half_image,) = in_half("esrgan_slim_x2")
    assert half_image.dtype == torch.half
    torch.testing.assert_close(half_image.float(), image, atol=1 / 255, rtol=0)
