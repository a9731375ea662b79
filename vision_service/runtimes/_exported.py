"""A network as a graph: `torch.export`, for the runtimes that convert."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vision_service.runtimes.base import CannotCompile, Workload

_TOLERANCE = 1e-3
"""Of the largest value. Conversions that are right stay below a hundredth of it in float32."""
_OUTLIERS = 0.02
"""Share of values that may differ more: where candidates are ranked, rounding swaps some that are almost equal."""


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
    height, width = work.example.shape[1:3]
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, height, width, 3), generator=noise).to(work.example.dtype)
    sizes_hw = torch.tensor([[height, width]] * count)
    sizes_hw[-1] = torch.tensor([height - height // 3, width - width // 4])
    return images, sizes_hw


def check_agreement(found: Sequence[Tensor], network: nn.Module, images: Tensor, sizes_hw: Tensor) -> None:
    """Compare a converted network, in float32, with the original.

    Raises:
        CannotCompile: they disagree, so the conversion is wrong.
    """
    with torch.inference_mode():
        expected = network(images, sizes_hw)
    if [tuple(tensor.shape) for tensor in found] != [tuple(tensor.shape) for tensor in expected]:
        raise CannotCompile("the converted network returns tensors of other shapes than the original")
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        bound = _TOLERANCE * theirs.abs().max().clamp(min=1e-6)
        outliers = ((ours - theirs).abs() > bound).float().mean().item()
        if not outliers <= _OUTLIERS:
            raise CannotCompile(
                f"the converted network disagrees with the original in {outliers:.0%} of output {index}"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error, for a reason."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
