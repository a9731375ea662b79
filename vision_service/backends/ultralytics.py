"""Backends ``ultralytics_detector`` and ``ultralytics_classifier``: the networks of the package ultralytics.

That package is AGPL-3.0 and comes with the extra ``yolo``. This is the only module that imports it, and only when a
model asks: its bare network runs on our batches, and nothing else of it does.
"""

from __future__ import annotations

import atexit
import functools
import io
import logging
import os
import pickle
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vision_service.backends import _yolo, _yolo_architecture
from vision_service.backends._classification import scores_to_classifications
from vision_service.backends._options import read_options
from vision_service.backends._outputs import check_finite
from vision_service.backends._unchanged import unchanged_process
from vision_service.backends._yolo_network import YoloNetwork
from vision_service.backends.base import Backend, ServedNetwork
from vision_service.config import FileSpec, Letterbox, ModelSpec, Stretch, WeightsSpec
from vision_service.errors import ConfigError, WeightsError
from vision_service.types import ImageMeta, Params, Prediction, Task
from vision_service.weights.check import check_trusted, read_checked
from vision_service.weights.load import fill, load_weights

logger = logging.getLogger(__name__)

_building = threading.Lock()
"""Building a network sets class attributes of the library for a while."""


class UltralyticsBackend(Backend):
    """What both backends share: the network from an architecture, its parameters from safe files or trusted pickles.

    Options: ``arch``, an architecture that comes with the library (``yolov8n``, ``yolo11s-seg``). Without it the spec's
    weights have a companion that ends in ``.yaml``, or are a checkpoint that carries its own. ``end_to_end`` (false):
    of the two heads of YOLOv10 and YOLO26, read the one that lists each object once. The library's ``predict`` reads
    the other and suppresses, unless it is called with ``nms=False``.
    """

    heads: ClassVar[frozenset[str]]

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._where = f"model {spec.name!r}"
        self._options = read_options(spec, {"arch": "", "end_to_end": False})
        self._checkpoint: nn.Module | None = None
        if find_spec("ultralytics") is None:
            raise ConfigError(
                f"{self._where}: backend {spec.backend!r} needs the package ultralytics, which is not installed: "
                "pip install 'vision-service[yolo]'. Its licence is AGPL-3.0, which reaches what is served with it: "
                "read docs/ultralytics.md first"
            )

    def build_network(self) -> nn.Module:
        """The network, unfused, as `YoloNetwork`.

        Raises:
            ConfigError: the architecture is not known, not safe, of another task, or does not take the input's size.
            WeightsError: the architecture lies in a checkpoint that cannot be read or is not trusted.
        """
        tasks = _library()
        architecture = self._architecture()
        head = _yolo_architecture.check(self._where, architecture, self.heads)
        classes = len(self.spec.classes)
        if self._checkpoint is not None and architecture.get("nc") != classes:
            raise ConfigError(f"{self._where}: the checkpoint has {architecture.get('nc')} classes, the spec {classes}")
        kinds = {"Classify": "ClassificationModel", "RTDETRDecoder": "RTDETRDetectionModel"}
        kind = "SegmentationModel" if head.startswith("Segment") else kinds.get(head, "DetectionModel")
        with _building:
            model: nn.Module = getattr(tasks, kind)(dict(architecture), ch=3, nc=classes, verbose=False)
        try:
            network = YoloNetwork(model.eval(), head, end_to_end=self._options["end_to_end"])
        except ValueError as error:
            raise ConfigError(f"{self._where}: option 'end_to_end': {error}") from None
        self._check_input(network.stride)
        return network

    def build(self) -> ServedNetwork:
        """As every backend's; then batch norms are folded, and of two heads the one that is not read is dropped."""
        served = super().build()
        cast(Any, served.network).model.fuse(verbose=False)
        return served

    def load_weights(self, network: nn.Module) -> None:
        """Fill the network from a state dict (safetensors, or torch's format) or from a trusted checkpoint.

        Args:
            network: from `build_network`.

        Raises:
            WeightsError: as every backend's, or the file is a pickle that is neither known nor trusted.
        """
        weights = self.spec.weights
        assert weights is not None, "the base class asks only then"
        checkpoint = self._checkpoint or self._read_checkpoint()
        self._checkpoint = None
        model = cast(nn.Module, network.model)
        if checkpoint is None:
            load_weights(model, self.spec)
        else:
            fill(model, checkpoint.float().state_dict(), f"{self._where}: weights {weights.file}")

    def _architecture(self) -> dict[str, Any]:
        from ultralytics.utils import ROOT, YAML

        if arch := self._options["arch"]:
            file, size = _yolo_architecture.packaged(Path(ROOT), arch)
            return {**YAML.load(file), "scale": size, "yaml_file": f"{arch}.yaml"}
        companions = self.spec.weights.companions if self.spec.weights else ()
        for companion in companions:
            if companion.file.endswith((".yaml", ".yml")):
                return self._read_yaml(companion)
        self._checkpoint = self._read_checkpoint() if self.spec.weights else None
        if self._checkpoint is None:
            raise ConfigError(
                f"{self._where}: no architecture is known; name one that comes with the library in the option 'arch', "
                "such as 'yolov8n', or give the weights a companion that ends in .yaml"
            )
        return cast(dict[str, Any], self._checkpoint.yaml)

    def _read_yaml(self, companion: FileSpec) -> dict[str, Any]:
        from ultralytics.utils import YAML

        read_checked(self._where, companion)
        return cast(dict[str, Any], YAML.load(companion.file))

    def _read_checkpoint(self) -> nn.Module | None:
        weights = self.spec.weights
        assert weights is not None, "callers look"
        return read_checkpoint(f"{self._where}: weights {weights.file}", weights, self.spec.trusted)

    def _check_input(self, stride: int) -> None:
        resize = self.spec.preprocess.resize
        if not isinstance(resize, Letterbox | Stretch):
            return
        sides = [*resize.size_hw]
        if isinstance(resize, Letterbox) and resize.pad_multiple is not None:
            sides.append(resize.pad_multiple)
        if any(side % stride for side in sides):
            raise ConfigError(
                f"{self._where}: the network takes sides that are multiples of {stride}, but preprocess.resize has "
                f"size_hw {list(resize.size_hw)}" + (f" and pad_multiple {sides[2]}" if len(sides) > 2 else "")
            )


class UltralyticsDetector(UltralyticsBackend):
    """YOLO v3u to 26 and RT-DETR; models with ``-seg`` give each object a mask.

    Boxes are suppressed as Ultralytics' ``predict`` does. What is read end to end (RT-DETR; YOLOv10 and YOLO26 on
    request) lists at most 300 objects, and ``iou_threshold`` means nothing to it.
    """

    task: ClassVar[Task] = Task.DETECT
    heads = _yolo_architecture.DETECTORS

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Objects; what `YoloNetwork` returned says by its length how it is read."""
        check_finite(*outputs)
        dense, masked = len(outputs) in (2, 4), len(outputs) > 2
        found: list[Prediction] = []
        for index, (meta, chosen) in enumerate(zip(metas, params, strict=True)):
            planes = [output[index].float() for output in outputs]
            rows, kept = _yolo.suppress(planes[0], planes[1], chosen) if dense else _yolo.listed(planes[0], chosen)
            masks = None
            if masked:
                masks = _yolo.masks_in_input(planes[-1], planes[-2][kept], rows[:, :4], meta.input_hw)
            found.append(_yolo.detections(rows, meta, self.spec.classes, masks))
        return found


class UltralyticsClassifier(UltralyticsBackend):
    """Models with ``-cls``, whose head returns probabilities."""

    task: ClassVar[Task] = Task.CLASSIFY
    heads = _yolo_architecture.CLASSIFIERS

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The likeliest classes."""
        check_finite(*outputs)
        return list(scores_to_classifications(outputs[0].float(), params, self.spec.classes))


def read_checkpoint(where: str, weights: WeightsSpec, trusted: bool) -> nn.Module | None:
    """The module in a checkpoint of Ultralytics, whose pickle is loaded only if it is known or trusted.

    Args:
        where: begins the messages.
        weights: the file and what is known of it.
        trusted: whether the user trusts it.

    Returns:
        The module, or ``None`` when the file is a plain state dict.

    Raises:
        WeightsError: the file is missing, altered, damaged, no such checkpoint, or a pickle that is not trusted.
    """
    path = Path(weights.file)
    if path.suffix == ".safetensors":
        return None
    data = read_checked(where, weights, weights.source)
    if not _is_pickled_module(data):
        return None
    check_trusted(path, weights, trusted)
    return _unpickle(where, data)


def _is_pickled_module(data: bytes) -> bool:
    """Whether a torch file holds more than tensors. Nothing in it is run to find out."""
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # What is neither of torch's two formats is no weight file at all: `load_weights` says so.
        return zipfile.is_zipfile(io.BytesIO(data)) or data.startswith(b"\x80")
    except (RuntimeError, EOFError, ValueError):
        return False  # damaged: likewise
    return False


def _unpickle(where: str, data: bytes) -> nn.Module:
    """The module in an Ultralytics checkpoint. Runs whatever the file says: `check_trusted` comes first."""
    tasks = _library()
    # Names that older versions pickled their classes under.
    moved = {"ultralytics.yolo.utils": "ultralytics.utils", "ultralytics.yolo.v8": "ultralytics.models.yolo"}
    renamed = {
        "ultralytics.nn.modules.block.Silence": "torch.nn.Identity",
        "ultralytics.nn.tasks.YOLOv10DetectionModel": "ultralytics.nn.tasks.DetectionModel",
        "ultralytics.utils.loss.v10DetectLoss": "ultralytics.utils.loss.E2EDetectLoss",
        "pathlib.WindowsPath": "pathlib.PosixPath",
    }
    try:
        with tasks.temporary_modules(modules=moved, attributes=renamed):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:
        raise WeightsError(f"{where}: cannot be loaded ({type(error).__name__}: {error})") from error
    module = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    if not isinstance(module, nn.Module) or not isinstance(getattr(module, "yaml", None), dict):
        raise WeightsError(f"{where}: is no checkpoint of Ultralytics, which holds a module under 'ema' or 'model'")
    return module


@functools.cache
def _library() -> Any:
    """``ultralytics.nn.tasks``, imported with its analytics, downloads and installations switched off.

    Raises:
        ConfigError: it cannot be imported.
    """
    logger.warning(
        "the package ultralytics is in use: it and the weights made with it are AGPL-3.0, unless you hold another "
        "licence from Ultralytics; see docs/ultralytics.md"
    )
    with unchanged_process(keep="YOLO_"):
        os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
        if "YOLO_CONFIG_DIR" not in os.environ:
            # It writes a settings file on import; the user's own folder is no place for that.
            folder = tempfile.mkdtemp(prefix="vision-service-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ["YOLO_CONFIG_DIR"] = folder
        try:
            from ultralytics.nn import tasks
        except ImportError as error:
            raise ConfigError(
                f"the package ultralytics cannot be imported: {error}. Install it whole: "
                "pip install 'vision-service[yolo]'"
            ) from error
    return tasks
