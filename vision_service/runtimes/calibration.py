"""The user's images that an int8 network's scales are measured on."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vision_service.config import PreprocessSpec
from vision_service.errors import ConfigError, InvalidImage
from vision_service.imaging.decode import decode_image
from vision_service.imaging.preprocess import content_hw, preprocess

logger = logging.getLogger(__name__)

MOST_IMAGES = 300
"""More change little and take longer; of a larger folder, every nth is used."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Images in a folder, prepared as the model's calls will be.

    Attributes:
        folder: searched with the folders in it; what is no image is left out.
        preprocess: the model's.
    """

    folder: Path
    preprocess: PreprocessSpec

    def digest(self) -> str:
        """A hash of the files that are used, in lower-case hex.

        Raises:
            ConfigError: there are none, or one cannot be read.
        """
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(hashlib.sha256(_read(file)).digest())
        return digest.hexdigest()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Each image as a batch of one: uint8 ``[1, h, w, 3]`` and its picture's size, int64 ``[1, 2]``.

        Raises:
            ConfigError: there is no image that can be used.
        """
        batches, skipped = [], 0
        for file in self._files():
            try:
                pixels, meta = preprocess(decode_image(_read(file)), self.preprocess)
            except InvalidImage as error:
                skipped += 1
                logger.debug("not calibrated with %s: %s", file, error)
                continue
            batches.append((torch.from_numpy(pixels).unsqueeze(0), torch.tensor([content_hw(meta)])))
        if not batches:
            raise ConfigError(f"calibration_folder {self.folder}: none of its {skipped} files is an image")
        if skipped:
            logger.info("calibration_folder %s: %d files are not images and were left out", self.folder, skipped)
        return batches

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise ConfigError(f"calibration_folder {self.folder} is not a folder")
        files = sorted(file for file in self.folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ConfigError(f"calibration_folder {self.folder} is empty")
        return files[:: -(-len(files) // MOST_IMAGES)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"calibration_folder: {file} cannot be read: {error.strerror}") from None
