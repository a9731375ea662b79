"""Backends ``onnx_classifier``, ``onnx_detector``, ``onnx_segmenter``, ``onnx_translator``: a user's own ONNX file.

They need the extra ``onnx``. ``weights.file`` is the graph, the spec says how images are prepared and what the outputs
mean. Options that all four have:

    layout      of the input: ``nchw`` or ``nhwc`` (empty: by where its three channels are)
    outputs     names of the outputs to read, in order (empty: all, in the graph's order)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from vision_service.backends._classification import scores_to_classifications
from vision_service.backends._detection import dense_to_detections
from vision_service.backends._onnx_heads import (
    BOX_FORMATS,
    HEADS,
    activate,
    channels_first,
    check_probabilities,
    to_xyxy,
)
from vision_service.backends._onnx_session import OnnxNetwork, OnnxSession
from vision_service.backends._options import read_options
from vision_service.backends._outputs import check_finite
from vision_service.backends._segmentation import foreground_id, logits_to_maps
from vision_service.backends._translation import planes_to_images
from vision_service.backends.base import Backend
from vision_service.config import Limit, ModelSpec, Native, ShortestSideCrop
from vision_service.errors import ConfigError, InferenceFailed, choices
from vision_service.imaging.preprocess import class_map_to_original
from vision_service.types import VOID, ImageMeta, Params, Prediction, SegmentationMap, Task
from vision_service.weights.check import read_checked

_TINY = 1e-6


class OnnxBackend(Backend):
    """What the four have in common: from the file to a network.

    Attributes:
        options: what a spec may choose, with the defaults; the common ones come on top.
    """

    options: ClassVar[dict[str, Any]] = {}
    own_runtime: ClassVar[str] = "onnxruntime"

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._options = read_options(spec, {"layout": "", "outputs": []} | self.options)
        if spec.weights is None:
            raise ConfigError(
                f"model {spec.name!r}: weights.file is missing: backend {spec.backend!r} is the graph in it"
            )

    def build_network(self) -> nn.Module:
        """The graph in ONNX Runtime, with its parameters.

        Raises:
            ConfigError: the graph's inputs or outputs do not fit the spec.
            WeightsError: the file is missing, altered, or no graph.
        """
        weights = self.spec.weights
        if weights is None:
            raise ConfigError(f"model {self.spec.name!r}: weights.file is missing")
        where = f"model {self.spec.name!r}: {weights.file}"
        data = read_checked(where, weights, weights.source)
        chosen = {"layout": self._options["layout"], "outputs": self._options["outputs"]}
        session = OnnxSession(data, where, ranks=self._ranks(), **chosen)
        self._check_size(where, session.size_hw)
        return OnnxNetwork(session)

    def load_weights(self, network: nn.Module) -> None:
        """Nothing: the parameters came with the graph."""

    def _ranks(self) -> tuple[int, ...]:
        """How many axes each output has; empty: not checked."""
        return ()

    def _check_size(self, where: str, graph_hw: tuple[int | None, int | None]) -> None:
        resize = self.spec.preprocess.resize
        if isinstance(resize, Native | Limit):
            spec_hw: tuple[int | None, int | None] = (None, None)
        else:
            spec_hw = resize.crop_hw if isinstance(resize, ShortestSideCrop) else resize.size_hw
        for wanted, got in zip(graph_hw, spec_hw, strict=True):
            if wanted is not None and wanted != got:
                raise ConfigError(
                    f"{where}: the graph takes inputs of {list(graph_hw)} (height, width), but preprocess.resize is "
                    f"{resize.mode}{'' if got is None else f' to {list(spec_hw)}'}"
                )

    def _choose(self, option: str, allowed: Sequence[str]) -> str:
        value: str = self._options[option]
        if value not in allowed:
            raise ConfigError(f"model {self.spec.name!r}: option {option!r} is {value!r}; {choices(value, allowed)}")
        return value


class OnnxClassifier(OnnxBackend):
    """Output: ``[N, C]``, or of as many values.

    Options: ``activation``, how the output becomes probabilities: ``softmax``, ``sigmoid``, or ``none`` when it is
    them already.
    """

    task: ClassVar[Task] = Task.CLASSIFY
    options: ClassVar[dict[str, Any]] = {"activation": "softmax"}

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._activation = self._choose("activation", ("softmax", "sigmoid", "none"))

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The likeliest classes."""
        scores = outputs[0].float().flatten(1)
        if scores.shape[1] != len(self.spec.classes):
            raise InferenceFailed(f"the graph returned {scores.shape[1]} values for {len(self.spec.classes)} classes")
        check_finite(scores)
        probabilities = activate(scores, self._activation)
        return list(scores_to_classifications(probabilities, params, self.spec.classes))


class OnnxDetector(OnnxBackend):
    """Boxes, decoded as the head says.

    Options:
        head: ``boxes_scores`` (``[N, A, 4]`` and ``[N, A, C]``), ``yolov5`` (``[N, A, 5 + C]``), ``yolov8``
            (``[N, 4 + C, A]``), ``nms`` (suppressed by the graph: ``[N, K, 4]``, scores ``[N, K]``, class ids
            ``[N, K]``) or ``nms_rows`` (the same as ``[N, K, 6]``: box, score, class id).
        box_format: ``xyxy``, ``yxyx``, ``xywh`` or ``cxcywh``; empty: as the head usually has it.
        box_scale: ``pixels`` of the input, or ``unit``: 0..1 over its sides.
        activation: of the scores: ``none`` when they are probabilities, or ``sigmoid``.
    """

    task: ClassVar[Task] = Task.DETECT
    options: ClassVar[dict[str, Any]] = {"head": "", "box_format": "", "box_scale": "pixels", "activation": "none"}

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._head = self._choose("head", tuple(HEADS))
        self._box_format = self._choose("box_format", ("", *BOX_FORMATS)) or HEADS[self._head][2]
        self._unit = self._choose("box_scale", ("pixels", "unit")) == "unit"
        self._activation = self._choose("activation", ("none", "sigmoid"))
        if self._activation != "none" and self._head not in ("boxes_scores", "yolov8"):
            raise ConfigError(
                f"model {spec.name!r}: option 'activation' is for heads 'boxes_scores' and 'yolov8'; the scores of "
                f"{self._head!r} are probabilities"
            )

    def _ranks(self) -> tuple[int, ...]:
        return HEADS[self._head][1]

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Detections; suppression is class by class, unless the graph has done it."""
        decode = HEADS[self._head][0]
        check_finite(*outputs)
        boxes, scores = decode(tuple(output.float() for output in outputs), len(self.spec.classes))
        suppressed = self._head.startswith("nms")
        if not suppressed:
            scores = activate(scores, self._activation)
        boxes = to_xyxy(boxes, self._box_format)
        if self._unit:
            height, width = metas[0].input_hw
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        if suppressed:
            params = [replace(chosen, iou_threshold=1.0) for chosen in params]  # no box overlaps another by more
        return list(dense_to_detections(boxes, scores, metas, params, self.spec.classes))


class OnnxSegmenter(OnnxBackend):
    """A value a pixel and class, of the input's size or smaller, channels first or last.

    Options:
        output: ``logits``, ``probabilities``, or ``class_ids`` (``[N, h, w]`` or with an axis of 1; they have no
            scores, so a score threshold has no effect). One channel is a binary network.
    """

    task: ClassVar[Task] = Task.SEGMENT
    options: ClassVar[dict[str, Any]] = {"output": "logits"}

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._output = self._choose("output", ("logits", "probabilities", "class_ids"))

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Class maps of the originals' sizes."""
        values = outputs[0].float()
        check_finite(values)
        if self._output == "class_ids":
            return self._class_maps(values, metas, params)
        values = channels_first(values, (1, len(self.spec.classes)))
        if values.shape[1] == 1:
            self._check_binary()
        if self._output == "probabilities":
            check_probabilities(values)
            values = values.clamp(_TINY, 1 - _TINY)
            values = values.logit() if values.shape[1] == 1 else values.log()
        if tuple(values.shape[2:]) != metas[0].input_hw:
            values = functional.interpolate(values, size=metas[0].input_hw, mode="bilinear")
        return list(logits_to_maps(values, metas, params, self.spec))

    def _check_binary(self) -> None:
        try:
            foreground_id(len(self.spec.classes), self.spec.background_id)
        except ValueError as error:
            raise InferenceFailed(str(error)) from None

    def _class_maps(self, values: Tensor, metas: Sequence[ImageMeta], params: Sequence[Params]) -> list[Prediction]:
        planes = values if values.ndim == 4 else values[:, None]
        planes = channels_first(planes, (1,))
        if bool(((planes < 0) | (planes >= len(self.spec.classes))).any()):
            raise InferenceFailed(
                f"the graph returned class ids from {planes.min():g} to {planes.max():g} for "
                f"{len(self.spec.classes)} classes: check option 'output'"
            )
        planes = functional.interpolate(planes, size=metas[0].input_hw, mode="nearest")
        nothing = VOID if self.spec.background_id is None else self.spec.background_id
        maps: list[Prediction] = []
        for plane, meta, chosen in zip(planes[:, 0].byte().cpu().numpy(), metas, params, strict=True):
            class_map = class_map_to_original(plane, meta, unseen=nothing)
            if chosen.class_ids is not None:
                class_map[~np.isin(class_map, list(chosen.class_ids))] = nothing
            maps.append(SegmentationMap(class_map, self.spec.classes, self.spec.background_id))
        return maps


class OnnxTranslator(OnnxBackend):
    """An image ``[N, 3, h', w']`` or ``[N, h', w', 3]`` RGB; the answer has the original's size times its enlargement.

    Options: ``output_range``, which values are black and white (``[0.0, 1.0]``).
    """

    task: ClassVar[Task] = Task.TRANSLATE
    options: ClassVar[dict[str, Any]] = {"output_range": [0.0, 1.0]}

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        try:
            self._black, self._white = (float(value) for value in self._options["output_range"])
        except (TypeError, ValueError):
            self._black = self._white = 0.0
        if self._black == self._white:
            raise ConfigError(
                f"model {spec.name!r}: option 'output_range' must be two numbers that differ, black and white, got "
                f"{self._options['output_range']!r}"
            )

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Images. No parameter applies."""
        check_finite(outputs[0])
        images = channels_first(outputs[0].float(), (3,))
        return list(planes_to_images((images - self._black) * (255.0 / (self._white - self._black)), metas))
