"""What is to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_service.config.settings import ServerSettings

Measure = Literal["network", "pipeline", "served", "streamed", "single", "open", "overload"]
MEASURES: tuple[Measure, ...] = ("network", "pipeline", "served", "streamed", "single", "open", "overload")


@dataclass(frozen=True, slots=True)
class Variant:
    """A model in a runtime and a precision.

    Attributes:
        model: name in the manifests and the zoo.
        runtime: as for ``serve``; empty: as the settings say.
        precision: likewise.
    """

    model: str
    runtime: str = ""
    precision: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.model, self.runtime, self.precision) if part)


@dataclass(frozen=True, slots=True)
class Setup:
    """How the models are found and run, as for ``serve``.

    Attributes:
        config: a settings file.
        manifests: manifests of further models.
        device: where models run; empty: as the settings say.
    """

    config: Path | None = None
    manifests: tuple[Path, ...] = ()
    device: str = ""

    def flags(self, variant: Variant) -> dict[str, Any]:
        """What `ServerSettings.read` and, with dashes, ``serve`` are given."""
        chosen = {"device": self.device, "runtime": variant.runtime, "precision": variant.precision}
        return {name: value for name, value in chosen.items() if value}

    def settings(self, variant: Variant) -> ServerSettings:
        """Settings of a process that has this model alone.

        Raises:
            ConfigError: a source cannot be read, or a value is wrong.
        """
        more = {"manifests": self.manifests} if self.manifests else {}
        return ServerSettings.read(self.config, models=(variant.model,), **more, **self.flags(variant))


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of the benchmark.

    Attributes:
        variants: what is measured.
        setup: how it is found and run.
        images: encoded files.
        measures: which of `MEASURES`; ``open`` needs a rate, ``overload`` a factor and ``served``; what is
            ``streamed`` is measured under overload as well.
        batch_sizes: of the network alone; empty: powers of two up to the model's largest, and that.
        in_flight: calls under way in the closed loops of the pipeline and the server.
        rate: of the open loop, images a second.
        overload: of two more open loops, as a multiple of what a closed loop right before reached: with callers that
            go on asking, and with callers that hold back. Each is measured twice a round, for a quarter of the time.
        seconds: of each measurement in a round; but for the open loop, in parts that take turns.
        turns: how many. Every other one goes the other way round, so that what comes after what does not matter, nor a
            machine that becomes slower or faster meanwhile.
        warmup_s: before each measurement and each of its parts, seconds; half of it before single calls, twice as much
            before overload.
        rounds: how often everything is measured; figures are medians.
        generators: processes that generate load.
        address: a running server to measure instead of one that is started for it; empty: start one.
    """

    variants: Sequence[Variant]
    setup: Setup
    images: Sequence[bytes]
    measures: tuple[Measure, ...] = ("network", "pipeline", "served", "streamed", "single")
    batch_sizes: tuple[int, ...] = ()
    in_flight: int = 32
    rate: float = 0.0
    overload: float = 0.0
    seconds: float = 5.0
    turns: int = 4
    warmup_s: float = 1.0
    rounds: int = 3
    generators: int = 1
    address: str = ""
