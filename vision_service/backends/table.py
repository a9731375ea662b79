"""Which backends there are, and how to make one for a spec.

The built-in ones stand in `BACKENDS`. Other packages add theirs by an entry point in the group
``vision_service.backends``, whose value is ``module:Class``. A module is imported when a model asks for it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, choices

GROUP = "vision_service.backends"

BACKENDS: dict[str, str] = {
    "torchvision_classifier": "vision_service.backends.torchvision_classify:TorchvisionClassifier",
    "torchvision_detector": "vision_service.backends.torchvision_detect:TorchvisionDetector",
    "torchvision_segmenter": "vision_service.backends.torchvision_segment:TorchvisionSegmenter",
    "timm_classifier": "vision_service.backends.timm_classify:TimmClassifier",
    "lenet5": "vision_service.backends.lenet:LeNet5Backend",
    "darknet": "vision_service.backends.darknet:DarknetBackend",
    "ultralytics_detector": "vision_service.backends.ultralytics:UltralyticsDetector",
    "ultralytics_classifier": "vision_service.backends.ultralytics:UltralyticsClassifier",
    "smp": "vision_service.backends.smp:SmpBackend",
    "segnet": "vision_service.backends.segnet:SegNetBackend",
    "pix2pix": "vision_service.backends.pix2pix:Pix2PixBackend",
    "onnx_classifier": "vision_service.backends.onnx:OnnxClassifier",
    "onnx_detector": "vision_service.backends.onnx:OnnxDetector",
    "onnx_segmenter": "vision_service.backends.onnx:OnnxSegmenter",
    "onnx_translator": "vision_service.backends.onnx:OnnxTranslator",
    "nanodet": "vision_service.backends.nanodet:NanoDetBackend",
    "selfie_segmentation": "vision_service.backends.selfie_segmentation:SelfieSegmentationBackend",
    "esrgan_slim": "vision_service.backends.esrgan:EsrganSlimBackend",
}


def backend_names() -> list[str]:
    """Names of all backends, built in and from entry points, sorted."""
    return sorted({*BACKENDS, *(point.name for point in entry_points(group=GROUP))})


def create_backend(spec: ModelSpec) -> Backend:
    """The backend of a model. Cheap: networks are built and weights are read later.

    Args:
        spec: names the backend and carries its options.

    Raises:
        ConfigError: there is no such backend, it cannot be imported, it does another task than the spec says, or it
            refuses an option.
    """
    cls = _backend_class(spec)
    if cls.task is not spec.task:
        raise ConfigError(
            f"model {spec.name!r}: backend {spec.backend!r} is for {cls.task}, but the model's task is {spec.task}"
        )
    return cls(spec)


def _backend_class(spec: ModelSpec) -> type[Backend]:
    where = f"model {spec.name!r}: backend {spec.backend!r}"
    found = BACKENDS.get(spec.backend) or next(
        (point.value for point in entry_points(group=GROUP, name=spec.backend)), None
    )
    if found is None:
        raise ConfigError(f"{where} does not exist; {choices(spec.backend, backend_names())}")
    module_name, _, class_name = found.partition(":")
    try:
        cls: Any = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where} ({found}) cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise ConfigError(f"{where}: {found} is not a subclass of vision_service.backends.base.Backend")
    return cls
