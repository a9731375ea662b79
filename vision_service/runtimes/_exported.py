"""A network as a graph: `torch.export`, for the runtimes that convert."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from vision_service.runtimes.base import CannotCompile, Workload


def export_network(network: nn.Module, work: Workload) -> ExportedProgram:
    """The network's graph, for any number of images, and for any size where the workload says so.

    Args:
        network: see `Runtime.compile`; on the CPU, in float32.
        work: what it will be given.

    Raises:
        CannotCompile: its Python cannot be made a graph; says what in it.
    """
    images = work.example.repeat(2, 1, 1, 1)  # a batch of one would be taken for a constant
    sizes_hw = torch.tensor([list(images.shape[1:3])] * 2)
    free: dict[int, Any] = {0: Dim.DYNAMIC}
    if work.any_size:
        free |= {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the libraries' own code
            return torch.export.export(
                network.eval(), (images, sizes_hw), dynamic_shapes=(free, {0: Dim.DYNAMIC}), strict=False
            )
    except Exception as error:  # whatever the network's code raises on symbols
        raise CannotCompile(f"the network cannot be exported as a graph ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of an error, for a reason."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
