"""The predictor on a Ray cluster: files are read and decoded by tasks on any core, actors hold the models.

    items ──► decode: tasks, a core each ──► predict: a pool of actors, models loaded once each ──► write: parts

Ray Data streams: how much is decoded and waits is bounded by the object store, and what a lost node had is made again.
What an outcome says is the same as `Predictor` in one process says, to the byte.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from vision_service.config.settings import ServerSettings
from vision_service.engine.build import pull_missing, resolve_specs
from vision_service.errors import ConfigError
from vision_service.imaging.decode import DecodeLimits
from vision_service.jobs.items import Item, Outcome
from vision_service.jobs.predictor import Predictor, in_order
from vision_service.jobs.ray_parts import Parts, Written
from vision_service.jobs.ray_stages import Decode, Write, pack, stand_in, unpack
from vision_service.types import ParamOverrides

MOST_PART_IMAGES, LEAST_PART_IMAGES, LEAST_PARTS = 256, 16, 32
"""Images of a part. A small job has small parts, so that little is lost when it is stopped."""

BLOCK_ITEMS = 16
"""Items of a block: what a task decodes, and about what is done again when a node is lost."""

DECODING_BYTES = 512 * 1024 * 1024
"""What Ray sets aside for a task that decodes. It also keeps Ray from fusing decoding into the actors, which have other
work to do: it does so where two steps ask for the same."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How many actors hold the models, and on what. Each takes a core, and one copy of the models.

    Attributes:
        actors: at most so many; 0: one for each GPU share, or one a core less one for decoding.
        gpus: of an actor; a share of one is allowed.

    Raises:
        ConfigError: a value is out of its range.
    """

    actors: int = 0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.actors < 0 or self.gpus < 0:
            raise ConfigError(f"{self.actors} actors with {self.gpus} GPUs each cannot be had")

    def most(self, resources: dict[str, float]) -> int:
        """How many actors a cluster with these resources may have.

        Raises:
            ConfigError: it cannot have one and decode beside it.
        """
        cores, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
        if cores < 2 or gpus < self.gpus:
            need = "2 cores: one for the models and one to decode" + (f", and {self.gpus} GPUs" if self.gpus else "")
            raise ConfigError(f"the Ray cluster has {cores} cores and {gpus:g} GPUs, and a job needs {need}")
        return self.actors or (max(1, int(gpus / self.gpus)) if self.gpus else cores - 1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a predictor is made on a node: everything but the files, which the node has or fetches.

    Attributes:
        settings: fields of `ServerSettings`; the node's environment gives the others.
        overrides: what the calls choose.
        batch_size: most images in one forward pass.
        folder: where the program was started; relative paths are meant from there, on nodes that have it.
    """

    settings: dict[str, Any]
    overrides: ParamOverrides
    batch_size: int
    folder: str

    def make(self) -> Predictor:
        """Load the models here.

        Raises:
            VisionError: one is unknown here, or cannot be loaded.
        """
        stand_in(self.folder)
        settings = ServerSettings.read(**self.settings)
        specs = resolve_specs(settings)
        pull_missing(specs, settings)
        return Predictor(specs, self.overrides, settings=settings, workers=1, batch_size=self.batch_size)


class RayPredictor:
    """Runs items through a predictor on every node.

    Args:
        ray: the library, connected (`cluster.connected`).
        settings: of the process; what was set by flag, environment or file goes to the nodes.
        overrides: what the calls choose.
        options: how many actors, and how large.
        batch_size: most images in one forward pass.
    """

    def __init__(
        self,
        ray: Any,
        settings: ServerSettings,
        overrides: ParamOverrides | None = None,
        *,
        options: ActorOptions | None = None,
        batch_size: int = 1,
    ) -> None:
        self._ray = ray
        self._options = options or ActorOptions()
        self.limits = DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
        specs = resolve_specs(settings)
        self._only = specs[0].preprocess if len(specs) == 1 else None
        own = settings.model_dump(mode="json", exclude_unset=True, exclude={"host", "port"})
        self._recipe = Recipe(own, overrides or ParamOverrides(), batch_size, os.getcwd())  # noqa: PTH109

    def fingerprint(self) -> str:
        """`Predictor.fingerprint`, of a predictor on the cluster: runtime and precision may be others there."""
        ask = self._ray.remote(num_cpus=1, num_gpus=self._options.gpus)(_fingerprint)
        return str(self._ray.get(ask.remote(self._recipe)))

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """What becomes of images, in their order.

        Args:
            items: all are listed before the first is worked on.

        Raises:
            VisionError: the predictor cannot be made on a node.
        """
        return self._run(items, lambda found: found)

    def write(self, items: Sequence[Item], parts: Parts) -> Iterator[Written]:
        """Predict images and write parts, on the nodes.

        Args:
            items: the images.
            parts: where to.

        Returns:
            The parts, as they are written, in the order of the images.

        Raises:
            VisionError: the predictor cannot be made on a node.
        """
        part_images = min(MOST_PART_IMAGES, max(LEAST_PART_IMAGES, len(items) // LEAST_PARTS))
        return self._run(
            items,
            lambda found: found.map_batches(
                Write(parts), batch_size=part_images, batch_format="pyarrow", num_cpus=1, memory=DECODING_BYTES
            ),
        )

    def _run(self, items: Iterable[Item], then: Callable[[Any], Any]) -> Iterator[Any]:
        blocks = self._blocks(items)
        if not blocks:
            return
        data = self._ray.data
        actors = self._options.most(self._ray.cluster_resources())
        with _settings_of(data):
            found = (
                data.from_arrow_refs(blocks)
                .map_batches(
                    Decode(self.limits, self._only, self._recipe.folder),
                    batch_size=None,
                    batch_format="pyarrow",
                    num_cpus=1,
                    memory=DECODING_BYTES,
                )
                .map_batches(
                    _Predict,
                    fn_constructor_args=(self._recipe,),
                    compute=data.ActorPoolStrategy(min_size=1, max_size=actors),
                    num_cpus=1,
                    num_gpus=self._options.gpus,
                    batch_size=None,
                    batch_format="pyarrow",
                )
            )
            for batch in then(found).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                yield from unpack(batch)

    def _blocks(self, items: Iterable[Item]) -> list[Any]:
        source, blocks = iter(items), []
        while some := list(islice(source, BLOCK_ITEMS)):
            blocks.append(self._ray.put(pack(some)))
        return blocks


class _Predict:
    """An actor's work: models loaded once, then block after block."""

    def __init__(self, recipe: Recipe) -> None:
        self._predictor = recipe.make()

    def __call__(self, batch: Any) -> Any:
        return pack(in_order(self._outcome, unpack(batch), self._predictor.in_flight))

    def _outcome(self, one: Item | Outcome | tuple[Item, bytes]) -> Outcome:
        if isinstance(one, Outcome):
            return one
        if isinstance(one, tuple):
            return self._predictor.predict(*one)
        return replace(self._predictor.predict(one), item=replace(one, pixels=None))


def _fingerprint(recipe: Recipe) -> str:
    with recipe.make() as predictor:
        return predictor.fingerprint


@contextmanager
def _settings_of(data: Any) -> Iterator[None]:
    """Ray Data's settings for the pipelines that are made inside."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    before = data.DataContext.get_current()
    context = before.copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # the job has its own
    context.issue_detectors_config.detectors = []  # it would advise about our own choices
    data.DataContext._set_current(context)
    try:
        yield
    finally:
        data.DataContext._set_current(before)
