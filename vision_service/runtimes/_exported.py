"""A network as a graph: `torch.export`, for the runtimes that convert."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vision_service.runtimes.base import CannotCompile, Forward, Workload

_TOLERANCE = 1e-3
"""Of the largest value. Conversions that are right stay below a hundredth of it in float32."""
_OUTLIERS = 0.02
"""Share of values that may differ more: where candidates are ranked, rounding swaps some that are almost equal."""

_OTHER_SIZES = ((128, 192), (256, 128))
"""Heights and widths, multiples of every stride and padding in use."""


def export_network(network: nn.Module, work: Workload, batch_size: int | None = None) -> ExportedProgram:
    """The network's graph; for any height and width where the workload says so.

    Args:
        network: see `Runtime.compile`.
        work: what it will be given.
        batch_size: the only one that the graph is for; ``None``: any number of images.

    Raises:
        CannotCompile: its Python cannot be made a graph; says what in it.
    """
    images, sizes_hw = probe(work, batch_size or 2)  # a batch of one would be taken for a constant
    device = next((tensor.device for tensor in network.parameters()), images.device)
    free: dict[int, Any] = {0: Dim.DYNAMIC} if batch_size is None else {}
    sides = {1: Dim.DYNAMIC, 2: Dim.DYNAMIC} if work.any_size else {}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the libraries' own code
            return torch.export.export(
                network.eval(),
                (images.to(device), sizes_hw.to(device)),
                dynamic_shapes=(free | sides, free),
                strict=False,
            )
    except Exception as error:  # whatever the network's code raises on symbols
        raise CannotCompile(f"the network cannot be exported as a graph: {first_line(error)}") from error


def probe(work: Workload, count: int) -> tuple[Tensor, Tensor]:
    """Noise, always the same: ``[N, h, w, 3]`` of the example's type, and sizes ``[N, 2]``, the last one smaller."""
    return _noise(work, count, int(work.example.shape[1]), int(work.example.shape[2]))


def _noise(work: Workload, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, height, width, 3), generator=noise).to(work.example.dtype)
    sizes_hw = torch.tensor([[height, width]] * count)
    sizes_hw[-1] = torch.tensor([height - height // 3, width - width // 4])
    return images, sizes_hw


def probes(work: Workload, batch_size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """What a conversion is tried with: a batch of the workload's size and, where it is for any size, of two others.

    The others are small: networks that rank their candidates do it differently where there are few, and a graph that
    was made from many is then wrong.
    """
    batches = [probe(work, batch_size or 3)]
    if work.any_size:
        batches += [_noise(work, batch_size or 2, *size_hw) for size_hw in _OTHER_SIZES]
    return batches


def check_conversion(forward: Forward, network: nn.Module, work: Workload, batch_size: int | None = None) -> None:
    """Compare a converted network, in float32, with the original.

    Args:
        forward: runs the converted one.
        network: the original.
        work: what it will be given.
        batch_size: the only one that it is for; ``None``: any.

    Raises:
        CannotCompile: they disagree at some size, so the conversion is wrong.
    """
    for images, sizes_hw in probes(work, batch_size):
        with torch.inference_mode():
            expected = network(images, sizes_hw)
        where = f"for images of {images.shape[1]} x {images.shape[2]}"
        try:
            found = forward(images, sizes_hw)
        except Exception as error:  # of each library's own kind
            raise CannotCompile(f"the converted network fails {where}: {first_line(error)}") from error
        _compare(found, expected, where)


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], where: str) -> None:
    if [tuple(tensor.shape) for tensor in found] != [tuple(tensor.shape) for tensor in expected]:
        raise CannotCompile(f"the converted network returns tensors of other shapes than the original {where}")
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        bound = _TOLERANCE * theirs.abs().max().clamp(min=1e-6)
        outliers = ((ours - theirs).abs() > bound).float().mean().item()
        if not outliers <= _OUTLIERS:
            raise CannotCompile(
                f"the converted network disagrees with the original in {outliers:.0%} of output {index} {where}"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error, for a reason."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
