"""From a section of a ``.cfg`` to a layer and the shape that leaves it. Keys and defaults as in Darknet's parser.c."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from vision_service.networks.darknet_cfg import Section
from vision_service.networks.darknet_layers import (
    ACTIVATIONS,
    AveragePool,
    Convolution,
    MaxPool,
    Route,
    Scale,
    Shortcut,
    Upsample,
)
from vision_service.networks.darknet_yolo import Yolo

Shape = tuple[int, int, int]
"""Channels, height, width."""


@dataclass(frozen=True)
class Built:
    """A layer, where its inputs come from and what leaves it.

    Attributes:
        module: the layer.
        sources: numbers of the layers whose output it takes; -1 is the image.
        shape: of its output; ``None`` for ``[yolo]``, whose output is the network's.
        where: its place in the cfg.
    """

    module: nn.Module
    sources: tuple[int, ...]
    shape: Shape | None
    where: str


def build_layer(section: Section, before: Sequence[Built], image: Shape) -> Built:
    """The layer of a section.

    Args:
        section: not ``[net]``.
        before: the layers before it.
        image: channels, height and width of the network's input.

    Raises:
        DarknetCfgError: the kind or a key is not supported, or the numbers do not fit; names layer and line.
    """
    if section.kind not in _BUILDERS:
        raise section.error(f"this kind of layer is not supported; there are: {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[section.kind](section, _Inputs(section, before, image))


class _Inputs:
    """Shapes of the layers that a section can take."""

    def __init__(self, section: Section, before: Sequence[Built], image: Shape) -> None:
        self.section, self.before, self.image = section, before, image

    def shape(self, index: int, key: str = "") -> Shape:
        shape = self.before[index].shape if index >= 0 else self.image
        if shape is None:
            raise self.section.error(f"takes the output of {self.before[index].where}, which ends a branch", key)
        return shape

    @property
    def last(self) -> tuple[int, Shape]:
        """The layer just before, and its shape."""
        index = len(self.before) - 1
        return index, self.shape(index)

    def named(self, key: str) -> tuple[int, ...]:
        """The layers that a key names, negative numbers counted back from this one."""
        section = self.section
        if not (given := section.integers(key, ())):
            raise section.error(f"needs {key}= with the layers whose output it takes")
        for number in given:
            if not -section.index <= number < section.index:
                raise section.error(
                    f"there is no layer {number} before it; from -{section.index} to {section.index - 1} there are", key
                )
        return tuple(number if number >= 0 else section.index + number for number in given)


def _strides(section: Section) -> tuple[int, int]:
    stride = section.integer("stride", 1, minimum=1)
    return section.integer("stride_y", stride, minimum=1), section.integer("stride_x", stride, minimum=1)


def _sized(section: Section, channels: int, height: int, width: int) -> Shape:
    if height < 1 or width < 1:
        raise section.error(f"its output would be {width} x {height} pixels: the network's input is too small for it")
    return channels, height, width


_UNSUPPORTED_IN_CONVOLUTION = {
    **{"antialiasing": 0, "binary": 0, "bin_output": 0, "coordconv": 0, "dot": 0, "flipped": 0, "reverse": 0},
    **{"rotate": 0, "stretch": 0, "stretch_sway": 0, "sway": 0, "xnor": 0},
}


def _convolutional(section: Section, inputs: _Inputs) -> Built:
    section.check_keys(
        "filters size stride stride_x stride_y pad padding groups dilation batch_normalize cbn activation",
        "angle assisted_excitation grad_centr",
        _UNSUPPORTED_IN_CONVOLUTION,
    )
    index, (channels, height, width) = inputs.last
    filters, size = section.integer("filters", 1, minimum=1), section.integer("size", 1, minimum=1)
    stride, groups = _strides(section), section.integer("groups", 1, minimum=1)
    for what, count in (("channels that come in", channels), ("filters", filters)):
        if count % groups:
            raise section.error(f"{count} {what} do not make {groups} equal groups", "groups")
    padding = size // 2 if section.integer("pad", 0) else section.integer("padding", 0, minimum=0)
    dilation = section.integer("dilation", 1, minimum=1) if size > 1 else 1
    if dilation > 1 and 2 * padding != size - 1:
        raise section.error("dilation is supported with pad=1 and an odd size", "dilation")
    normalize = bool(section.integer("batch_normalize", 0) or section.integer("cbn", 0))
    activation = section.word("activation", "logistic", ACTIVATIONS)
    conv = nn.Conv2d(
        channels, filters, size, stride, padding * dilation, dilation=dilation, groups=groups, bias=not normalize
    )
    out = [(side + 2 * padding - size) // step + 1 for side, step in zip((height, width), stride, strict=True)]
    module = Convolution(conv, normalize, activation, section.where)
    return Built(module, (index,), _sized(section, filters, *out), section.where)


def _maxpool(section: Section, inputs: _Inputs) -> Built:
    section.check_keys(
        "size stride stride_x stride_y padding", neutral={"maxpool_depth": 0, "antialiasing": 0, "out_channels": 1}
    )
    index, (channels, height, width) = inputs.last
    stride = _strides(section)
    size = section.integer("size", section.integer("stride", 1), minimum=1)
    padding = section.integer("padding", size - 1, minimum=0)
    if padding > 2 * (size - 1):
        raise section.error(f"a window of {size} would lie in the padding alone", "padding")
    out = [(side + padding - size) // step + 1 for side, step in zip((height, width), stride, strict=True)]
    return Built(MaxPool(size, stride, padding), (index,), _sized(section, channels, *out), section.where)


def _avgpool(section: Section, inputs: _Inputs) -> Built:
    section.check_keys("")
    index, (channels, _, _) = inputs.last
    return Built(AveragePool(), (index,), (channels, 1, 1), section.where)


def _upsample(section: Section, inputs: _Inputs) -> Built:
    section.check_keys("stride scale")
    index, (channels, height, width) = inputs.last
    stride = section.integer("stride", 2, minimum=1)
    module = Upsample(stride, section.number("scale", 1.0))
    return Built(module, (index,), (channels, height * stride, width * stride), section.where)


def _route(section: Section, inputs: _Inputs) -> Built:
    section.check_keys("layers groups group_id")
    sources = inputs.named("layers")
    shapes = [inputs.shape(index, "layers") for index in sources]
    groups, group_id = section.integer("groups", 1, minimum=1), section.integer("group_id", 0, minimum=0)
    if group_id >= groups:
        raise section.error(f"of {groups} groups, numbered from 0, there is no {group_id}", "group_id")
    for index, shape in zip(sources, shapes, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise section.error(
                f"layer {index} is {shape[2]} x {shape[1]} and layer {sources[0]} is {shapes[0][2]} x {shapes[0][1]} "
                "pixels: they cannot stand side by side. Is the input's size a multiple of the network's stride?",
                "layers",
            )
        if shape[0] % groups:
            raise section.error(f"{shape[0]} channels of layer {index} do not make {groups} equal groups", "groups")
    channels = sum(shape[0] for shape in shapes) // groups
    return Built(Route(groups, group_id), sources, (channels, *shapes[0][1:]), section.where)


def _shortcut(section: Section, inputs: _Inputs) -> Built:
    section.check_keys("from activation", "weights_normalization", {"weights_type": "none"})
    index, shape = inputs.last
    others = inputs.named("from")
    for other in others:
        if inputs.shape(other, "from")[1:] != shape[1:]:
            _, height, width = inputs.shape(other, "from")
            raise section.error(
                f"layer {other} is {width} x {height} pixels, but {shape[2]} x {shape[1]} come in: cannot be added",
                "from",
            )
    activation = section.word("activation", "linear", ACTIVATIONS)
    return Built(Shortcut(activation), (index, *others), shape, section.where)


def _scaled(section: Section, inputs: _Inputs) -> Built:
    section.check_keys("from activation", neutral={"scale_wh": 0})
    index, factors = inputs.last
    (other, *more) = inputs.named("from")
    shape = inputs.shape(other, "from")
    wanted = (shape[0], 1, 1) if section.kind == "scale_channels" else shape
    if more or factors != wanted:
        raise section.error(f"multiplies {shape} (channels, height, width) by {wanted}, but {factors} come in", "from")
    activation = section.word("activation", "linear", ACTIVATIONS)
    return Built(Scale(activation), (index, other), shape, section.where)


def _identity(section: Section, inputs: _Inputs) -> Built:
    section.check_keys("", "probability dropblock dropblock_size_rel dropblock_size_abs")
    index, shape = inputs.last
    return Built(nn.Identity(), (index,), shape, section.where)


def _yolo(section: Section, inputs: _Inputs) -> Built:
    # How suppression is done (nms_kind, beta_nms) is the caller's choice here, so it is passed over like the losses.
    section.check_keys(
        "mask anchors classes num scale_x_y new_coords",
        "beta_nms cls_normalizer counters_per_class delta_normalizer dets_for_show dets_for_track embedding_layer "
        "focal_loss ignore_thresh iou_loss iou_normalizer iou_thresh iou_thresh_kind jitter label_smooth_eps max "
        "max_delta nms_kind obj_normalizer objectness_smooth random resize show_details sim_thresh track_ciou_norm "
        "track_history_size truth_thresh",
    )
    index, shape = inputs.last
    classes, num = section.integer("classes", 20, minimum=1), section.integer("num", 1, minimum=1)
    mask, flat = section.integers("mask", tuple(range(num))), section.numbers("anchors", ())
    if len(flat) != 2 * num:
        raise section.error(f"num={num} anchors need {2 * num} numbers, got {len(flat)}", "anchors")
    if not mask or not all(0 <= number < num for number in mask):
        raise section.error(f"must choose from the num={num} anchors, numbered from 0", "mask")
    if shape[0] != len(mask) * (5 + classes):
        raise section.error(
            f"{len(mask)} anchors in mask, each with 5 numbers and {classes} classes, need {len(mask) * (5 + classes)} "
            f"channels, but {shape[0]} come in: correct filters= of the layer before, classes= or mask="
        )
    anchors = tuple((flat[2 * number], flat[2 * number + 1]) for number in mask)
    module = Yolo(anchors, classes, section.number("scale_x_y", 1.0), bool(section.integer("new_coords", 0)))
    return Built(module, (index,), None, section.where)


_BUILDERS: dict[str, Callable[[Section, _Inputs], Built]] = {
    "convolutional": _convolutional,
    "conv": _convolutional,
    "maxpool": _maxpool,
    "max": _maxpool,
    "avgpool": _avgpool,
    "avg": _avgpool,
    "upsample": _upsample,
    "route": _route,
    "shortcut": _shortcut,
    "scale_channels": _scaled,
    "sam": _scaled,
    "dropout": _identity,
    "empty": _identity,
    "silence": _identity,
    "yolo": _yolo,
}
