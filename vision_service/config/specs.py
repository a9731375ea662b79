"""What a model is, as data: its backend, weights, preprocessing, batching and default parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vision_service.types import VOID, Params, Task

Positive = Annotated[int, Field(ge=1)]
SizeHW = tuple[Positive, Positive]
Byte = Annotated[int, Field(ge=0, le=255)]
RGB = tuple[Byte, Byte, Byte]
Triple = tuple[float, float, float]
RuntimeName = Literal["auto", "torch", "torch_compile", "torch_cuda_graphs", "openvino", "onnxruntime", "tensorrt"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Spec(BaseModel):
    """Base of all specs: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShortestSideCrop(Spec):
    """Resize the shortest side to a length, keeping the aspect ratio, then cut out the centre."""

    mode: Literal["shortest_side_crop"] = "shortest_side_crop"
    shortest_side: Positive
    crop_hw: SizeHW


class Letterbox(Spec):
    """Resize to fit inside a size, keeping the aspect ratio, and fill the rest with a colour.

    With ``pad_multiple`` each side is padded by no more than the remainder: the smallest rectangle that a network of
    that stride takes, if the size is a multiple of it (Ultralytics' ``auto``). Images of unequal shape then make inputs
    of unequal size, which do not share a batch.
    """

    mode: Literal["letterbox"] = "letterbox"
    size_hw: SizeHW
    align: Literal["center", "top_left"] = "center"
    fill: RGB = (114, 114, 114)
    upscale: bool = True
    pad_multiple: Positive | None = None


class Stretch(Spec):
    """Resize to a size, whatever that does to the aspect ratio."""

    mode: Literal["stretch"] = "stretch"
    size_hw: SizeHW


class Limit(Spec):
    """Bring the shortest side to a length unless the longest would pass its own limit; keep the aspect ratio.

    Then pad right and bottom to a multiple. What is padded is zero after normalisation (torchvision's detectors,
    Detectron).
    """

    mode: Literal["limit"] = "limit"
    shortest_side: Positive
    longest_side: Positive
    pad_multiple: Positive = 1


class Native(Spec):
    """Keep the image's own size; pad right and bottom to a multiple by repeating the edge."""

    mode: Literal["native"] = "native"
    pad_multiple: Positive = 1


Resize = Annotated[ShortestSideCrop | Letterbox | Stretch | Limit | Native, Field(discriminator="mode")]


class PreprocessSpec(Spec):
    """From a uint8 RGB image to the network's input.

    Attributes:
        resize: which geometry.
        interpolation: ``antialias`` is a triangle filter widened by the scale (what Pillow and torchvision's reference
            transforms do), ``bicubic_antialias`` the same with Keys' cubic (a = -0.5), ``bilinear`` samples four pixels
            (OpenCV's INTER_LINEAR), ``bilinear_float`` does so without rounding: four times the bytes, for
            networks that half a grey level changes; ``area`` averages.
        color_order: what the network was trained on.
        mean: subtracted per channel, in units of 0..255 and in the network's colour order.
        std: divides per channel, likewise.
        max_pixels: largest image, in pixels, that the model takes; ``None``: the server's limit alone.
        exact_decode: decode large JPEGs whole. Otherwise those at least six times as large as the network needs are
            decoded at a half, a quarter or an eighth, which takes about half the time.
    """

    resize: Resize
    interpolation: Literal["antialias", "bicubic_antialias", "bilinear", "bilinear_float", "area"] = "antialias"
    color_order: Literal["rgb", "bgr"] = "rgb"
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (255.0, 255.0, 255.0)
    max_pixels: Positive | None = None
    exact_decode: bool = False

    @property
    def any_input_size(self) -> bool:
        """Whether images of unequal shape make inputs of unequal size."""
        resize = self.resize
        return isinstance(resize, Limit | Native) or (isinstance(resize, Letterbox) and resize.pad_multiple is not None)

    @field_validator("std")
    @classmethod
    def _no_zero(cls, std: Triple) -> Triple:
        if min(std) <= 0:
            raise ValueError(f"every std must be above 0, got {std}")
        return std


class BatchingSpec(Spec):
    """How calls join into batches, and how many may wait.

    Attributes:
        max_batch_size: most images in one forward pass.
        max_delay_ms: how long the oldest waiting image may be held back to fill a batch while the device is idle;
            ``None``: not at all, or as the objective allows where there is one.
        max_queued_jobs: most images that wait, those being decoded included; one more gets RESOURCE_EXHAUSTED.
        max_queued_bytes: most bytes of preprocessed pixels that wait.
        max_wait_ms: how long a call that is let in may take, from its request to its answer, going by those before it;
            one more gets RESOURCE_EXHAUSTED. ``None``: 2000, but 32 calls are let in however long they take; with an
            objective, no bound.
        target_p99_ms: objective for the time from a call's decoded image to its answer. The largest batch, the delay
            and the queue that keep it are chosen from what batches take, within the other limits; see docs/serving.md.
    """

    max_batch_size: Positive = 8
    max_delay_ms: Annotated[float, Field(ge=0)] | None = None
    max_queued_jobs: Positive = 256
    max_queued_bytes: Positive = 512 * 1024 * 1024
    max_wait_ms: Annotated[float, Field(gt=0)] | None = None
    target_p99_ms: Annotated[float, Field(gt=0)] | None = None


class FileSpec(Spec):
    """A file: where it lies, where it comes from and how to know it is the right one.

    Attributes:
        file: a path; in a manifest, relative to it; in a family of the zoo, the name of a file in the cache.
        url: where to fetch it from; empty when it ships or is the user's own.
        sha256: of its content, lower-case hex, or the first 8 or more digits where its publisher names no more;
            empty when the publisher names none.
        size_bytes: how long it is, where that is known.
        about_bytes: how long it is roughly, where its publisher names a rounded figure; for people, never compared.
    """

    file: str
    url: str = ""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{8,64})?$")] = ""
    size_bytes: Positive | None = None
    about_bytes: Positive | None = None


class WeightsSpec(FileSpec):
    """Where parameters lie, and the terms they come with.

    Attributes:
        licence: SPDX where there is one.
        source: where it came from, for people.
        companions: further files that the backend needs beside the first, such as a network's configuration.
    """

    licence: str
    source: str
    companions: tuple[FileSpec, ...] = ()


class ModelSpec(Spec):
    """A model that can be served: a task, a backend, weights and everything they need.

    Attributes:
        name: what requests say.
        version: several versions of a name may be served side by side.
        task: what it does.
        backend: name of the adapter, in the table or from an entry point.
        options: the backend's own settings; unknown ones are refused by the backend.
        classes: class names, the index is the id.
        background_id: for ``segment``: the class that means "nothing".
        preprocess: how images are prepared; belongs to the weights.
        params: defaults for what a call may choose.
        batching: how calls join into batches.
        weights: parameters; ``None`` leaves the network as it was initialised (tests).
        trusted: whether the weight file may run code while it is loaded, which only some formats need (pickles that
            are more than tensors); set by ``serve --trust NAME`` and the setting ``trusted_models``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        runtime: how it is executed; ``auto`` picks by device and by what is installed. See docs/runtimes.md.
        precision: of the arithmetic; ``auto`` is fp32 on a CPU and fp16 on a GPU.
        calibration_folder: images like those that will come, which precision ``int8`` measures its scales on.
    """

    name: str
    version: str = "1"
    task: Task
    backend: str
    options: dict[str, Any] = {}
    classes: tuple[str, ...] = ()
    background_id: int | None = None
    preprocess: PreprocessSpec
    params: Params = Params()
    batching: BatchingSpec = BatchingSpec()
    weights: WeightsSpec | None = None
    trusted: bool = False
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    runtime: RuntimeName = "auto"
    precision: PrecisionName = "auto"
    calibration_folder: Path | None = None

    @field_validator("name", "version")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        # Names become parts of paths and of metric labels.
        if not NAME.fullmatch(value):
            raise ValueError(f"need a letter or digit, then up to 99 letters, digits, '.', '_' or '-', got {value!r}")
        return value

    @model_validator(mode="after")
    def _classes_fit_task(self) -> ModelSpec:
        if self.task is not Task.TRANSLATE and not self.classes:
            raise ValueError(f"a {self.task} model needs its class names")
        if self.task is Task.SEGMENT and len(self.classes) > VOID:
            raise ValueError(f"a segment model has at most {VOID} classes, got {len(self.classes)}")
        if self.background_id is not None and not 0 <= self.background_id < len(self.classes):
            raise ValueError(f"background_id {self.background_id} is not among the {len(self.classes)} classes")
        return self
