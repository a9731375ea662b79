"""From an image to a network's input, and back: boxes and planes return to the pixels of the original.

`geometry` says what goes where, this module moves the pixels. `ImageMeta` holds what the way back needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vision_service.config import PreprocessSpec
from vision_service.errors import InvalidImage
from vision_service.imaging import geometry
from vision_service.imaging.geometry import Plan, Size
from vision_service.types import Float32Array, ImageMeta, InputArray, UInt8Array

Interpolation = Literal["antialias", "bicubic_antialias", "bilinear", "bilinear_float", "area"]

_CHANNELS_AT_ONCE = 64
"""OpenCV has a limit of 128 or 512 channels, depending on its version."""


def preprocess(
    image: UInt8Array, spec: PreprocessSpec, original_hw: Size | None = None
) -> tuple[InputArray, ImageMeta]:
    """An image as the network's input.

    Args:
        image: uint8 ``[H, W, 3]`` RGB, as `decode_image` or `decode_for` returns it.
        spec: geometry and interpolation; mean, std and colour order are applied later, on the device.
        original_hw: what `decode_for` says of an image that it may have scaled; ``None``: it was not.

    Returns:
        The input, uint8 ``[h, w, 3]`` RGB, C-contiguous (it may share memory with ``image`` when nothing had to be
        done), and how to go back to the original; ``[h, w]`` is the meta's ``input_hw``. With ``bilinear_float`` it is
        float32, in the same 0..255.

    Raises:
        InvalidImage: the image has more pixels than the spec allows.
    """
    height, width = original_hw or image.shape[:2]
    if spec.max_pixels is not None and height * width > spec.max_pixels:
        raise InvalidImage(
            f"{width} x {height} is {height * width} pixels; this model takes at most {spec.max_pixels}: "
            "send a smaller image"
        )
    plan = geometry.plan(spec.resize, height, width)
    factor = height // image.shape[0]
    top, left = (start // factor for start in plan.window_yx)
    window_height, window_width = (side // factor for side in plan.window_hw)
    window = np.ascontiguousarray(image[top : top + window_height, left : left + window_width])
    resized = _resize(window, plan.resized_hw, spec.interpolation)
    return _place(resized, plan), plan.meta((height, width))


def stack(inputs: Sequence[InputArray], batch: InputArray | None = None) -> InputArray:
    """Inputs as one batch; smaller ones are padded right and bottom with black.

    Args:
        inputs: N of ``[h, w, 3]``, all uint8 or all float32.
        batch: where to put them, ``[N, H, W, 3]`` of the largest height and width, of their type; ``None``: into new
            memory.

    Returns:
        The batch.
    """
    if batch is None:
        height, width = (max(pixels.shape[axis] for pixels in inputs) for axis in (0, 1))
        batch = np.empty((len(inputs), height, width, 3), inputs[0].dtype)
    for row, pixels in zip(batch, inputs, strict=True):
        height, width = pixels.shape[:2]
        row[:height, :width] = pixels
        row[height:] = 0
        row[:height, width:] = 0
    return batch


def content_hw(meta: ImageMeta) -> tuple[int, int]:
    """How far the picture reaches in the network's input, from its top-left corner: the rest is padding.

    Args:
        meta: from `preprocess`.

    Returns:
        Height and width, pixels of the input.
    """
    return _content(meta, 0)[1], _content(meta, 1)[1]


def boxes_to_original(boxes_xyxy: Float32Array, meta: ImageMeta) -> Float32Array:
    """Boxes in pixels of the network's input as boxes in pixels of the original, clipped to it.

    Args:
        boxes_xyxy: float ``[N, 4]``, x1, y1, x2, y2.
        meta: from `preprocess`.

    Returns:
        float32 ``[N, 4]``, within ``0..W`` and ``0..H`` of the original.
    """
    scale, offset = _affine(meta)
    height, width = meta.original_hw
    boxes = (boxes_xyxy - offset) / scale
    return np.clip(boxes, 0.0, np.array([width, height, width, height])).astype(np.float32)


def boxes_to_input(boxes_xyxy: Float32Array, meta: ImageMeta) -> Float32Array:
    """Boxes in pixels of the original as boxes in pixels of the network's input, not clipped.

    Args:
        boxes_xyxy: float ``[N, 4]``, x1, y1, x2, y2.
        meta: from `preprocess`.

    Returns:
        float32 ``[N, 4]``; a part that was cropped away lies outside the input.
    """
    scale, offset = _affine(meta)
    return (boxes_xyxy * scale + offset).astype(np.float32)


def plane_to_original(plane: Float32Array, meta: ImageMeta) -> Float32Array:
    """Values per pixel of the network's input as values per pixel of the original, bilinear with half-pixel centres.

    Args:
        plane: float32 ``[h, w]`` or ``[h, w, C]``, of the meta's ``input_hw``.
        meta: from `preprocess`.

    Returns:
        float32 ``[H, W]`` or ``[H, W, C]``. 0 where the network never saw the original (outside a centre crop).

    Raises:
        ValueError: the plane is not of the input's size.
    """
    _check_plane(plane, meta)
    (top, bottom), (left, right) = (_content(meta, axis) for axis in (0, 1))
    if _is_whole(meta):
        return _resize_plane(plane[top:bottom, left:right], meta.original_hw)
    rows, columns = (_sample_points(meta, axis) for axis in (0, 1))
    sampled = _lerp(_lerp(plane, rows - 0.5, top, bottom, axis=0), columns - 0.5, left, right, axis=1)
    sampled[~_inside(rows, meta.input_hw[0])] = 0.0
    sampled[:, ~_inside(columns, meta.input_hw[1])] = 0.0
    return sampled


def class_map_to_original(class_map: UInt8Array, meta: ImageMeta, unseen: int) -> UInt8Array:
    """Class ids per pixel of the network's input as ids per pixel of the original, by the nearest pixel.

    Args:
        class_map: uint8 ``[h, w]``, of the meta's ``input_hw``.
        meta: from `preprocess`.
        unseen: id where the network never saw the original (outside a centre crop).

    Returns:
        uint8 ``[H, W]``.

    Raises:
        ValueError: the map is not of the input's size.
    """
    _check_plane(class_map, meta)
    rows, columns = (_sample_points(meta, axis) for axis in (0, 1))
    nearest = [
        np.clip(np.floor(points).astype(np.int64), start, stop - 1)
        for points, (start, stop) in ((rows, _content(meta, 0)), (columns, _content(meta, 1)))
    ]
    result = class_map.take(nearest[0], axis=0).take(nearest[1], axis=1)
    result[~_inside(rows, meta.input_hw[0])] = unseen
    result[:, ~_inside(columns, meta.input_hw[1])] = unseen
    return result


def _resize(image: UInt8Array, size_hw: Size, interpolation: Interpolation) -> InputArray:
    height, width = image.shape[:2]
    if interpolation == "bilinear_float":
        exact = image.astype(np.float32)
        if (height, width) == size_hw:
            return exact
        return cast(Float32Array, cv2.resize(exact, size_hw[::-1], interpolation=cv2.INTER_LINEAR))
    if (height, width) == size_hw:
        return image
    if interpolation == "antialias":
        return _resize_antialias(image, size_hw, "bilinear")
    if interpolation == "bicubic_antialias":
        return _resize_antialias(image, size_hw, "bicubic")
    if interpolation == "bilinear":
        return _cv2_resize(image, size_hw, cv2.INTER_LINEAR)
    if (size_hw[0] < height) != (size_hw[1] < width):
        # OpenCV averages only if neither axis grows, and would alias on the one that shrinks.
        image = _cv2_resize(image, (min(height, size_hw[0]), min(width, size_hw[1])), cv2.INTER_AREA)
    return _cv2_resize(image, size_hw, cv2.INTER_AREA)


def _cv2_resize(image: UInt8Array, size_hw: Size, interpolation: int) -> UInt8Array:
    return cast(UInt8Array, cv2.resize(image, size_hw[::-1], interpolation=interpolation))


def _resize_antialias(image: UInt8Array, size_hw: Size, mode: Literal["bilinear", "bicubic"]) -> UInt8Array:
    # The batch axis is added before the permutation: its stride is how torch knows the memory to be channels-last,
    # for which it has a kernel that is several times faster.
    images = _as_tensor(image)[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    resized = torch.nn.functional.interpolate(images, size=size_hw, mode=mode, antialias=True)
    return cast(UInt8Array, resized.permute(0, 2, 3, 1)[0].numpy())


def _as_tensor(image: UInt8Array) -> Tensor:
    """The same memory as a tensor. It is only read, so torch's warning about read-only arrays is of no use."""
    if not image.flags.writeable:
        interface = {**image.__array_interface__, "data": (image.ctypes.data, False)}
        image = np.asarray(SimpleNamespace(__array_interface__=interface, keeps_alive=image))
    return torch.from_numpy(image)


def _place(resized: InputArray, plan: Plan) -> InputArray:
    (top, left), (height, width) = plan.offset_yx, plan.input_hw
    inner = resized[max(0, -top) : height - top, max(0, -left) : width - left]
    top, left = max(0, top), max(0, left)
    bottom, right = height - top - inner.shape[0], width - left - inner.shape[1]
    if not (top or left or bottom or right):
        return cast(InputArray, np.ascontiguousarray(inner))
    border = cv2.BORDER_REPLICATE if plan.fill is None else cv2.BORDER_CONSTANT
    return cast(InputArray, cv2.copyMakeBorder(inner, top, bottom, left, right, border, value=plan.fill or (0, 0, 0)))


def _affine(meta: ImageMeta) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array(meta.scale_xy * 2), np.array(meta.offset_xy * 2)  # [4], [4] as x, y, x, y


def _check_plane(plane: NDArray[np.generic], meta: ImageMeta) -> None:
    if plane.shape[:2] != meta.input_hw or plane.ndim > 3:
        raise ValueError(f"need a plane of the network's input, {meta.input_hw} (and channels), got {plane.shape}")


def _extent(meta: ImageMeta, axis: int) -> tuple[float, float]:
    """From where to where the original would reach in the input along an axis (0 is y), cropping ignored."""
    scale, offset = meta.scale_xy[1 - axis], meta.offset_xy[1 - axis]
    return offset, offset + meta.original_hw[axis] * scale


def _content(meta: ImageMeta, axis: int) -> Size:
    """Which whole pixels of the input show the original along an axis."""
    start, stop = _extent(meta, axis)
    return max(0, round(start)), min(meta.input_hw[axis], round(stop))


def _is_whole(meta: ImageMeta) -> bool:
    """Whether the network saw all of the original."""
    extents = [(*_extent(meta, axis), meta.input_hw[axis]) for axis in (0, 1)]
    return all(start > -0.01 and stop < size + 0.01 for start, stop, size in extents)


def _sample_points(meta: ImageMeta, axis: int) -> NDArray[np.float64]:
    """Where the centres of the original's pixels lie in the input along an axis."""
    scale, offset = meta.scale_xy[1 - axis], meta.offset_xy[1 - axis]
    return (np.arange(meta.original_hw[axis], dtype=np.float64) + 0.5) * scale + offset


def _inside(points: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    return (points >= 0) & (points < size)


def _lerp(plane: Float32Array, index: NDArray[np.float64], start: int, stop: int, axis: int) -> Float32Array:
    """Values at fractional indices along an axis, between the two nearest pixels of ``start..stop``."""
    index = np.clip(index, start, stop - 1)
    low = np.floor(index).astype(np.int64)
    high = np.minimum(low + 1, stop - 1)
    shape = [-1 if i == axis else 1 for i in range(plane.ndim)]
    weight = (index - low).astype(np.float32).reshape(shape)
    first = plane.take(low, axis)
    return cast(Float32Array, first + (plane.take(high, axis) - first) * weight)


def _resize_plane(plane: Float32Array, size_hw: Size) -> Float32Array:
    channels = plane.reshape(*plane.shape[:2], -1)
    if plane.shape[:2] == size_hw:
        return np.array(plane, np.float32)
    parts = [
        cv2.resize(np.ascontiguousarray(channels[:, :, i : i + _CHANNELS_AT_ONCE]), size_hw[::-1])
        for i in range(0, channels.shape[2], _CHANNELS_AT_ONCE)
    ]
    parts = [part.reshape(*size_hw, -1) for part in parts]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    return cast(Float32Array, whole.reshape(*size_hw, *plane.shape[2:]))
