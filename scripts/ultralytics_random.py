"""Networks of the package ultralytics with random weights that find something, for comparisons and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn


def random_model(arch: str, image_bgr: np.ndarray, classes: int = 80, size: int = 640) -> nn.Module:
    """A model of the library with weights that find something in a photo.

    Args:
        arch: a name that the library knows.
        image_bgr: uint8 ``[H, W, 3]``.
        classes: how many.
        size: of the input that the batch norms are to fit.
    """
    from ultralytics.nn import tasks  # noqa: TID251

    kinds = {"-cls": "ClassificationModel", "-seg": "SegmentationModel"}
    kind = "RTDETRDetectionModel" if arch.startswith("rtdetr") else kinds.get(arch[-4:], "DetectionModel")
    torch.manual_seed(0)
    model: Any = getattr(tasks, kind)(f"{arch}.yaml", nc=classes, verbose=False)
    x = torch.from_numpy(cv2.resize(image_bgr, (size, size))[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    head = model.model[-1]
    for name in ("enc_bbox_head", "dec_bbox_head"):  # RT-DETR starts with these at zero: every box its cell
        for mlp in nn.ModuleList([getattr(head, name)]).modules() if hasattr(head, name) else ():
            if hasattr(mlp, "layers"):
                nn.init.normal_(mlp.layers[-1].weight, std=0.05)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
            module.train()
    with torch.no_grad():
        for flipped in (x, x.flip(3), x.flip(2)):
            model(flipped)
    model.eval()
    _sharpen(head, model, x)
    model.names = dict(enumerate(f"thing {i}" for i in range(classes)))
    return model


def _sharpen(head: Any, model: nn.Module, x: Tensor) -> None:
    """Scale what the last layers return: some boxes pass the threshold, classes differ, boxes span a few cells."""
    classes: list[nn.Module] = [head.dec_score_head[-1]] if hasattr(head, "dec_score_head") else []
    boxes: list[nn.Module] = []
    for half in ("", "one2one_"):
        classes += [branch[-1] for branch in getattr(head, f"{half}cv3", None) or ()]
        boxes += [branch[-1] for branch in getattr(head, f"{half}cv2", None) or ()]
    if hasattr(head, "linear"):
        _scale(head.linear, model, x, 1.5)
    for layer in boxes:
        _scale(layer, model, x, 0.7)
        bins = layer.out_channels // 4  # of a distribution of distances; one: the distance itself
        bias = torch.full((bins,), 2.0) if bins == 1 else -0.7 * torch.arange(bins)
        layer.bias.data[:] = bias.repeat(4)
    for layer in classes:
        logits = _scale(layer, model, x, 1.5)
        if logits is not None:
            best = (logits - layer.bias[:, None]).amax(dim=0)
            layer.bias.data[:] = -1.0 - torch.quantile(best, 0.97)


@torch.no_grad()
def _scale(layer: Any, model: nn.Module, x: Tensor, std: float) -> Tensor | None:
    """Give a layer's output a standard deviation; returns that output, ``[channels, places]``, as far as it runs."""
    for _ in range(2):
        seen: list[Tensor] = []

        def note(_module: nn.Module, _inputs: object, output: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(output.detach())

        handle = layer.register_forward_hook(note)
        model(x)
        handle.remove()
        if not seen:  # a half of the head that this version leaves out
            return None
        output = seen[0][0].flatten(1) if seen[0].ndim == 4 else seen[0].reshape(-1, seen[0].shape[-1]).T
        layer.weight *= std / (output - layer.bias[:, None]).std()
    return output


def save(model: Any, path: Path) -> None:
    """Write a checkpoint as the library does: a pickle of the module."""
    task = {"SegmentationModel": "segment", "ClassificationModel": "classify"}.get(type(model).__name__, "detect")
    model.args, model.task = {"task": task}, task
    size = 224 if task == "classify" else 640
    torch.save({"model": model, "ema": None, "train_args": {"task": task, "imgsz": size}}, path)
