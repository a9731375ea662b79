"""Our networks against the original graphs themselves, on inputs that no file holds.

Needs the originals, which are not part of the project, and the engines of the extra `fidelity`.
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from tests.unit.test_networks_reference import run, served


@pytest.fixture
def folder(shared):
    return shared / "pretrained"


@pytest.fixture
def originals(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import originals

    return originals


def needs(*modules):
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: install the extra 'fidelity'")


@needs("onnxruntime")
def test_nanodet_g(originals, folder):
    x = np.random.RandomState(3).standard_normal((1, 3, 416, 416)).astype(np.float32)
    with torch.inference_mode():
        levels, sizes = served("nanodet_g").network.raw(torch.from_numpy(x))
    assert sizes == [(52, 52), (26, 26), (13, 13)]
    for raw, (scores, distances) in zip(levels, originals.nanodet_g(folder)(x), strict=True):
        np.testing.assert_allclose(raw[..., :80].sigmoid(), scores, atol=1e-4)
        np.testing.assert_allclose(raw[..., 80:], distances, atol=1e-4)


@needs("ai_edge_litert")
def test_selfie_segmentation(originals, folder):
    image = np.load(ROOT / "tests/data/reference_selfie_segmentation.npz")["image"][:, ::-1].copy()
    original = originals.selfie_segmentation(folder)(image.astype(np.float32) / 255)
    (logits,) = run(served("selfie_segmentation"), image)
    assert original.mean() > 0.2
    np.testing.assert_allclose(logits[0, 0].sigmoid(), original, atol=1e-4)


@needs("onnxruntime", "onnx")
def test_esrgan_slim_x2(originals, folder):
    image = np.random.RandomState(3).randint(0, 256, (21, 34, 3), np.uint8)
    original = originals.esrgan_slim_x2(folder)(image.astype(np.float32)) / 255
    (ours,) = run(served("esrgan_slim_x2"), image)
    np.testing.assert_allclose(ours[0].permute(1, 2, 0), original, atol=1e-4)


@needs("onnxruntime", "onnx")
def test_keras_interpreter_agrees_with_tensorflow_js(originals, folder):
    """The ONNX rebuild of the Keras layers is an oracle only as far as it does what TensorFlow.js does."""
    vectors = np.load(ROOT / "tests/data/reference_esrgan_slim_x2.npz")
    rebuilt = originals.esrgan_slim_x2(folder)(vectors["image"].astype(np.float32))
    np.testing.assert_allclose(rebuilt, vectors["output"], atol=255e-4)


@needs("onnx", "ai_edge_litert")
def test_weights_are_what_the_script_makes_of_the_originals(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import convert_pretrained

    arguments = ["convert_pretrained.py", "--originals", str(folder), "--out", str(ROOT / "weights"), "--check"]
    monkeypatch.setattr(sys, "argv", arguments)
    convert_pretrained.main()
    manifest = (ROOT / "weights/manifest.toml").read_text()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 5
    assert all(sha256 in manifest for sha256, _, name in printed if name.endswith(".safetensors"))
