"""Every model that torchvision has weights for: classification, detection of boxes and masks, semantic segmentation.

Urls, hashes, class tables and preprocessing come from torchvision's weight enums, and what a detector resizes,
subtracts and divides by from the detector itself. A version of a model is the name of a member of its enum; without one
it is the enum's default.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torchvision import models
from torchvision.models import detection, segmentation
from torchvision.transforms import InterpolationMode

from vision_service.config import BatchingSpec, Limit, ModelSpec, PreprocessSpec, ShortestSideCrop, Stretch, WeightsSpec
from vision_service.types import Params, Task

_SHA256 = re.compile(r"-([0-9a-f]{8,64})\.pth$")
"""Torchvision's convention: the name of a file ends with the first digits of its hash (``torch.hub``)."""

_INTERPOLATION = {InterpolationMode.BILINEAR: "antialias", InterpolationMode.BICUBIC: "bicubic_antialias"}

_ZERO_EPS = {"fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"}
"""Whose COCO_V1 weights torchvision runs without an epsilon in the batch norms (its ``overwrite_eps``)."""

_TRANSFORM_INPUT = {"googlenet", "inception_v3"}
"""Whose weights expect another scale than their preset's: torchvision's builders make the network change it."""

_WIDEST_ASPECT = 8
"""A segmentation preset has no limit to the longest side; a photo of one row of pixels must not fill the memory."""

DETECTION_SCORE = 0.25
"""Default threshold of a detector. The library's own, 0.05 or less, is made for measuring precision at every recall."""


def names() -> list[str]:
    """All of them, classification first."""
    return list(_builders())


def spec(name: str, version: str = "") -> ModelSpec | None:
    """A model of torchvision.

    Args:
        name: as in ``torchvision.models.get_model``.
        version: such as ``IMAGENET1K_V1`` or ``COCO_V1``; empty: torchvision's default.

    Returns:
        Its spec, or ``None`` when there is no such model, or no such weights with a class table.
    """
    task = _builders().get(name)
    if task is None:
        return None
    member = models.get_model_weights(name).__members__.get(version or "DEFAULT")
    if member is None or member.meta.get("categories") is None:
        return None
    fields = {Task.CLASSIFY: _classifier, Task.DETECT: _detector, Task.SEGMENT: _segmenter}[task](name, member)
    return ModelSpec(
        name=name,
        version=member.name,
        task=task,
        backend=_BACKENDS[task],
        classes=tuple(member.meta["categories"]),
        weights=_weights(member),
        # A detector's batch of eight takes seconds on a CPU, and the warm-up runs them all.
        batching=BatchingSpec(max_batch_size=4 if task is Task.DETECT else 8),
        **fields,
    )


_BACKENDS = {
    Task.CLASSIFY: "torchvision_classifier",
    Task.DETECT: "torchvision_detector",
    Task.SEGMENT: "torchvision_segmenter",
}


@cache
def _builders() -> dict[str, Task]:
    """Name to task. Keypoints are no task of ours."""
    return {
        **dict.fromkeys(models.list_models(module=models), Task.CLASSIFY),
        **{n: Task.DETECT for n in models.list_models(module=detection) if not n.startswith("keypoint")},
        **dict.fromkeys(models.list_models(module=segmentation), Task.SEGMENT),
    }


def _weights(member: Any) -> WeightsSpec:
    hashed = _SHA256.search(member.url)
    mebibytes = member.meta.get("_file_size")  # with two or three decimals
    # The only terms of their own that torchvision names are those of SWAG's weights, for non-commercial use.
    own_terms = "SWAG" in member.meta.get("license", "")
    return WeightsSpec(
        file=member.url.rpartition("/")[2],
        url=member.url,
        sha256=hashed.group(1) if hashed else "",
        about_bytes=round(mebibytes * 2**20) if mebibytes else None,
        licence="CC-BY-NC-4.0" if own_terms else "BSD-3-Clause",
        source=f"torchvision {member} ({member.meta.get('recipe', member.url)}); training data has terms of its own",
    )


def _classifier(name: str, member: Any) -> dict[str, Any]:
    preset = member.transforms()
    resize = ShortestSideCrop(shortest_side=_one(preset.resize_size), crop_hw=(_one(preset.crop_size),) * 2)
    return {
        "options": {"arch": name} | ({"transform_input": True} if name in _TRANSFORM_INPUT else {}),
        "preprocess": _preprocess(resize, _INTERPOLATION[preset.interpolation], preset.mean, preset.std),
    }


def _segmenter(name: str, member: Any) -> dict[str, Any]:
    preset = member.transforms()
    side = _one(preset.resize_size)
    resize = Limit(shortest_side=side, longest_side=_WIDEST_ASPECT * side)
    return {
        "options": {"arch": name},
        "background_id": member.meta["categories"].index("__background__"),
        "preprocess": _preprocess(resize, _INTERPOLATION[preset.interpolation], preset.mean, preset.std),
    }


def _detector(name: str, member: Any) -> dict[str, Any]:
    built = _outline(name)
    transform = built.transform
    resize: Stretch | Limit
    if transform.fixed_size is not None:
        resize = Stretch(size_hw=transform.fixed_size[::-1])
    else:
        resize = Limit(
            shortest_side=transform.min_size[-1],
            longest_side=transform.max_size,
            pad_multiple=transform.size_divisible,
        )
    head = getattr(built, "roi_heads", built)  # where the thresholds are
    zero_eps = name in _ZERO_EPS and member.name == "COCO_V1"
    return {
        "options": {"arch": name} | ({"zero_eps": True} if zero_eps else {}),
        # The library resizes float tensors with torch's `interpolate`, which does not filter, on whole photos.
        "preprocess": _preprocess(
            resize, "bilinear_float", transform.image_mean, transform.image_std, exact_decode=True
        ),
        "params": Params(
            score_threshold=DETECTION_SCORE,
            iou_threshold=head.nms_thresh,
            max_detections=head.detections_per_img,
        ),
    }


@cache
def _outline(name: str) -> Any:
    """A detector without memory for its parameters: only what it says about itself is of use."""
    with torch.device("meta"):
        return models.get_model(name, weights=None, weights_backbone=None)


def _one(size: list[int] | int) -> int:
    """A preset's size, which it keeps as a list of one."""
    if isinstance(size, int):
        return size
    (side,) = size
    return side


def _preprocess(resize: Any, interpolation: Any, mean: Any, std: Any, *, exact_decode: bool = False) -> PreprocessSpec:
    """Torchvision's mean and std are of values from 0 to 1."""
    return PreprocessSpec(
        resize=resize,
        interpolation=interpolation,
        mean=tuple(255 * value for value in mean),
        std=tuple(255 * value for value in std),
        exact_decode=exact_decode,
    )
