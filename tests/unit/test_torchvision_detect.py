"""Torchvision's detectors, against torchvision's own inference with the same weights."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetHead

from tests.helpers import ROOT, tiny_spec
from vision_service.backends._torchvision_load import load_library_weights
from vision_service.backends.table import create_backend
from vision_service.backends.torchvision_detect import architectures
from vision_service.errors import ConfigError, WeightsError
from vision_service.imaging.masks import decode_rle
from vision_service.imaging.preprocess import content_hw, preprocess, stack
from vision_service.types import Params
from vision_service.zoo import torchvision as zoo

NAMES = tuple("abcdefg")
LIMIT = {"mode": "limit", "shortest_side": 64, "longest_side": 128, "pad_multiple": 32}
TWO_STAGE = {"rpn_post_nms_top_n_test": 60, "box_detections_per_img": 20}
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {},
    "maskrcnn_resnet50_fpn": TWO_STAGE,
    "retinanet_resnet50_fpn": {"topk_candidates": 200},
    "fcos_resnet50_fpn": {"topk_candidates": 50},
    "ssdlite320_mobilenet_v3_large": {},
}


def photos(arch):
    """Sizes that the resizing leaves as they are, so that both sides get the same pixels."""
    sizes = [(320, 320)] * 2 if arch.startswith("ssd") else [(96, 64), (64, 100)]
    files = [ROOT / "samples" / name for name in ("astronaut.jpg", "coffee.jpg")]
    return [np.array(Image.open(f).convert("RGB").resize(wh)) for f, wh in zip(files, sizes, strict=True)]


def library(arch):
    """Torchvision's detector with seeded weights that find many things."""
    reference = importlib.import_module("fidelity_torchvision")
    sizes = {} if arch.startswith("ssd") else {"min_size": 64, "max_size": 128}
    network = models.get_model(
        arch, weights=None, weights_backbone=None, num_classes=len(NAMES), **sizes, **DETECTORS[arch]
    )
    return reference.awaken(network, [tensor(image) for image in photos(arch)])


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def our_spec(arch, **more):
    # RetinaNet and FCOS of the library report class 0 like any other; see `test_background_is_never_reported`.
    classes = NAMES if arch.startswith(("retinanet", "fcos")) else ("__background__", *NAMES[1:])
    resize = {"mode": "stretch", "size_hw": (320, 320)} if arch.startswith("ssd") else LIMIT
    known = zoo.spec(arch).preprocess
    fields = {
        "classes": classes,
        "options": {"arch": arch},
        "preprocess": {"resize": resize, "interpolation": "bilinear", "mean": known.mean, "std": known.std},
    }
    return tiny_spec(task="detect", backend="torchvision_detector", **fields | more)


def ours_like(theirs, arch, **more):
    """Our backend and its network with the library's weights and limits."""
    backend = create_backend(our_spec(arch, **more))
    served = backend.build().eval()
    served.network.detector.load_state_dict(theirs.state_dict())
    if hasattr(theirs, "rpn"):
        served.network.detector.rpn._post_nms_top_n = theirs.rpn._post_nms_top_n
    else:
        served.network.candidates = served.network.detector.topk_candidates = theirs.topk_candidates
    return backend, served


def its_params(theirs, **more):
    head = getattr(theirs, "roi_heads", theirs)
    limits = {"iou_threshold": head.nms_thresh, "max_detections": head.detections_per_img}
    return Params(**{"score_threshold": head.score_thresh} | limits | more)


@pytest.fixture(scope="module", params=DETECTORS)
def pair(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        theirs = library(request.param)
    return request.param, theirs, *ours_like(theirs, request.param)


def with_area(found):
    """Boxes without area are where the library decoded padding; ours leaves them out."""
    keep = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(dim=1)
    return {name: values[keep] for name, values in found.items()}


def test_a_mixed_batch_of_the_same_tensors(pair):
    arch, theirs, backend, served = pair
    images = photos(arch)
    metas = [preprocess(image, backend.spec.preprocess)[1] for image in images]
    with torch.inference_mode():
        want = [with_area(found) for found in theirs([tensor(image) for image in images])]
        batch, _ = theirs.transform([tensor(image) for image in images])
        outputs = served.network(batch.tensors, torch.tensor(batch.image_sizes))
        got = backend.postprocess(outputs, metas, [its_params(theirs)] * 2)
    assert sum(len(found["scores"]) for found in want) >= 40
    for mine, its, meta in zip(got, want, metas, strict=True):
        assert mine.class_ids.tolist() == its["labels"].tolist()
        np.testing.assert_allclose(mine.scores, its["scores"], atol=1e-4)
        np.testing.assert_allclose(mine.boxes_xyxy, its["boxes"], atol=1e-4)
        if arch.startswith("mask"):
            masks = np.stack([decode_rle(rle, meta.original_hw) for rle in mine.mask_rles])
            assert 0.001 < masks.mean() < 0.5
            np.testing.assert_array_equal(masks, its["masks"][:, 0].numpy() >= 0.5)
        else:
            assert mine.mask_rles is None


def test_from_pixels(pair):
    """What our normalisation, padding and batching give the network is what the library's transform gives it."""
    arch, theirs, backend, served = pair
    images = photos(arch)
    inputs = [preprocess(image, backend.spec.preprocess) for image in images]
    seen = []
    hook = served.network.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        batch, _ = theirs.transform([tensor(image) for image in images])
        sizes_hw = torch.tensor([content_hw(meta) for _, meta in inputs])
        served(torch.from_numpy(stack([pixels for pixels, _ in inputs])), sizes_hw)
    hook.remove()
    ((entered, entered_sizes),) = seen
    torch.testing.assert_close(entered.contiguous(), batch.tensors, atol=4e-5, rtol=1e-6)
    assert entered_sizes.tolist() == [list(size) for size in batch.image_sizes]


def test_thresholds_below_and_above_the_librarys_have_an_effect(pair):
    arch, theirs, backend, served = pair
    if arch.startswith("mask"):
        pytest.skip("thresholds are Faster R-CNN's, and thousands of masks take long")
    # SSD's own is so low that its limit of candidates a class decides.
    default_threshold = 0.3 if arch.startswith("ssd") else getattr(theirs, "roi_heads", theirs).score_thresh
    image = photos(arch)[0]
    pixels, meta = preprocess(image, backend.spec.preprocess)
    with torch.inference_mode():
        outputs = served(torch.from_numpy(pixels)[None], torch.tensor([content_hw(meta)]))

        def found(threshold):
            (detections,) = backend.postprocess(
                outputs, [meta], [its_params(theirs, score_threshold=threshold, max_detections=100_000)]
            )
            return detections.scores

        low, default, high = (found(threshold) for threshold in (0.0, default_threshold, 0.5))
    assert len(low) > len(default) > len(high) > 0
    assert low.min() < default_threshold <= default.min() < 0.5 <= high.min()


@pytest.mark.parametrize("arch", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_background_is_never_reported(arch):
    backend = create_backend(our_spec(arch, classes=("__background__", "b", "c")))
    served = backend.build().eval()
    pixels, meta = preprocess(photos(arch)[0], backend.spec.preprocess)
    with torch.inference_mode():
        outputs = served(torch.from_numpy(pixels)[None], torch.tensor([content_hw(meta)]))
    everything = Params(score_threshold=0.0, max_detections=100_000, iou_threshold=1.0)
    (found,) = backend.postprocess(outputs, [meta], [everything])
    assert set(found.class_names) == {"b", "c"}


def test_class_zero_must_be_the_background():
    with pytest.raises(ConfigError, match="begin the classes with '__background__', got 'a'"):
        create_backend(our_spec("ssd300_vgg16", classes=NAMES))


def test_unknown_network_names_near_ones():
    with pytest.raises(ConfigError, match="no detector 'fasterrcnn_resnet5_fpn'; did you mean 'fasterrcnn_resnet50"):
        create_backend(our_spec("fcos_resnet50_fpn", options={"arch": "fasterrcnn_resnet5_fpn"}))


@pytest.mark.parametrize("zero_eps", [True, False])
def test_zero_eps(zero_eps):
    options = {"arch": "fasterrcnn_mobilenet_v3_large_320_fpn", "zero_eps": zero_eps}
    network = create_backend(our_spec(options["arch"], options=options)).build()
    found = {module.eps for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert found == ({0.0} if zero_eps else {1e-5})


def test_zero_eps_is_for_the_weights_that_torchvision_does_it_for():
    for name in architectures():
        source = inspect.getsource(detection.__dict__[name].__wrapped__)
        for member in models.get_model_weights(name):
            wanted = "overwrite_eps(model, 0.0)" in source and f"{member!s}:" in source
            assert zoo.spec(name, member.name).options.get("zero_eps", False) == wanted, member


OLD_NAMES = {
    # What these layers were called in files that torchvision still publishes.
    "rpn.head.conv.0.0.": "rpn.head.conv.",
    "backbone.fpn.inner_blocks.0.0.": "backbone.fpn.inner_blocks.0.",
    "backbone.fpn.layer_blocks.1.0.": "backbone.fpn.layer_blocks.1.",
}


def in_old_names(state, names):
    for new, old in names.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    return state


def test_a_checkpoint_in_old_names_loads_and_a_strange_one_does_not(tmp_path):
    arch = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(3)
    theirs = models.get_model(arch, weights=None, weights_backbone=None, num_classes=len(NAMES)).state_dict()
    state = in_old_names(theirs, OLD_NAMES)
    assert set(state) - set(theirs) == {old + kind for old in OLD_NAMES.values() for kind in ("weight", "bias")}
    file = tmp_path / "old.safetensors"
    save_file(state, file)
    spec = our_spec(arch, weights={"file": str(file), "licence": "none", "source": "this test"})
    loaded = create_backend(spec).build().network.detector.state_dict()
    for name, value in theirs.items():
        assert torch.equal(loaded[name], value), name
    del state["rpn.head.conv.bias"]
    state["rpn.head.what"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(WeightsError, match=r"1 missing: rpn\.head\.conv\.0\.0\.bias\. 1 unknown.*rpn\.head\.what"):
        create_backend(spec).build()


@pytest.mark.parametrize(
    ("heads", "names"),
    [
        (lambda: MaskRCNNHeads(4, (4, 4), 1), {"0.0.": "mask_fcn1.", "1.0.": "mask_fcn2."}),
        (lambda: RetinaNetHead(4, 3, 2), {f"conv.{i}.0.": f"conv.{2 * i}." for i in reversed(range(4))}),
    ],
)
def test_heads_in_old_names(heads, names, tmp_path):
    wanted, network = heads(), heads()
    file = tmp_path / "old.safetensors"
    state = in_old_names(wanted.state_dict(), names)
    assert set(state) != set(wanted.state_dict())
    save_file(state, file)
    weights = {"file": str(file), "licence": "none", "source": "this test"}
    load_library_weights(network, our_spec("ssd300_vgg16", weights=weights))
    for name, value in wanted.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
