"""What is served of torchvision's families against torchvision's own inference, with the same seeded weights.

Detectors and segmenters are compared on the pixels that enter our network, which are compared with the library's in
grey levels. "From the file" counts the comparison with the library on the file as well. Our detectors see pixels that
nobody rounded, as the library's do; our segmenters see whole grey levels, to whose rounding random networks answer, so
that the library on the file disagrees with itself on a rounded one.

    python scripts/fidelity_torchvision.py [NAME...]

prints the rows that `fidelity.py` puts into docs/fidelity.md. Official weights would have to be fetched from
download.pytorch.org; what is compared here is everything around them. `awaken` makes a network with random weights
answer as variously as a trained one does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from fidelity_page import Page, Run, Section
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

from vision_service.config import ModelSpec, WeightsSpec
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, replace_fields
from vision_service.imaging.preprocess import boxes_to_original, content_hw, preprocess
from vision_service.types import Classification, Detections, ImageMeta, ParamOverrides, Result, SegmentationMap, Task
from vision_service.zoo import torchvision as zoo

SAMPLES = Path(__file__).resolve().parent.parent / "samples"

NAMES = (
    "alexnet",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "resnet50",
    "vit_b_16",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)

SHORT = ("inception_v3", "resnet50", "ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large")

HEADER = ("Torchvision, same seeded weights, samples/", "compared", "equal", "largest difference")

# Layers whose output decides, and how far theirs is made to spread: logits by some units, box deltas by less.
_DECIDING = {
    "rpn.head.cls_logits": (0.0, 2.0),
    "rpn.head.bbox_pred": (0.0, 0.3),
    "box_predictor.cls_score": (0.0, 2.0),
    "box_predictor.bbox_pred": (0.0, 1.0),
    "mask_predictor.mask_fcn_logits": (0.0, 2.0),
    "classification_head.cls_logits": (-3.0, 1.0),
    "classification_head.module_list": (0.0, 2.0),
    "regression_head.bbox_reg": (0.5, 0.5),
    "regression_head.bbox_ctrness": (0.0, 1.0),
    "regression_head.module_list": (0.0, 0.5),
}


def awaken(network: nn.Module, images: Sequence[Tensor], seed: int = 0) -> nn.Module:
    """Make random weights answer variously: batch norms learn the photos' scale, deciding layers spread.

    Args:
        network: one of torchvision's; changed in place.
        images: float ``[3, h, w]`` each, as its forward takes them: normalised for all but detectors.
        seed: of the new weights.

    Returns:
        The network, ready for inference.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5, generator=generator)
        network.eval()
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(_settle) for norm in norms]
        # Of a detector only the backbone: what follows takes lists of images, and has few batch norms.
        detects = hasattr(network, "transform")
        backbone = network.backbone if detects else network
        seen = [network.transform.normalize(image) for image in images] if detects else images
        side = 128 if hasattr(backbone, "fpn") else getattr(network, "image_size", 320)  # what the others need
        backbone(torch.cat([_square(image, side) for image in seen]))
        for hook in hooks:
            hook.remove()
        _spread(network, images, side, generator)
    return network


def _settle(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Divide by the root mean square. Subtracting the mean as well would, layer by layer, make noise of the photos."""
    norm.running_mean.zero_()
    norm.running_var.copy_(inputs[0].square().mean((0, 2, 3)).clamp(min=1e-6))


def _square(image: Tensor, side: int) -> Tensor:
    """Float ``[1, 3, side, side]``."""
    return nn.functional.interpolate(image[None], (side, side), mode="bilinear")


def _spread(network: nn.Module, images: Sequence[Tensor], side: int, generator: torch.Generator) -> None:
    """Scale each deciding layer when it first runs, since what comes later depends on what came before."""
    kinds = (nn.Conv2d, nn.Linear)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, kinds) and m.bias is not None}
    targets = {layer: _DECIDING[key] for name, layer in layers.items() for key in _DECIDING if key in name}

    def adjust(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mean, std = targets.pop(layer, (None, None))
        if mean is None:
            return output
        layer.bias.zero_()
        layer.weight.mul_(std / layer.forward(*inputs).std().clamp(min=1e-6))
        layer.bias.normal_(mean=mean, std=0.3, generator=generator)
        return layer.forward(*inputs)

    detects = bool(targets)
    if not detects:
        targets[list(layers.values())[-1]] = (0.0, 2.0)
    for layer in list(targets):
        layer.register_forward_hook(adjust)
    network(list(images)) if detects else network(_square(images[0], side))
    for layer in layers.values():
        layer._forward_hooks.clear()


def matched(ours: Detections, theirs: dict[str, Tensor]) -> tuple[int, float, float]:
    """How many boxes match one to one, of the same class; least overlap and largest difference of a score among them.

    A box matches at an overlap of at least 0.98 and a score within 0.01.
    """
    overlaps = box_iou(torch.from_numpy(ours.boxes_xyxy), theirs["boxes"])
    same = torch.from_numpy(ours.class_ids)[:, None] == theirs["labels"]
    gaps = (torch.from_numpy(ours.scores)[:, None] - theirs["scores"]).abs()
    overlaps = torch.where(same & (gaps <= 0.01), overlaps, -1.0)
    count, least, gap = 0, 1.0, 0.0
    while overlaps.numel() and overlaps.max() >= 0.98:
        row, column = divmod(int(overlaps.argmax()), overlaps.shape[1])
        count += 1
        least, gap = min(least, float(overlaps[row, column])), max(gap, float(gaps[row, column]))
        overlaps[row], overlaps[:, column] = -1.0, -1.0
    return count, least, gap


def compare(page: Page, run: Run) -> None:
    """One table."""
    page.table(*HEADER)
    for cells, good in rows(run.some(NAMES, SHORT)):
        page.row(*cells, ok=good)


def rows(names: Sequence[str] = NAMES) -> Iterator[tuple[tuple[str, str, str, str], bool]]:
    """The table's rows, and whether each is good enough.

    Args:
        names: of models in torchvision.
    """
    files = sorted(SAMPLES.glob("*.jpg"))
    photos = [Image.open(file).convert("RGB") for file in files]
    for name in names:
        known = zoo.spec(name)
        if known is None:
            raise SystemExit(f"torchvision has no model {name!r}")
        torch.manual_seed(0)
        preset = models.get_model_weights(name).DEFAULT.transforms()
        theirs = awaken(_library(known), [preset(photo) for photo in photos])
        if (head := getattr(getattr(theirs, "head", None), "classification_head", None)) and hasattr(
            head, "num_anchors"
        ):
            # RetinaNet and FCOS learn that there is no class 0; the library would report it, and ours does not.
            head.cls_logits.bias.detach().view(head.num_anchors, -1)[:, 0] = -50.0
        with tempfile.TemporaryDirectory() as folder:
            results = _ours(known, theirs, files, Path(folder) / "weights.safetensors")
        compare = {Task.CLASSIFY: _classes, Task.DETECT: _boxes, Task.SEGMENT: _maps}[known.task]
        with torch.inference_mode():
            (compared, equal, difference), ok = compare(theirs, known, photos, results)
        yield (name, compared, equal, difference), ok


def _library(spec: ModelSpec) -> nn.Module:
    """As torchvision builds it for its weights, without them."""
    extra = {"transform_input": True, "init_weights": False} if spec.options.get("transform_input") else {}
    if spec.task is not Task.CLASSIFY:
        extra = {"weights_backbone": None}
    return models.get_model(spec.name, weights=None, num_classes=len(spec.classes), **extra)


def _ours(spec: ModelSpec, theirs: nn.Module, files: Sequence[Path], weights: Path) -> list[Result]:
    """The whole way of a request, in process."""
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, weights)
    named = WeightsSpec(file=str(weights), licence="none", source="seeded random")
    options = {name: value for name, value in spec.options.items() if name != "zero_eps"}  # as the library was built
    spec = spec.model_copy(update={"weights": named, "options": options, "device": "cpu"})
    spec = replace_fields(spec, {"batching": {"max_batch_size": 1}})
    overrides = ParamOverrides(top_k=len(spec.classes))
    if spec.task is Task.DETECT:
        head = getattr(theirs, "roi_heads", theirs)
        overrides = ParamOverrides(score_threshold=head.score_thresh)
    with build_pipeline(ServerSettings.read(models=(spec.name,)), [spec]) as pipeline:
        pipeline.catalog.load(spec)
        results = list(pipeline.predict_many(files, task=spec.task, model=spec.name, overrides=overrides))
    for result in results:
        if not isinstance(result, Result):
            raise SystemExit(f"{spec.name}: {result}")
    return results


Compared = tuple[tuple[str, str, str], bool]


def _classes(theirs: nn.Module, spec: ModelSpec, photos: Sequence[Image.Image], results: Sequence[Result]) -> Compared:
    preset = models.get_model_weights(spec.name).DEFAULT.transforms()
    agreed, gap = 0, 0.0
    for photo, result in zip(photos, results, strict=True):
        found: Classification = result.prediction
        expected = theirs(preset(photo)[None]).softmax(1)[0].numpy()
        agreed += int(found.class_ids[0] == expected.argmax())
        gap = max(gap, float(np.abs(found.scores - expected[found.class_ids]).max()))
    return (f"{len(photos)} photos", f"{agreed} top-1", f"probability {gap:.4f}"), agreed == len(photos)


def _boxes(theirs: nn.Module, spec: ModelSpec, photos: Sequence[Image.Image], results: Sequence[Result]) -> Compared:
    total, alike, whole, least, gap, levels = 0, 0, 0, 1.0, 0.0, 0.0
    for photo, result in zip(photos, results, strict=True):
        image = pil_to_tensor(photo) / 255
        pixels, meta, level = _entered(spec, photo, theirs.transform([image])[0].tensors[0])
        (given,), (alone,) = theirs([pixels / 255]), theirs([image])
        given["boxes"] = torch.from_numpy(boxes_to_original(given["boxes"].numpy(), meta))
        given, alone = _with_area(given), _with_area(alone)
        found: Detections = result.prediction
        count, overlap, score = matched(found, given)
        total, alike = total + max(len(found), len(given["scores"])), alike + count
        whole += matched(found, alone)[0]
        least, gap, levels = min(least, overlap), max(gap, score), max(levels, level)
    cells = (
        f"{total} boxes",
        f"{alike} ({whole} from the file)",
        f"IoU {least:.4f}, score {gap:.5f}, input {levels:.2f}",
    )
    return cells, alike == total and levels <= 1.0


def _entered(spec: ModelSpec, photo: Image.Image, theirs: Tensor) -> tuple[Tensor, ImageMeta, float]:
    """What enters our network, uint8 ``[3, h, w]``, and how many grey levels it is at most from the library's input."""
    pixels, meta = preprocess(np.asarray(photo), spec.preprocess)
    height, width = content_hw(meta)
    ours = torch.from_numpy(pixels[:height, :width]).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
    return ours, meta, float((theirs[:, :height, :width] * std + mean - ours).abs().max())


def _with_area(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what ours leaves out on purpose: boxes that lie in the padding, and the background."""
    kept = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1) & (found["labels"] > 0)
    return {name: values[kept] for name, values in found.items()}


def _maps(theirs: nn.Module, spec: ModelSpec, photos: Sequence[Image.Image], results: Sequence[Result]) -> Compared:
    preset = models.get_model_weights(spec.name).DEFAULT.transforms()
    total, alike, whole, levels = 0, 0, 0, 0.0
    for photo, result in zip(photos, results, strict=True):
        found: SegmentationMap = result.prediction
        alone = preset(photo)
        pixels, _, level = _entered(spec, photo, alone)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
        counts = []
        for x in ((pixels - mean) / std, alone):
            probabilities = theirs(x[None])["out"].softmax(1)
            expected = nn.functional.interpolate(probabilities, found.class_map.shape, mode="bilinear").argmax(1)[0]
            counts.append(int((expected.numpy() == found.class_map).sum()))
        total, alike, whole = total + found.class_map.size, alike + counts[0], whole + counts[1]
        levels = max(levels, level)
    shares = f"{100 * alike / total:.3f} % ({100 * whole / total:.2f} % from the file)"
    return (f"{total} pixels", shares, f"input {levels:.2f}"), alike >= 0.9999 * total and levels <= 2.01


AGAINST = """\
- **Torchvision**: its own networks, transforms and postprocessing, with seeded random weights on both sides, since
  the official ones have to be fetched. Detectors and segmenters are compared on the pixels that enter our network,
  and those with the library's in grey levels ("input"). "From the file" is the comparison with the library on the same
  JPEG: pixels of detectors are not rounded, as in the library; those of segmenters are whole grey levels, which a
  random network magnifies until the library disagrees with itself. Required are the same boxes (IoU 0.98, score within
  0.01) and classes, and at most one grey level (two for antialiased resizing). Ours leaves out boxes without area and
  `__background__` on purpose.
"""

SECTION = Section("torchvision", compare, AGAINST, short=", ".join(SHORT))


if __name__ == "__main__":
    for cells, good in rows(sys.argv[1:] or NAMES):
        print(" | ".join(cells), "" if good else "| MISSED", flush=True)
