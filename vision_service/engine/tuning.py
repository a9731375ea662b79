"""How large a batch, how long a delay and how many waiting calls keep a latency objective.

The model behind it: while a call is let in, one batch runs, and full batches may be queued ahead of it. With batches
of ``b`` that take ``L(b)``, and a queue of ``k`` batches, the last call let in has its answer after ``(k + 1) * L(b)``:
the rest of the batch that runs, the batches ahead, and its own. A batch that is held back for more images is held back
for no longer than ``L(1)``, the time that running its first image at once would have taken, so this changes nothing.

``L`` is measured at warm-up, when the machine has nothing else to do. While calls are served, the decoders share the
cores: `Tuner` compares what batches take with what they took alone, and chooses again when that has changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from vision_service.config import BatchingSpec
from vision_service.engine.queue import BatchLimits

_WORTH_A_DELAY = 0.9
"""An image in a full batch must cost less than this share of one alone, or waiting for a fuller batch gains nothing."""

_ABOUT_AS_LITTLE = 1.05
"""Costs of an image in batches of two sizes differ by no more than this factor: then the smaller batch is taken."""

_A_BATCH_MS = 2.0
"""What a batch costs besides the network, whatever its size: it is passed from thread to thread and its callers are
woken, beside decoders that lose what they have in the caches. Measured on two CPU cores; a GPU has not been."""

_SMOOTHING = 0.05
"""Weight of the newest batch in the moving average of the slowdown: that of about 20 batches."""

_CHANGED = 0.1
"""By how much the slowdown must move before limits are chosen again, so that they do not flicker."""


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """How long a batch takes, by its size.

    Attributes:
        points: batch size and milliseconds (forward pass and postprocessing), by size.
        beside: batch size and milliseconds of a forward pass beside which others run, each on its share of the cores;
            empty where none do.
    """

    points: tuple[tuple[int, float], ...]
    beside: tuple[tuple[int, float], ...] = ()

    def ms(self, size: int) -> float:
        """Milliseconds of a batch; sizes between two measured ones lie on the line between them."""
        low_size, low_ms = self.points[0]
        for high_size, high_ms in self.points:
            if high_size >= size:
                share = (size - low_size) / (high_size - low_size) if high_size > low_size else 1.0
                return low_ms + (high_ms - low_ms) * share
            low_size, low_ms = high_size, high_ms
        return low_ms * size / low_size

    def economical(self, most: int) -> int:
        """The smallest measured size of at most ``most`` in which an image costs about as little as in any of them.

        What counts is the cost under load, beside other passes where there are any: a pass on all cores gains more from
        a large batch than one on its share of them. An image's share of what a batch costs besides the network is
        included: 2 ms, which small networks' batches are to spread.
        """
        costs = {size: (ms + _A_BATCH_MS) / size for size, ms in self.beside or self.points if size <= most}
        bound = _ABOUT_AS_LITTLE * min(costs.values())
        return min(size for size, cost in costs.items() if cost <= bound)


@dataclass(frozen=True, slots=True)
class Choice:
    """Limits of a batcher and what they keep.

    Attributes:
        limits: for the batcher.
        within_ms: how long the last call that is let in has to wait for its answer, once decoded, by the curve.
        kept: whether that is within the objective; true when there is none.
    """

    limits: BatchLimits
    within_ms: float
    kept: bool


def choose(batching: BatchingSpec, curve: LatencyCurve, slowdown: float = 1.0) -> Choice:
    """Limits for a model.

    Without an objective the batch is the smallest that costs an image about as little as any: a larger one only makes
    callers wait, and where its activations outgrow the caches, costs more. The others are what the spec says. With an
    objective, the largest measured batch is taken of which two in a
    row fit into it (a call may come just after one has started), and as many queued batches as fit. What the spec fixes
    wins: neither the batch nor the queue gets larger than it says, and a delay that is given is kept.

    Args:
        batching: of the model.
        curve: measured.
        slowdown: how much longer batches take now than the curve says.
    """
    fixed_delay_ms = batching.max_delay_ms
    if batching.target_p99_ms is None:
        size = curve.economical(batching.max_batch_size)
        delay_ms, queued = fixed_delay_ms or 0.0, batching.max_queued_jobs
    else:
        target_ms = batching.target_p99_ms
        delay_ms = fixed_delay_ms or 0.0
        size = 1
        for measured, ms in curve.points:
            if measured <= batching.max_batch_size and max(delay_ms, slowdown * ms) + slowdown * ms <= target_ms:
                size = measured
        if fixed_delay_ms is None and curve.ms(size) < _WORTH_A_DELAY * size * curve.ms(1):
            delay_ms = slowdown * curve.ms(1)
        batches = max(1, int(target_ms / (slowdown * curve.ms(size)) - 1 + 1e-9))
        queued = min(batching.max_queued_jobs, size * batches)
    batch_ms = slowdown * curve.ms(size)
    within_ms = max(delay_ms, -(-queued // size) * batch_ms) + batch_ms
    kept = batching.target_p99_ms is None or within_ms <= batching.target_p99_ms * (1 + 1e-9)
    return Choice(BatchLimits(size, delay_ms / 1000, queued, batching.max_queued_bytes), within_ms, kept)


class Tuner:
    """Keeps a model's limits in step with how fast its batches are.

    Args:
        batching: of the model.
        curve: measured when nothing else ran.
    """

    def __init__(self, batching: BatchingSpec, curve: LatencyCurve) -> None:
        self.curve = curve
        self._batching = batching
        self._slowdown = 1.0  # moving average
        self._chosen_at = 1.0
        self.choice = choose(batching, curve)

    def observe(self, size: int, ms: float) -> bool:
        """Take a batch's time into account.

        Args:
            size: of the batch.
            ms: its forward pass and postprocessing.

        Returns:
            Whether `choice` is another one now. Never without an objective.
        """
        if self._batching.target_p99_ms is None:
            return False
        self._slowdown += _SMOOTHING * (max(1.0, ms / self.curve.ms(size)) - self._slowdown)
        if abs(self._slowdown / self._chosen_at - 1) < _CHANGED:
            return False
        self._chosen_at = self._slowdown
        before, self.choice = self.choice, choose(self._batching, self.curve, self._slowdown)
        return before.limits != self.choice.limits
