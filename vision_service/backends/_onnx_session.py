"""A user's ONNX file as a network: ONNX Runtime behind an `nn.Module`.

The call is an operator of its own (``vision_service::onnx_run``), so that what traces networks takes it as one step.
Its shapes are found by running zeros through the graph; batch and sides are fixed in what is traced.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vision_service.errors import ConfigError, InferenceFailed, WeightsError, choices

Array = NDArray[Any]

_INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}

_SESSIONS: WeakValueDictionary[int, OnnxSession] = WeakValueDictionary()
_HANDLES = itertools.count(1)


class OnnxSession:
    """A graph with one image input, run on the CPU.

    Args:
        data: the file.
        where: begins the messages.
        layout: of the input, ``nchw`` or ``nhwc``; empty: by where its three channels are.
        outputs: names of the outputs to return, in order; empty: all, in the graph's order.
        ranks: how many axes each returned output is to have, the batch's included; one that has one less is of a graph
            without batches. ``None``: not checked.

    Attributes:
        size_hw: height and width of the input, ``None`` where any will do.
        batch_size: images in a run; ``None``: any number.

    Raises:
        ConfigError: ONNX Runtime is not installed, or the graph's inputs and outputs do not fit.
        WeightsError: it is not a graph that ONNX Runtime can load.
    """

    def __init__(
        self, data: bytes, where: str, *, layout: str = "", outputs: Sequence[str] = (), ranks: Sequence[int] = ()
    ) -> None:
        self._session = _load(data, where)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs)
            raise ConfigError(f"{where}: need a graph with one input, the image, got {len(inputs)}: {names}")
        (self._input,) = inputs
        if self._input.type not in _INPUT_TYPES:
            raise ConfigError(
                f"{where}: input {self._input.name!r} is {self._input.type}, need one of {', '.join(_INPUT_TYPES)}"
            )
        shape = [size if isinstance(size, int) and size > 0 else None for size in self._input.shape]
        self._nhwc = _is_nhwc(where, shape, layout)
        self.size_hw = (shape[1], shape[2]) if self._nhwc else (shape[2], shape[3])
        self.batch_size = shape[0]
        self._outputs = self._choose_outputs(where, outputs, ranks)
        self.handle = next(_HANDLES)
        _SESSIONS[self.handle] = self

    def _choose_outputs(self, where: str, wanted: Sequence[str], ranks: Sequence[int]) -> list[str]:
        known = {output.name: output.shape for output in self._session.get_outputs()}
        for name in wanted:
            if name not in known:
                raise ConfigError(f"{where}: the graph has no output {name!r}; {choices(str(name), known)}")
        chosen = list(wanted) or list(known)
        self._unbatched = [False] * len(chosen)
        if not ranks:
            return chosen
        if len(chosen) != len(ranks):
            raise ConfigError(
                f"{where}: need {len(ranks)} outputs, got {', '.join(map(repr, chosen))}: "
                "name them, in order, with option 'outputs'"
            )
        for index, (name, rank) in enumerate(zip(chosen, ranks, strict=True)):
            got = known[name]
            if len(got) not in (rank, rank - 1) and got:  # a graph may leave an output's shape open
                raise ConfigError(f"{where}: output {name!r} has {len(got)} axes, {got}; need {rank}")
            self._unbatched[index] = len(got) == rank - 1 and bool(got)
        if any(self._unbatched):
            if self.batch_size not in (None, 1):
                raise ConfigError(f"{where}: the input has a batch of {self.batch_size}, but an output has none")
            self.batch_size = 1
        return chosen

    def run(self, images: Array) -> list[Array]:
        """Run images, however many the graph takes at once.

        Args:
            images: float32 ``[N, 3, h, w]``.

        Returns:
            The outputs, the batch first. Where runs returned unequal sizes, smaller ones are filled up with zeros.

        Raises:
            InferenceFailed: an output's batch is not the input's.
        """
        x = images.transpose(0, 2, 3, 1) if self._nhwc else images
        x = np.ascontiguousarray(x, dtype=_INPUT_TYPES[self._input.type])
        step = self.batch_size or len(x)
        parts = [self._run_once(x[start : start + step], step) for start in range(0, len(x), step)]
        return [_join(pieces) for pieces in zip(*parts, strict=True)]

    def _run_once(self, x: Array, step: int) -> list[Array]:
        count = len(x)
        if count < step:
            x = np.concatenate((x, np.repeat(x[-1:], step - count, axis=0)))
        found = self._session.run(self._outputs, {self._input.name: x})
        outputs = []
        for name, output, unbatched in zip(self._outputs, found, self._unbatched, strict=True):
            array = np.asarray(output)[None] if unbatched else np.asarray(output)
            if array.ndim == 0 or len(array) != step:
                raise InferenceFailed(f"output {name!r} is {list(array.shape)} for a batch of {step}")
            outputs.append(array[:count])
        return outputs


class OnnxNetwork(nn.Module):
    """Calls a session; has no parameters.

    Args:
        session: kept for as long as the network.
    """

    def __init__(self, session: OnnxSession) -> None:
        super().__init__()
        self.session = session
        self.handle = session.handle

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Float ``[N, 3, h, w]`` to the graph's outputs, on the input's device."""
        return tuple(torch.ops.vision_service.onnx_run(x, self.handle))


@torch.library.custom_op("vision_service::onnx_run", mutates_args=(), schema="(Tensor x, int session) -> Tensor[]")
def _onnx_run(x: Tensor, session: int) -> list[Tensor]:
    found = _SESSIONS[session].run(x.detach().float().cpu().numpy())
    return [torch.from_numpy(np.array(output)).to(x.device) for output in found]


@_onnx_run.register_fake
def _shapes(x: Tensor, session: int) -> list[Tensor]:
    found = _SESSIONS[session].run(np.zeros([int(size) for size in x.shape], np.float32))
    # numpy's types by name, since making a real tensor is not allowed here.
    return [x.new_empty(output.shape, dtype=getattr(torch, str(output.dtype))) for output in found]


def _load(data: bytes, where: str) -> Any:
    try:
        onnxruntime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise ConfigError(f"{where}: needs ONNX Runtime: pip install 'vision-service[onnx]' ({error})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base class of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{where}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}). A graph must be one file: "
            "save it without external data"
        ) from None


def _is_nhwc(where: str, shape: list[int | None], layout: str) -> bool:
    if layout not in ("", "nchw", "nhwc"):
        raise ConfigError(f"{where}: option 'layout' must be 'nchw' or 'nhwc', got {layout!r}")
    if len(shape) != 4:
        raise ConfigError(f"{where}: the input has {len(shape)} axes, {shape}; need a batch of images, 4")
    if not layout:
        if (shape[1] == 3) == (shape[3] == 3):
            raise ConfigError(
                f"{where}: the input is {shape}, which does not say where its 3 channels are: set option 'layout' to "
                "'nchw' or 'nhwc'"
            )
        return shape[3] == 3
    axis = 1 if layout == "nchw" else 3
    if shape[axis] not in (3, None):
        raise ConfigError(f"{where}: the input is {shape}, as {layout} it has {shape[axis]} channels; need 3")
    return layout == "nhwc"


def _join(pieces: Sequence[Array]) -> Array:
    """Along the batch, filled up with zeros to the largest size of each other axis."""
    largest = np.max([piece.shape[1:] for piece in pieces], axis=0).astype(int)
    padded = [
        np.pad(piece, [(0, 0), *((0, int(most) - have) for most, have in zip(largest, piece.shape[1:], strict=True))])
        for piece in pieces
    ]
    return np.concatenate(padded) if len(padded) > 1 else padded[0]
