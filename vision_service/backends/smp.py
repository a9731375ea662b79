"""Backend ``smp``: every network of segmentation-models-pytorch, with any of its encoders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import segmentation_models_pytorch
import timm
from segmentation_models_pytorch.base import SegmentationModel
from torch import Tensor, nn

from vision_service.backends._input_size import check_input_multiple
from vision_service.backends._options import read_options
from vision_service.backends._segmentation import foreground_id, logits_to_maps
from vision_service.backends.base import Backend
from vision_service.config import FileSpec, ModelSpec
from vision_service.errors import ConfigError, WeightsError, choices
from vision_service.types import ImageMeta, Params, Prediction, Task
from vision_service.weights.check import read_checked

ARCHITECTURES: dict[str, type[nn.Module]] = {
    name.lower(): cls
    for name, cls in vars(segmentation_models_pytorch).items()
    if isinstance(cls, type) and issubclass(cls, SegmentationModel)
}
"""The library's networks by the names that its `create_model` knows."""

_OURS = {"encoder_name", "encoder_weights", "in_channels", "classes", "activation"}


class SmpBackend(Backend):
    """Builds a network by its names in segmentation-models-pytorch; weights are never fetched by the library.

    Options:
        arch: name of the architecture as `create_model` takes it (``unet``, ``unetplusplus``, ``fpn``,
            ``deeplabv3plus``, ``segformer`` ...). Empty: what ``config.json`` says, else ``unet``.
        encoder: any name of the library's encoders; ``tu-NAME`` for one of timm. Empty: what ``config.json`` says,
            else ``resnet34``.
        channels: of the output. 0: what ``config.json`` says, else as many as there are classes. 1 is a binary
            network: its sigmoid is the one class beside the background. Otherwise each class has its channel and
            softmax decides.
        mode: what the network was trained as, in the library's words: ``binary`` (one channel), ``multiclass``. Empty:
            what the channels say. ``multilabel`` is refused: a class map has room for one class a pixel.
        parameters: further arguments of the architecture as the library names them, such as ``encoder_depth`` and
            ``decoder_channels``.

    Weights are a state dict, or ``model.safetensors`` of a folder that the library's ``save_pretrained`` wrote or of a
    hub repository. The folder's ``config.json`` is read when it lies beside a file of that name, or is among the
    weights' ``companions``. An activation in it is left out, for the decision needs logits.
    """

    task: ClassVar[Task] = Task.SEGMENT

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._options = read_options(spec, {"arch": "", "encoder": "", "channels": 0, "mode": "", "parameters": {}})
        self._options["arch"] = self._options["arch"].lower()
        if self._options["arch"]:
            self._check_arch(self._options["arch"])
        if self._options["encoder"]:
            self._check_encoder(self._options["encoder"])
        self._check_channels(self._options["channels"] or len(spec.classes))
        if (mode := self._options["mode"]) not in ("", "binary", "multiclass", "multilabel"):
            raise ConfigError(f"{self._where}: option 'mode' is {mode!r}; need 'binary' or 'multiclass'")
        if mode == "multilabel":
            raise ConfigError(self._multilabel("option 'mode' is 'multilabel'"))

    def build_network(self) -> nn.Module:
        """The network: logits ``[N, channels, h, w]``.

        Raises:
            ConfigError: options and ``config.json`` disagree, the library refuses them, or the input's size does not
                fit the encoder's stride.
        """
        config = self._read_config()
        arch = self._pick("arch", str(config.pop("_model_class", "")).lower(), "unet")
        encoder = self._pick("encoder", config.get("encoder_name", ""), "resnet34")
        channels = self._pick("channels", config.get("classes", 0), len(self.spec.classes))
        self._check_arch(arch)
        self._check_encoder(encoder)
        self._check_channels(channels)
        self._check_mode(channels, str(config.get("activation") or ""))
        if config.get("in_channels", 3) != 3:
            raise ConfigError(f"{self._where}: config.json says in_channels {config['in_channels']}, images have 3")
        more = {k: v for k, v in config.items() if k not in _OURS and not k.startswith("_")}
        more |= self._options["parameters"]
        known = set(inspect.signature(ARCHITECTURES[arch].__init__).parameters) - {"self", "kwargs"} - _OURS
        if unknown := sorted(set(more) - known):
            raise ConfigError(f"{self._where}: {arch} has no parameter {unknown[0]!r}; {choices(unknown[0], known)}")
        try:
            network = ARCHITECTURES[arch](
                encoder_name=encoder, encoder_weights=None, in_channels=3, classes=channels, activation=None, **more
            )
        except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"{self._where}: {arch} with encoder {encoder} cannot be built: {error}") from error
        if getattr(network, "requires_divisible_input_shape", True):
            check_input_multiple(self.spec, _stride(network), f"{arch} with encoder {encoder}")
        return network

    def load_weights(self, network: nn.Module) -> None:
        """As in the base class; a classification head beside the masks is dropped once its weights were checked."""
        super().load_weights(network)
        network._modules["classification_head"] = None

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Class maps of the originals' sizes."""
        return list(logits_to_maps(outputs[0], metas, params, self.spec))

    @property
    def _where(self) -> str:
        return f"model {self.spec.name!r}"

    def _pick(self, option: str, configured: Any, default: Any) -> Any:
        """An option, or what config.json says, or the default; a contradiction of the first two is refused."""
        chosen = self._options[option]
        if chosen and configured and chosen != configured:
            raise ConfigError(
                f"{self._where}: option {option!r} is {chosen!r}, but the weights' config.json says {configured!r}: "
                "leave the option out, or name the weights that go with it"
            )
        return chosen or configured or default

    def _check_arch(self, arch: str) -> None:
        if arch not in ARCHITECTURES:
            raise ConfigError(
                f"{self._where}: segmentation-models-pytorch has no architecture {arch!r}; "
                f"{choices(arch, ARCHITECTURES)}"
            )

    def _check_encoder(self, encoder: str) -> None:
        names = segmentation_models_pytorch.encoders.get_encoder_names()
        if encoder.startswith("tu-"):
            if not timm.is_model(encoder[3:]):
                near = choices(encoder, (f"tu-{name}" for name in timm.list_models()))
                raise ConfigError(f"{self._where}: timm has no encoder {encoder[3:]!r}; {near}")
        elif encoder not in names:
            raise ConfigError(
                f"{self._where}: segmentation-models-pytorch has no encoder {encoder!r}; {choices(encoder, names)}"
            )

    def _check_channels(self, channels: int) -> None:
        try:
            if channels == 1:
                foreground_id(len(self.spec.classes), self.spec.background_id)
            elif channels != len(self.spec.classes):
                raise ValueError(f"{channels} channels do not fit {len(self.spec.classes)} classes; 1 would be binary")
        except ValueError as error:
            raise ConfigError(f"{self._where}: {error}") from None

    def _check_mode(self, channels: int, activation: str) -> None:
        """Refuse a network whose channels mean something else than what is made of them."""
        mode = self._options["mode"] or ("multilabel" if channels > 1 and activation == "sigmoid" else "")
        if mode == "multilabel":
            raise ConfigError(self._multilabel(f"config.json says activation 'sigmoid' for {channels} classes"))
        if mode and (mode == "binary") != (channels == 1):
            raise ConfigError(f"{self._where}: option 'mode' is {mode!r}, but the network has {channels} channels")

    def _multilabel(self, why: str) -> str:
        return (
            f"{self._where}: {why}, so a pixel may have several classes, and the answer has room for one. Serve each "
            "class by a binary network of its own, or, if the classes exclude each other, say mode = 'multiclass'"
        )

    def _read_config(self) -> dict[str, Any]:
        """``config.json`` of the weights; empty when they have none."""
        if self.spec.weights is None:
            return {}
        file = Path(self.spec.weights.file)
        beside = FileSpec(file=str(file.with_name("config.json")))
        named = [companion for companion in self.spec.weights.companions if companion.file.endswith("config.json")]
        if not named and not (file.name == "model.safetensors" and Path(beside.file).is_file()):
            return {}
        found = (named or [beside])[0]
        where = f"{self._where}: {found.file}"
        try:
            config = json.loads(read_checked(where, found, self.spec.weights.source))
        except ValueError as error:
            raise WeightsError(f"{where}: is not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise WeightsError(f"{where}: need a JSON object, the arguments of the network")
        return config


def _stride(network: nn.Module) -> int:
    """Input pixels a side for one pixel of the encoder's last map."""
    encoder: Any = network.encoder
    return int(encoder.output_stride)
