"""Reading datasets in Pascal VOC's format: an XML file an image, with named boxes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vision_service.errors import ConfigError
from vision_service.types import Float32Array


@dataclass(frozen=True, slots=True, eq=False)
class AnnotatedBoxes:
    """What an image shows, according to people.

    Attributes:
        boxes_xyxy: float32 ``[N, 4]``, pixels of the image, as everywhere here: the whole image is ``0, 0, W, H``.
        class_names: N names.
        difficult: bool ``[N]``: marked as hard to recognise; by VOC's rules neither counted when found nor when
            missed.
    """

    boxes_xyxy: Float32Array
    class_names: tuple[str, ...]
    difficult: NDArray[np.bool_]


def read_voc_annotation(path: Path) -> AnnotatedBoxes:
    """One annotation file.

    VOC counts pixels from 1 and includes the last one, so 1 is taken from the upper left corner.

    Args:
        path: an XML file.

    Raises:
        ConfigError: it cannot be read, is no VOC annotation, or a box is inside out.
    """
    try:
        root = ET.fromstring(path.read_bytes())  # noqa: S314 expat refuses entity bombs, and fetches nothing
        objects = [
            (
                [float(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")],
                _text(item, "name"),
                (item.findtext("difficult") or "0").strip() == "1",
            )
            for item in root.findall("object")
        ]
    except OSError as error:
        raise ConfigError(f"the annotation {path} cannot be read: {error.strerror}") from None
    except (ET.ParseError, ValueError) as error:
        raise ConfigError(f"{path} is not a Pascal VOC annotation: {error}") from None
    boxes = np.array([box for box, _, _ in objects], np.float32).reshape(-1, 4)
    boxes[:, :2] -= 1.0
    if not bool(np.all(boxes[:, 2:] > boxes[:, :2])):
        raise ConfigError(f"{path}: a box has no area or its corners are crossed")
    return AnnotatedBoxes(
        boxes, tuple(name for _, name, _ in objects), np.array([hard for _, _, hard in objects], np.bool_)
    )


def _text(item: ET.Element, path: str) -> str:
    text = item.findtext(path)
    if text is None:
        raise ValueError(f"an object has no {path}")
    return text.strip()
