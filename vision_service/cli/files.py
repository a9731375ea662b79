"""Which images a command line means, and what their pictures are called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vision_service.errors import ConfigError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image and its place below what was named.

    Attributes:
        path: where it lies.
        name: its path below the folder that was named, or just its file name.
    """

    path: Path
    name: Path


def find_images(named: Iterable[Path]) -> list[ImageFile]:
    """The files that were named, whatever they are called, and the images in the folders that were named, sorted.

    Raises:
        ConfigError: there are none.
    """
    named = list(named)
    found: dict[Path, ImageFile] = {}
    for path in named:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            files = [ImageFile(file, file.relative_to(path)) for file in inside]
        else:
            files = [ImageFile(path, Path(path.name))]
        found.update({file.path: file for file in files if file.path not in found})
    if not found:
        folders = ", ".join(str(path) for path in named)
        raise ConfigError(f"no images in {folders}; these count: {' '.join(sorted(SUFFIXES))}")
    return list(found.values())


class PictureNames:
    """Names of output pictures, no two alike."""

    def __init__(self) -> None:
        self._taken: set[Path] = set()

    def name(self, file: ImageFile, model: str, suffix: str) -> Path:
        """A name that is still free, such as ``holiday/beach.nanodet.jpg``.

        Args:
            file: the image that the picture shows.
            model: who drew it; comes from a server, so what is no plain name is replaced.
            suffix: with its dot.
        """
        stem = f"{file.name.stem}.{re.sub(r'[^A-Za-z0-9_-]', '_', model)}"
        name = file.name.with_name(stem + suffix)
        count = 1
        while name in self._taken:
            count += 1
            name = file.name.with_name(f"{stem}-{count}{suffix}")
        self._taken.add(name)
        return name
