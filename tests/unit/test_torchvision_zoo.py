"""What torchvision offers, as specs; and that its checkpoints would fit the networks that are built for them."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models
from torchvision.transforms import InterpolationMode, functional

from tests.helpers import ROOT, tiny_spec
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError
from vision_service.imaging.preprocess import content_hw, preprocess
from vision_service.types import Task
from vision_service.zoo import torchvision as zoo

CLASSIFIERS = models.list_models(module=models)


def test_every_name_of_the_library_is_there():
    wanted = {
        *CLASSIFIERS,
        *models.list_models(module=models.segmentation),
        *(name for name in models.list_models(module=models.detection) if not name.startswith("keypointrcnn")),
    }
    assert set(zoo.names()) == wanted
    assert all(zoo.spec(name).name == name for name in zoo.names())


def test_sizes_are_those_that_the_library_rounds():
    weights = zoo.spec("mobilenet_v2", "IMAGENET1K_V1").weights
    assert weights.size_bytes is None  # nothing is compared with a rounded figure
    assert abs(weights.about_bytes - 14_212_972) < 6_000  # the length of mobilenet_v2-b0353104.pth
    assert all(zoo.spec(name).weights.about_bytes for name in zoo.names())


@pytest.mark.parametrize("name", ["", "resnet51", "keypointrcnn_resnet50_fpn", "quantized_resnet50"])
def test_what_there_is_not(name):
    assert zoo.spec(name) is None


def test_versions_are_members_of_the_enum():
    enum = models.ResNet50_Weights
    for version, member in (("", enum.DEFAULT), ("IMAGENET1K_V1", enum.IMAGENET1K_V1), ("DEFAULT", enum.DEFAULT)):
        spec = zoo.spec("resnet50", version)
        assert (spec.version, spec.weights.url) == (member.name, member.url)
        assert spec.preprocess.resize.shortest_side == member.transforms().resize_size[0]
    assert zoo.spec("resnet50", "IMAGENET1K_V3") is None
    assert zoo.spec("vgg16", "IMAGENET1K_FEATURES") is None, "has no classes"


def test_weights_name_their_file_hash_and_terms():
    for name in zoo.names():
        for member in models.get_model_weights(name):
            spec = zoo.spec(name, member.name)
            if spec is None:
                continue
            assert re.fullmatch(rf".+-{spec.weights.sha256}\.pth", spec.weights.file)
            assert len(spec.weights.sha256) >= 8
            assert spec.weights.url == member.url
            assert member.url.endswith("/" + spec.weights.file)
            assert spec.weights.licence == ("CC-BY-NC-4.0" if "SWAG" in member.name else "BSD-3-Clause")
            assert "training data" in spec.weights.source


@pytest.mark.parametrize(
    "name", ["resnet50", "efficientnet_b0", "inception_v3", "vit_b_16", "swin_t", "regnet_y_400mf"]
)
@pytest.mark.parametrize("hw", [(300, 451), (640, 200), (90, 70)])
def test_classifiers_see_what_the_preset_makes(name, hw):
    rng = np.random.RandomState(0)
    image = np.array(Image.fromarray(rng.randint(0, 256, (9, 9, 3), np.uint8)).resize(hw[::-1]))
    spec = zoo.spec(name)
    pixels, _ = preprocess(image, spec.preprocess)
    ours = (pixels - np.array(spec.preprocess.mean)) / np.array(spec.preprocess.std)
    preset = models.get_model_weights(name).DEFAULT.transforms()
    theirs = preset(Image.fromarray(image)).permute(1, 2, 0).numpy()
    # Pillow's resize and torch's differ by one of 255 here and there, rarely by two.
    np.testing.assert_allclose(ours, theirs, atol=2.001 / min(spec.preprocess.std))
    assert np.abs(ours - theirs).mean() < 0.2 / min(spec.preprocess.std)


def test_bicubic_antialias_is_pillows():
    image = np.array(Image.open(ROOT / "samples" / "chelsea.jpg").convert("RGB"))
    spec = tiny_spec(
        preprocess={"resize": {"mode": "stretch", "size_hw": (60, 97)}, "interpolation": "bicubic_antialias"}
    )
    ours, _ = preprocess(image, spec.preprocess)
    theirs = functional.resize(Image.fromarray(image), [60, 97], InterpolationMode.BICUBIC)
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1
    linear, _ = preprocess(image, tiny_spec(preprocess={"resize": {"mode": "stretch", "size_hw": (60, 97)}}).preprocess)
    assert np.abs(ours.astype(int) - linear.astype(int)).max() > 5, "the option would have no effect"


def test_detectors_carry_the_librarys_own_numbers():
    ssd, ssdlite, rcnn = (
        zoo.spec(name) for name in ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn")
    )
    assert ssd.preprocess.resize.size_hw == (300, 300)
    # What the paper's Caffe network subtracts, which torchvision writes as fractions of 255 with five digits.
    np.testing.assert_allclose(ssd.preprocess.mean, (123, 117, 104), atol=0.01)
    assert ssd.preprocess.std == (1, 1, 1)
    assert ssdlite.preprocess.mean == ssdlite.preprocess.std == (127.5, 127.5, 127.5)
    assert (rcnn.preprocess.resize.shortest_side, rcnn.preprocess.resize.longest_side) == (800, 1333)
    assert (rcnn.params.iou_threshold, rcnn.params.max_detections) == (0.5, 100)
    assert (ssd.params.iou_threshold, ssd.params.max_detections) == (0.45, 200)
    for spec in (ssd, ssdlite, rcnn):
        assert (spec.classes[0], spec.classes[1], spec.classes[90], len(spec.classes)) == (
            "__background__", "person", "toothbrush", 91,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_detector_sees_what_the_library_shows_it(name):
    spec = zoo.spec(name)
    transform = models.get_model(name, weights=None, weights_backbone=None).eval().transform
    image = np.random.RandomState(0).randint(0, 256, (240, 330, 3), np.uint8)
    theirs = transform([torch.from_numpy(image).permute(2, 0, 1) / 255])[0].tensors[0]
    pixels, meta = preprocess(image, spec.preprocess)
    height, width = content_hw(meta)
    mean, std = np.array(spec.preprocess.mean), np.array(spec.preprocess.std)
    ours = ((pixels - mean) / std)[:height, :width].transpose(2, 0, 1)
    assert np.abs(ours - theirs.numpy()[:, :height, :width]).max() < 1e-3
    assert spec.preprocess.exact_decode  # a JPEG decoded at a smaller scale is filtered, which the library does not do


def test_segmenters_know_the_background():
    spec = zoo.spec("deeplabv3_resnet50")
    assert (spec.task, spec.background_id, spec.classes[0], spec.classes[15]) == (
        Task.SEGMENT, 0, "__background__", "person",
    )  # fmt: skip
    image = np.zeros((100, 130, 3), np.uint8)
    preset = models.get_model_weights("deeplabv3_resnet50").DEFAULT.transforms()
    theirs = preset(torch.from_numpy(image).permute(2, 0, 1))
    pixels, _ = preprocess(image, spec.preprocess)
    assert pixels.shape[:2] == tuple(theirs.shape[1:])


FAMILIES = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0
swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2""".split()  # noqa: SIM905


@pytest.mark.parametrize("arch", FAMILIES)
def test_classifiers_are_built_as_the_library_builds_them_for_its_weights(arch):
    """On the meta device, without memory, but for RegNet, whose builder computes with tensors."""
    for member in models.get_model_weights(arch):
        library_takes = {}
        if arch.startswith("vit"):
            library_takes = {"image_size": member.meta["min_size"][0]}
        if arch.startswith("maxvit"):
            library_takes = {"input_size": member.meta["min_size"]}
        if arch in ("googlenet", "inception_v3"):
            library_takes = {"transform_input": True, "init_weights": False}
        with torch.device("cpu" if arch.startswith("regnet") else "meta"):
            ours = create_backend(zoo.spec(arch, member.name)).build_network()
            theirs = models.get_model(arch, weights=None, **library_takes)
        auxiliary = ("aux1.", "aux2.", "AuxLogits.")
        wanted = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith(auxiliary)}
        assert {k: v.shape for k, v in ours.state_dict().items()} == wanted
        if arch != "inception_v3":  # whose figure counts the auxiliary head
            assert sum(p.numel() for p in ours.parameters()) == member.meta["num_params"]


@pytest.mark.parametrize("arch", ["inception_v3", "googlenet"])
def test_a_checkpoint_with_auxiliary_heads(arch, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    awaken = importlib.import_module("fidelity_torchvision").awaken
    torch.manual_seed(0)
    theirs = models.get_model(arch, weights=None, num_classes=3, init_weights=False, transform_input=True)
    awaken(theirs, [torch.rand(3, 96, 96) for _ in range(2)])
    assert any(name.startswith(("aux1.", "AuxLogits.")) for name in theirs.state_dict())
    file = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), file)
    known = zoo.spec(arch)
    spec = tiny_spec(
        backend="torchvision_classifier",
        classes=("a", "b", "c"),
        options=known.options,
        preprocess=known.preprocess.model_dump(),
        weights={"file": str(file), "licence": "none", "source": "this test"},
    )
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(create_backend(spec).build().eval().network(x), theirs(x), atol=1e-4, rtol=1e-4)
        plain = create_backend(spec.model_copy(update={"options": {"arch": arch}})).build().eval()
        assert not torch.allclose(plain.network(x), theirs(x), atol=1e-2), "transform_input would have no effect"


def test_transform_input_is_refused_where_it_would_have_no_effect():
    options = {"arch": "resnet18", "transform_input": True}
    with pytest.raises(ConfigError, match="no effect on resnet18"):
        create_backend(tiny_spec(backend="torchvision_classifier", options=options))


def test_densenet_in_old_names(tmp_path):
    theirs = models.densenet121(num_classes=3)
    old = {
        re.sub(r"(denselayer\d+\.)(norm|conv)([12])\.", r"\1\2.\3.", name): value
        for name, value in theirs.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    file = tmp_path / "weights.safetensors"
    save_file(old, file)
    spec = tiny_spec(
        backend="torchvision_classifier",
        classes=("a", "b", "c"),
        options={"arch": "densenet121"},
        weights={"file": str(file), "licence": "none", "source": "this test"},
    )
    loaded = create_backend(spec).build().network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in theirs.state_dict().items())
