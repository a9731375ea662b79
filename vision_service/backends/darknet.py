"""Backend ``darknet``: detectors from a Darknet ``.cfg`` and ``.weights``, such as YOLOv3 and YOLOv4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vision_service.backends._detection import dense_to_detections
from vision_service.backends._options import read_options
from vision_service.backends.base import Backend
from vision_service.config import FileSpec, Letterbox, ModelSpec, Stretch
from vision_service.errors import ConfigError, WeightsError
from vision_service.networks.darknet import Darknet, DarknetCfgError
from vision_service.networks.darknet_weights import DarknetWeightsError, read_weights
from vision_service.types import ImageMeta, Params, Prediction, Task
from vision_service.weights.check import read_checked


class DarknetBackend(Backend):
    """Builds the network that a cfg describes and suppresses its overlapping boxes, class by class.

    The cfg is the companion of the weights whose name ends in ``.cfg``, unless the options name another.

    Options: ``cfg`` (path of the cfg; a relative one starts at the weight file's folder), ``size_hw`` (height and width
    of the input, two whole numbers, where they are to differ from the cfg's; the preprocessing must say the same).
    """

    task: ClassVar[Task] = Task.DETECT

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        options = read_options(spec, {"cfg": "", "size_hw": []})
        self._cfg = _cfg_file(spec, options["cfg"])
        self._size_hw = _size(spec, options["size_hw"])
        if not isinstance(spec.preprocess.resize, Stretch | Letterbox):
            raise ConfigError(
                f"model {spec.name!r}: a Darknet network has one size of input, so preprocess.resize must be "
                f"stretch or letterbox, got {spec.preprocess.resize.mode}"
            )

    def build_network(self) -> nn.Module:
        """`Darknet`: boxes ``[N, A, 4]`` in pixels of the input and scores ``[N, A, C]``, both float32.

        Raises:
            WeightsError: the cfg cannot be read or is not the one the spec means.
            ConfigError: it is wrong or not supported (names layer and line), or does not fit the spec.
        """
        where = f"model {self.spec.name!r}: cfg {self._cfg.file}"
        source = self.spec.weights.source if self.spec.weights else ""
        text = read_checked(where, self._cfg, source).decode("utf-8", errors="replace")
        try:
            network = Darknet(text, self._size_hw)
        except DarknetCfgError as error:
            raise ConfigError(f"{where}: {error}") from None
        self._check_fit(where, network)
        return network

    def load_weights(self, network: nn.Module) -> None:
        """Read Darknet's own format, then fuse the batch norms.

        Raises:
            WeightsError: the file cannot be read, is not the one the spec means, or belongs to another cfg.
        """
        weights = self.spec.weights
        if weights is None or not isinstance(network, Darknet):
            return
        where = f"model {self.spec.name!r}: weights {weights.file}"
        data = read_checked(where, weights, weights.source)
        try:
            read_weights(network, data)
        except DarknetWeightsError as error:
            raise WeightsError(f"{where}: do not fit the cfg {self._cfg.file}: {error}") from None
        network.fuse()

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Detections; suppression is class by class."""
        boxes, scores = outputs
        return list(dense_to_detections(boxes.float(), scores.float(), metas, params, self.spec.classes))

    def _check_fit(self, where: str, network: Darknet) -> None:
        classes, resize = network.class_counts[0], self.spec.preprocess.resize
        if classes != len(self.spec.classes):
            raise ConfigError(f"{where}: is for {classes} classes, but the model names {len(self.spec.classes)}")
        if network.channels != 3:
            raise ConfigError(f"{where}: takes {network.channels} channels, but images here have 3 (RGB)")
        if isinstance(resize, Stretch | Letterbox) and tuple(resize.size_hw) != network.size_hw:
            height, width = network.size_hw
            raise ConfigError(
                f"{where}: takes {height} x {width} pixels (height x width), but preprocess.resize.size_hw is "
                f"{list(resize.size_hw)}. Make them equal; the option size_hw replaces the cfg's size"
            )


def _cfg_file(spec: ModelSpec, option: str) -> FileSpec:
    if option:
        path = Path(option).expanduser()
        if spec.weights is not None:
            path = Path(spec.weights.file).parent / path  # an absolute one stays as it is
        return FileSpec(file=str(path))
    companions = spec.weights.companions if spec.weights is not None else ()
    found = [companion for companion in companions if companion.file.endswith(".cfg")]
    if len(found) != 1:
        raise ConfigError(
            f"model {spec.name!r}: needs the .cfg that describes the network: one companion of the weights whose name "
            f"ends in .cfg (there are {len(found)}), or the option 'cfg' with its path"
        )
    return found[0]


def _size(spec: ModelSpec, option: list[Any]) -> tuple[int, int] | None:
    if not option:
        return None
    if len(option) != 2 or not all(type(side) is int and side > 0 for side in option):
        raise ConfigError(
            f"model {spec.name!r}: option 'size_hw' must be two whole numbers, height and width, got {option!r}"
        )
    return option[0], option[1]
