"""Darknet's ``[yolo]`` layer: boxes and scores from a grid of predictions.

Sources: Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, section 2.1; ``scale_x_y`` from Bochkovskiy et
al., "YOLOv4", 2020, section 3.3 (grid sensitivity); ``new_coords`` from Wang et al., "Scaled-YOLOv4", CVPR 2021, as in
AlexeyAB/darknet ``src/yolo_layer.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Yolo(nn.Module):
    """Decodes a grid; has no parameters.

    Args:
        anchors_wh: of this layer only, in pixels of the network's input.
        classes: how many.
        scale_xy: by how much centres may leave their cell: ``scale_x_y``.
        new_coords: the convolution before it has squashed everything already, and sides are ``(2 p)^2`` anchors
            instead of ``exp(p)``.
    """

    anchors: Tensor

    def __init__(
        self, anchors_wh: tuple[tuple[float, float], ...], classes: int, scale_xy: float, new_coords: bool
    ) -> None:
        super().__init__()
        self.anchors_wh = anchors_wh
        self.classes = classes
        self.scale_xy = scale_xy
        self.new_coords = new_coords
        self._set_anchors(torch.device("cpu"))

    def _set_anchors(self, device: torch.device) -> None:
        anchors = torch.tensor(self.anchors_wh, dtype=torch.float32, device=device)  # [anchors, 2]
        self.register_buffer("anchors", anchors, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.half()` casts every buffer, but anchors such as 373.25 lose bits in half: these stay float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_anchors(self.anchors.device)
        return self

    def forward(self, x: Tensor, input_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode, in float32 whatever comes in.

        Args:
            x: ``[N, anchors * (5 + classes), h, w]``: x, y, width, height, objectness, classes; anchor by anchor.
            input_hw: of the network's input, pixels.

        Returns:
            Boxes float32 ``[N, A, 4]`` as x1, y1, x2, y2 in pixels of the network's input, not clipped, and scores
            float32 ``[N, A, classes]``: objectness times class probability. ``A = h * w * anchors``, rows first, the
            anchors of a cell next to each other.
        """
        n, _, h, w = x.shape
        grid = x.float().reshape(n, len(self.anchors_wh), 5 + self.classes, h, w).permute(0, 3, 4, 1, 2)
        xy, wh, certainty = grid[..., :2], grid[..., 2:4], grid[..., 4:]  # [N, h, w, anchors, ...]
        if self.new_coords:
            sides = (2.0 * wh) ** 2 * self.anchors
        else:
            xy, certainty = xy.sigmoid(), certainty.sigmoid()
            sides = wh.exp() * self.anchors
        cells = _cells(h, w, x.device)  # [h, w, 1, 2]
        stride_xy = torch.stack((_full(input_hw[1] / w, x.device), _full(input_hw[0] / h, x.device)))
        centres = (xy * self.scale_xy - 0.5 * (self.scale_xy - 1.0) + cells) * stride_xy
        boxes = torch.cat((centres - sides / 2, centres + sides / 2), dim=-1)
        scores = certainty[..., :1] * certainty[..., 1:]
        return boxes.flatten(1, 3), scores.flatten(1, 3)


def _cells(h: int, w: int, device: torch.device) -> Tensor:
    """Column and row of each cell: float32 ``[h, w, 1, 2]``."""
    rows = torch.arange(h, dtype=torch.float32, device=device)
    columns = torch.arange(w, dtype=torch.float32, device=device)
    grid_y, grid_x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1)[:, :, None]


def _full(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)
