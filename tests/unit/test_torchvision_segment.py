"""Torchvision's segmentation networks, against torchvision's own forward."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from tests.helpers import ROOT, tiny_spec
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError
from vision_service.imaging.preprocess import content_hw, preprocess
from vision_service.types import Params

CLASSES = ("__background__", *"abcd")


def our_spec(arch, **more):
    resize = {"mode": "limit", "shortest_side": 64, "longest_side": 512}
    imagenet = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    fields = {"classes": CLASSES, "background_id": 0, "options": {"arch": arch}}
    return tiny_spec(
        task="segment", backend="torchvision_segmenter", preprocess={"resize": resize} | imagenet, **fields | more
    )


@pytest.mark.parametrize("arch", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_class_map_of_a_checkpoint_with_auxiliary_head(arch, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    awaken = importlib.import_module("fidelity_torchvision").awaken
    torch.manual_seed(1)
    extra = {} if arch.startswith("lraspp") else {"aux_loss": True}
    theirs = models.get_model(arch, weights=None, weights_backbone=None, num_classes=5, **extra)
    assert arch.startswith("lraspp") or any(name.startswith("aux_classifier.") for name in theirs.state_dict())
    # Random logits favour one class everywhere; centred, each class wins somewhere.
    last = theirs.classifier.high_classifier if arch.startswith("lraspp") else theirs.classifier[4]
    image = np.array(Image.open(ROOT / "samples" / "coffee.jpg").convert("RGB").resize((96, 64)))
    preset = models.segmentation.FCN_ResNet50_Weights.DEFAULT.transforms(resize_size=64)
    x = preset(torch.from_numpy(image).permute(2, 0, 1))[None]
    awaken(theirs, [x[0], x[0].flip(2)])
    with torch.inference_mode():
        last.bias -= theirs(x)["out"].mean((0, 2, 3))
        logits = theirs(x)["out"]
    file = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), file)
    spec = our_spec(arch, weights={"file": str(file), "licence": "none", "source": "this test"})
    backend = create_backend(spec)
    served = backend.build().eval()
    pixels, meta = preprocess(image, spec.preprocess)
    with torch.inference_mode():
        outputs = served(torch.from_numpy(pixels)[None], torch.tensor([content_hw(meta)]))
        torch.testing.assert_close(served.network(x), logits, atol=1e-4, rtol=0)
        exact = backend.postprocess((logits,), [meta], [Params()])[0].class_map
    expected = logits.argmax(1)[0].numpy()
    assert len(np.unique(expected)) >= 3
    np.testing.assert_array_equal(exact, expected)
    ours = backend.postprocess(outputs, [meta], [Params()])[0].class_map
    assert (ours == expected).mean() > 0.999


def test_unknown_network_names_near_ones():
    with pytest.raises(ConfigError, match="no segmentation network 'fcn_resnet5'; did you mean 'fcn_resnet50'"):
        create_backend(our_spec("fcn_resnet5"))
