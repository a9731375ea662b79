"""Batch sizes that a network is compiled for where it cannot take any: powers of two, and the largest."""

from __future__ import annotations

import torch
from torch import Tensor


def bucket_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, ... and the largest batch itself, ascending."""
    sizes = [1]
    while sizes[-1] < max_batch_size:
        sizes.append(min(2 * sizes[-1], max_batch_size))
    return sizes


def bucket_of(count: int, sizes: list[int]) -> int:
    """The smallest bucket that a batch fits in; a larger batch than any is its own."""
    return next((size for size in sizes if size >= count), count)


def fill_up(batch: Tensor, size: int) -> Tensor:
    """A batch of a bucket's size: the last image is repeated. Shares memory only if nothing had to be added."""
    missing = size - len(batch)
    return torch.cat((batch, batch[-1:].expand(missing, *batch.shape[1:]))) if missing else batch
