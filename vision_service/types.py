"""What flows through the house: images on the way in, predictions on the way out. Frozen, validated, numpy only.

Images on the CPU are uint8 ``[H, W, 3]`` RGB. Boxes are float32 ``[N, 4]`` as x1, y1, x2, y2 in pixels of the image
that was sent (after EXIF orientation), the origin at its top-left corner, so a box around the whole image is
``0, 0, W, H``. Scores are probabilities, 0..1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from vision_service.errors import InvalidInput, choices

UInt8Array = NDArray[np.uint8]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
InputArray = UInt8Array | Float32Array
"""A network's input, 0..255: float32 only where the model's interpolation does not round."""

VOID = 255
"""Class id, in a class map, of pixels that belong to no class that was kept (as in Pascal VOC)."""


class Task(StrEnum):
    """What a model does."""

    CLASSIFY = "classify"
    DETECT = "detect"
    SEGMENT = "segment"
    TRANSLATE = "translate"


@dataclass(frozen=True, slots=True)
class ImageMeta:
    """How to go back from the network's input to the original image.

    A point of the original maps to ``input = original * scale + offset``, per axis, in continuous pixel coordinates
    (pixel i covers i..i+1).

    Attributes:
        original_hw: height and width of the original, pixels.
        input_hw: height and width of the network's input, pixels, padding included.
        scale_xy: input pixels per original pixel.
        offset_xy: where the original's corner lies in the input; negative when it was cropped away.
    """

    original_hw: tuple[int, int]
    input_hw: tuple[int, int]
    scale_xy: tuple[float, float]
    offset_xy: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Params:
    """What a caller may choose for one call, every value known. Applied after the forward pass.

    Attributes:
        top_k: most classes in a classification, >= 1.
        score_threshold: lowest score that is reported, 0..1; for ``segment``, lowest that makes a pixel foreground.
        iou_threshold: overlap above which the lower-scored box of the same class is dropped, 0..1.
        max_detections: most boxes, >= 1.
        class_ids: ids to keep; ``None`` keeps all.

    Raises:
        InvalidInput: a value is out of its range; names the field.
    """

    top_k: int = 5
    score_threshold: float = 0.0
    iou_threshold: float = 0.5
    max_detections: int = 100
    class_ids: frozenset[int] | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "max_detections"):
            if getattr(self, name) < 1:
                raise InvalidInput(name, f"must be 1 or more, got {getattr(self, name)}")
        for name in ("score_threshold", "iou_threshold"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:  # NaN is not
                raise InvalidInput(name, f"must be a number from 0 to 1, got {value}")


@dataclass(frozen=True, slots=True)
class ParamOverrides:
    """What one call asks for; ``None`` leaves the model's default.

    Attributes:
        top_k: see `Params`.
        score_threshold: see `Params`.
        iou_threshold: see `Params`.
        max_detections: see `Params`.
        classes: class names and ids to keep.
    """

    top_k: int | None = None
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    classes: tuple[str | int, ...] | None = None

    def chosen(self) -> dict[str, Any]:
        """The values that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def resolve(self, defaults: Params, class_names: tuple[str, ...]) -> Params:
        """These choices over a model's defaults.

        Args:
            defaults: the model's own values.
            class_names: the model's class table, the index is the id.

        Returns:
            Every value known.

        Raises:
            InvalidInput: a value is out of range, or the model has no such class (near matches are named).
        """
        chosen: dict[str, Any] = {
            name: value
            for name in ("top_k", "score_threshold", "iou_threshold", "max_detections")
            if (value := getattr(self, name)) is not None
        }
        if self.classes:
            ids = _ids_by_name(class_names)
            wanted = set(self.classes)
            chosen["class_ids"] = frozenset(i for item in wanted for i in _ids(item, class_names, ids))
        return replace(defaults, **chosen) if chosen else defaults


@lru_cache(maxsize=64)
def _ids_by_name(class_names: tuple[str, ...]) -> dict[str, list[int]]:
    """Ids of each name; ImageNet has two classes named 'crane'."""
    ids: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):
        ids.setdefault(name, []).append(index)
    return ids


def _ids(item: str | int, class_names: tuple[str, ...], ids: dict[str, list[int]]) -> list[int]:
    """The ids meant by a class name or by an id."""
    if isinstance(item, int):
        if not 0 <= item < len(class_names):
            raise InvalidInput("classes", f"the model has class ids 0 to {len(class_names) - 1}, got {item}")
        return [item]
    if item not in ids:
        raise InvalidInput("classes", f"the model has no class {item[:100]!r}; {choices(item, class_names)}")
    return ids[item]


def _check_rows(what: str, class_ids: Int64Array, class_names: tuple[str, ...], scores: Float32Array) -> None:
    if class_ids.ndim != 1 or scores.shape != class_ids.shape or len(class_names) != len(class_ids):
        raise ValueError(
            f"{what}: class_ids, class_names and scores must be of one length, "
            f"got {class_ids.shape}, {len(class_names)} and {scores.shape}"
        )
    if not bool(np.all((scores >= 0.0) & (scores <= 1.0))):  # NaN is not
        raise ValueError(f"{what}: scores must lie in 0..1, got {scores[~((scores >= 0) & (scores <= 1))][:3]}")


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """The likeliest classes of an image, likeliest first.

    Attributes:
        class_ids: int64 ``[K]``.
        class_names: K names.
        scores: float32 ``[K]``, 0..1, descending.

    Raises:
        ValueError: lengths differ, or a score is not a probability.
    """

    class_ids: Int64Array
    class_names: tuple[str, ...]
    scores: Float32Array

    def __post_init__(self) -> None:
        _check_rows("Classification", self.class_ids, self.class_names, self.scores)

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Objects in an image, highest score first.

    Attributes:
        boxes_xyxy: float32 ``[N, 4]``, pixels of the original image.
        class_ids: int64 ``[N]``.
        class_names: N names.
        scores: float32 ``[N]``, 0..1, descending.
        mask_rles: N masks of the original's size as COCO's compressed run lengths (`imaging.masks.decode_rle` makes
            pixels of them); ``None`` when the model makes no masks.

    Raises:
        ValueError: lengths differ, a box is not finite or has its corners crossed, a score is not a probability.
    """

    boxes_xyxy: Float32Array
    class_ids: Int64Array
    class_names: tuple[str, ...]
    scores: Float32Array
    mask_rles: tuple[bytes, ...] | None = None

    def __post_init__(self) -> None:
        _check_rows("Detections", self.class_ids, self.class_names, self.scores)
        if self.boxes_xyxy.shape != (len(self.class_ids), 4):
            raise ValueError(f"Detections: boxes must be [{len(self.class_ids)}, 4], got {self.boxes_xyxy.shape}")
        if not bool(np.isfinite(self.boxes_xyxy).all()):
            raise ValueError("Detections: a box is not finite")
        if not bool(np.all(self.boxes_xyxy[:, 2:] >= self.boxes_xyxy[:, :2])):
            raise ValueError("Detections: a box has x2 < x1 or y2 < y1")
        if self.mask_rles is not None and len(self.mask_rles) != len(self.class_ids):
            raise ValueError(f"Detections: got {len(self.mask_rles)} masks for {len(self.class_ids)} boxes")

    @classmethod
    def empty(cls) -> Self:
        """No objects."""
        return cls(np.empty((0, 4), np.float32), np.empty(0, np.int64), (), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentationMap:
    """Which class each pixel of the original image belongs to.

    Attributes:
        class_map: uint8 ``[H, W]``, class ids; `VOID` where no kept class is and the model has no background class.
        class_names: the model's whole class table, the index is the id; at most 255 of them.
        background_id: id of the class that means "nothing", or ``None``.

    Raises:
        ValueError: wrong dtype or rank, or an id that the class table does not have.
    """

    class_map: UInt8Array
    class_names: tuple[str, ...]
    background_id: int | None = None

    def __post_init__(self) -> None:
        if self.class_map.dtype != np.uint8 or self.class_map.ndim != 2:
            raise ValueError(f"SegmentationMap: need uint8 [H, W], got {self.class_map.dtype} {self.class_map.shape}")
        if len(self.class_names) > VOID:
            raise ValueError(f"SegmentationMap: at most {VOID} classes fit in a class map, got {len(self.class_names)}")
        unknown = [i for i in np.flatnonzero(self.areas()) if i >= len(self.class_names) and i != VOID]
        if unknown:
            raise ValueError(f"SegmentationMap: ids {unknown} are not among the {len(self.class_names)} classes")

    def areas(self) -> Int64Array:
        """Pixels of each id: int64 ``[256]``."""
        return np.bincount(self.class_map.ravel(), minlength=256).astype(np.int64)

    def mask(self, class_id: int) -> NDArray[np.bool_]:
        """Where one class is: bool ``[H, W]``."""
        return np.equal(self.class_map, class_id)


@dataclass(frozen=True, slots=True, eq=False)
class TranslatedImage:
    """An image made from an image.

    Attributes:
        image: uint8 ``[H', W', 3]`` RGB.

    Raises:
        ValueError: wrong dtype or shape.
    """

    image: UInt8Array

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"TranslatedImage: need uint8 [H, W, 3], got {self.image.dtype} {self.image.shape}")


Prediction = Classification | Detections | SegmentationMap | TranslatedImage

P = TypeVar("P", bound=Prediction, covariant=True)

PREDICTION_OF_TASK: dict[Task, type[Classification | Detections | SegmentationMap | TranslatedImage]] = {
    Task.CLASSIFY: Classification,
    Task.DETECT: Detections,
    Task.SEGMENT: SegmentationMap,
    Task.TRANSLATE: TranslatedImage,
}


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one call went.

    Attributes:
        decode_ms: file bytes to pixels.
        preprocess_ms: pixels to the network's input.
        queue_ms: waiting for the device.
        forward_ms: the network on the whole batch, transfers included.
        postprocess_ms: outputs to predictions, for the whole batch.
        batch_size: images in that batch.
        encode_ms: prediction to reply; 0 in process.
    """

    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    forward_ms: float = 0.0
    postprocess_ms: float = 0.0
    batch_size: int = 0
    encode_ms: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Result(Generic[P]):
    """A prediction and how it came about.

    Attributes:
        prediction: what the model found.
        original_hw: height and width of the image that was sent, after EXIF orientation.
        model_name: who answered.
        model_version: which version of it.
        timings: where the time went.
        request_id: what the server's log calls this call; empty in process.
    """

    prediction: P
    original_hw: tuple[int, int]
    model_name: str
    model_version: str
    timings: Timings = field(default_factory=Timings)
    request_id: str = ""
