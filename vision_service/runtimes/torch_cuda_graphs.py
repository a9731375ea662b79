"""Runtime ``torch_cuda_graphs``: the network recorded once per batch size and replayed, which costs the CPU one launch.

Not run on a GPU yet; ``tests/gpu`` has its tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_service.runtimes._buckets import bucket_of, bucket_sizes
from vision_service.runtimes._exported import first_line
from vision_service.runtimes.base import CannotCompile, Forward, Precision, Runtime, Workload, is_out_of_memory
from vision_service.runtimes.torch_eager import does_not_fit, run_on, to_device

_WARM_UPS = 3
"""Runs before the recording, so that libraries have chosen their kernels and have their work space."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph and the memory that it reads and writes.

    Attributes:
        graph: replays the network.
        images: uint8 ``[B, h, w, 3]``.
        sizes_hw: int64 ``[B, 2]``.
        outputs: written by each replay.
    """

    graph: torch.cuda.CUDAGraph
    images: Tensor
    sizes_hw: Tensor
    outputs: tuple[Tensor, ...]


class TorchCudaGraphs(Runtime):
    """Records the network for batches of 1, 2, 4, ... images; a batch in between is run in the next larger one.

    A recording is of one input size, so networks whose input sizes differ are refused, as are those that look at values
    while they run (the suppression inside two-stage detectors).
    """

    name = "torch_cuda_graphs"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {"cuda": ("fp32", "bf16", "fp16")}

    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """See `Runtime.compile`."""
        self.check_precision(precision)
        if work.any_size:
            raise CannotCompile("CUDA graphs are for one input size, and this model's inputs differ in size")
        module = to_device(network, self.device, precision)
        sizes = bucket_sizes(work.max_batch_size)
        recordings: dict[int, _Recording] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            recordings[size] = self._record(module, work, size, pool)
        unrecorded = run_on(module, self.device)
        stream = torch.cuda.current_stream(self.device)

        @torch.inference_mode()
        def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
            count = len(images)
            recording = recordings.get(bucket_of(count, sizes))
            if recording is None or images.shape[1:] != recording.images.shape[1:]:
                return unrecorded(images, sizes_hw)
            # What lies beyond the batch is left from an earlier one and is computed in vain.
            recording.images[:count].copy_(images, non_blocking=True)
            recording.sizes_hw[:count].copy_(sizes_hw, non_blocking=True)
            recording.graph.replay()
            outputs = tuple(output[:count].clone() for output in recording.outputs)
            stream.synchronize()
            return outputs

        return forward

    def _record(self, module: nn.Module, work: Workload, size: int, pool: Any) -> _Recording:
        images = work.example.repeat(size, 1, 1, 1).to(self.device)
        sizes_hw = torch.tensor([list(images.shape[1:3])] * size, device=self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(), torch.cuda.device(self.device):
                aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    for _ in range(_WARM_UPS):
                        module(images, sizes_hw)
                torch.cuda.current_stream().wait_stream(aside)
                with torch.cuda.graph(graph, pool=pool):
                    outputs = tuple(module(images, sizes_hw))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise does_not_fit(images, self.device) from error
            raise CannotCompile(f"the network cannot be recorded as a CUDA graph: {first_line(error)}") from error
        return _Recording(graph, images, sizes_hw, outputs)
