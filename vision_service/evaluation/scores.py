"""What scoring a dataset gives, and what every task's scorer does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vision_service.evaluation.samples import Sample
from vision_service.types import ParamOverrides, Result

Unmapped = Literal["ignore", "count"]
Record = dict[str, Any]
"""What a report keeps of an image, as plain values; the task's scorer says what."""
Metrics = dict[str, float | None]
"""Figures by name; ``None`` where the dataset has nothing to measure."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of a dataset.

    Attributes:
        metrics: the overall ones.
        per_class: a row a class of the dataset, ``class_name`` first.
        images: in the dataset's order, without those that failed.
        curves: what is plotted.
    """

    metrics: Metrics
    per_class: list[dict[str, Any]]
    images: list[Record]
    curves: dict[str, Any]


class Scorer(Protocol):
    """Takes predictions one by one."""

    def overrides(self) -> ParamOverrides:
        """What the model is asked for."""
        ...

    def add(self, sample: Sample, result: Result[Any]) -> None:
        """Take an image.

        Raises:
            InvalidImage: its annotation and the image do not fit together.
        """
        ...

    def finish(self) -> Scores:
        """The figures of all that was taken.

        Raises:
            ConfigError: there is nothing to measure against.
        """
        ...


class Resampled(Protocol):
    """Overall figures of a dataset in which images come several times or not at all, for bootstrapping."""

    def metrics(self, weights: NDArray[np.float64]) -> dict[str, float]:
        """Figures.

        Args:
            weights: ``[images]``, how often each image comes, whole numbers.

        Returns:
            By name, NaN where nothing is left to measure.
        """
        ...


def short(value: float | np.floating) -> float:
    """The decimal number with the fewest digits that is this float32, so that files are small and lose nothing."""
    return float(str(np.float32(value)))


def mean(values: NDArray[np.floating]) -> float | None:
    """Of those that are there (not NaN); ``None`` when none is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else None
