"""Networks that a Darknet ``.cfg`` describes: YOLOv3, YOLOv4, their tiny variants and their relatives.

Darknet (pjreddie/darknet, continued as AlexeyAB/darknet) keeps a network as a list of layers in a text file and its
parameters as a row of floats in another; `darknet_cfg` reads the one, `darknet_weights` the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vision_service.networks.darknet_build import Built, Shape, build_layer
from vision_service.networks.darknet_cfg import DarknetCfgError, Section, parse_cfg
from vision_service.networks.darknet_layers import Convolution
from vision_service.networks.darknet_yolo import Yolo

__all__ = ["Darknet", "DarknetCfgError"]


class Darknet(nn.Module):
    """A detector from the text of its ``.cfg``, with random parameters.

    Args:
        cfg: the text.
        size_hw: height and width of the input, pixels; ``None``: the cfg's own. Other sizes work as far as the
            network's strides divide them.

    Attributes:
        channels: of the input; 3 is RGB.
        size_hw: of the input.
        class_counts: of each ``[yolo]`` layer.

    Raises:
        DarknetCfgError: the cfg is wrong or asks for what is not supported; names layer and line.
    """

    def __init__(self, cfg: str, size_hw: tuple[int, int] | None = None) -> None:
        super().__init__()
        net, *sections = parse_cfg(cfg)
        self.channels, *size = _input_shape(net, size_hw)
        self.size_hw = (size[0], size[1])
        built: list[Built] = []
        for section in sections:
            built.append(build_layer(section, built, (self.channels, *self.size_hw)))
        self.layers = nn.ModuleList(layer.module for layer in built)
        self._sources = [layer.sources for layer in built]
        self._last_use = {source: index for index, sources in enumerate(self._sources) for source in sources}
        self.class_counts = [layer.classes for layer in self.layers if isinstance(layer, Yolo)]
        if not self.class_counts:
            raise DarknetCfgError(f"there is no [yolo] layer among the {len(built)}: only detectors are supported")
        if len(set(self.class_counts)) > 1:
            raise DarknetCfgError(f"the [yolo] layers must agree on classes=, got {self.class_counts}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Detect, before any threshold or suppression.

        Args:
            x: ``[N, channels, h, w]``, values 0..1.

        Returns:
            Boxes float32 ``[N, A, 4]`` as x1, y1, x2, y2 in pixels of the input, not clipped, and scores float32
            ``[N, A, classes]``, objectness times class probability; the ``[yolo]`` layers in the cfg's order.
        """
        input_hw = (x.shape[2], x.shape[3])
        kept = {-1: x}
        boxes, scores = [], []
        for index, (layer, sources) in enumerate(zip(self.layers, self._sources, strict=True)):
            inputs = [kept[source] for source in sources]
            for source in sources:
                if self._last_use[source] == index:
                    kept.pop(source, None)  # frees its memory; a source may be named twice
            if isinstance(layer, Yolo):
                layer_boxes, layer_scores = layer(*inputs, input_hw)
                boxes.append(layer_boxes)
                scores.append(layer_scores)
            elif index in self._last_use:
                kept[index] = layer(*inputs)
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)

    def convolutions(self) -> Iterator[Convolution]:
        """The layers that have parameters, in the order of the weight file."""
        return (layer for layer in self.layers if isinstance(layer, Convolution))

    def fuse(self) -> None:
        """Put every batch norm into its convolution. Only for inference; writing weights is over then."""
        for layer in self.convolutions():
            layer.fuse()


def _input_shape(net: Section, size_hw: tuple[int, int] | None) -> Shape:
    channels = net.integer("channels", 3, minimum=1)
    if size_hw is None:
        for key in ("height", "width"):
            if key not in net.values:
                raise net.error(f"needs {key}=, the size of the input in pixels")
        size_hw = (net.integer("height", 0, minimum=1), net.integer("width", 0, minimum=1))
    return channels, *size_hw
