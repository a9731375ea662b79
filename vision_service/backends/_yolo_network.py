"""A YOLO of the package ultralytics as a pure module: one kind of output for every version of the head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_service.backends import _yolo


class _EveryShape:
    """Equals every shape."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class YoloNetwork(nn.Module):
    """Wraps a model of ``ultralytics.nn.tasks``, whose parameters keep their names below ``model``.

    The library's heads keep a grid from one call to the next, in the precision and of the size of the last input. Here
    they are lent one for each call, in float32: the module does not change itself, so it can be exported, and boxes of
    a half-precision network are not rounded to half pixels.

    Args:
        model: in eval mode.
        head: the name of its head's class.
        end_to_end: of two heads (YOLOv10, YOLO26), read the one whose boxes want no suppression.

    Raises:
        ValueError: the model has no such second head.
    """

    _LENT: ClassVar[tuple[str, ...]] = ("anchors", "strides", "shape", "shapes", "valid_mask")

    def __init__(self, model: nn.Module, head: str, *, end_to_end: bool = False) -> None:
        super().__init__()
        self.model = model
        self.kind = head
        layers: Any = model.model
        layers[-1].export = True  # tensors only
        if getattr(layers[-1], "one2one_cv2", None) is not None:
            layers[-1].end2end = end_to_end
        elif end_to_end:
            raise ValueError(f"the head {head} has no end-to-end half")
        self.end_to_end = end_to_end
        strides = [int(stride) for stride in getattr(model, "stride", torch.tensor([32.0]))]
        self.strides = strides
        self.stride = max(32, *strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run, and bring what comes out into one form.

        Args:
            images: float ``[N, 3, h, w]``, RGB, 0..1.

        Returns:
            For a classifier: probabilities ``[N, C]``. For a head whose boxes want suppression: boxes ``[N, A, 4]`` as
            x1, y1, x2, y2 in pixels of the input, and scores ``[N, A, C]``. For an end-to-end head: rows ``[N, K, 6]``,
            box, score and class id, highest score first. Heads with masks add coefficients, ``[N, A, M]`` or
            ``[N, K, M]``, and prototypes ``[N, M, h', w']``.
        """
        if self.kind == "Classify":
            probabilities: Tensor = self.model(images)
            return (probabilities,)
        output = self._run(images)
        output, *protos = output if isinstance(output, tuple) else (output,)
        height, width = images.shape[2:]
        if self.kind == "RTDETRDecoder":
            pixels = torch.tensor([width, height, width, height], device=output.device)
            return (torch.cat((_yolo.corners(output[..., :4]) * pixels, output[..., 4:]), dim=-1),)
        layers: Any = self.model.model
        if self.end_to_end:
            return (output[..., :6], *([output[..., 6:]] if protos else []), *protos)
        output = output.transpose(1, 2)  # [N, A, 4 + C + M]
        classes = layers[-1].nc
        boxes, scores, coefficients = output.split((4, classes, output.shape[2] - 4 - classes), dim=2)
        return (_yolo.corners(boxes), scores, *([coefficients] if protos else []), *protos)

    def _run(self, images: Tensor) -> Any:
        layers: Any = self.model.model
        own = vars(layers[-1])
        kept = {name: own[name] for name in self._LENT if name in own}
        if self.kind != "RTDETRDecoder":
            height, width = images.shape[2:]
            own["anchors"], own["strides"] = _yolo.grid(height, width, self.strides, images.device)
            own["shape"] = _EveryShape()
        try:
            return self.model(images)
        finally:
            for name in self._LENT:
                own.pop(name, None)
            own.update(kept)
