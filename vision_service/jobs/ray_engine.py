"""The predictor on a Ray cluster: files are read and decoded by tasks on any core, actors hold the models.

    items ──► decode: tasks, a core each ──► predict: a pool of actors, models loaded once each ──► write: parts

Ray Data streams: how much is decoded and waits is bounded by the object store, and what a lost node had is made again.
What an outcome says is the same as `Predictor` in one process says, to the byte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
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
from vision_service.jobs.ray_stages import Decode, Write, pack, unpack
from vision_service.types import ParamOverrides

PART_IMAGES = 256
"""Images of a part."""

BLOCK_ITEMS = 16
"""Items of a block: what a task decodes, and about what is done again when a node is lost."""

DECODING_BYTES = 512 * 1024 * 1024
"""What Ray sets aside for a task that decodes. It also keeps Ray from fusing decoding into the actors, which have other
work to do: it does so where two steps ask for the same."""


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How many actors hold the models, and how large they are.

    Attributes:
        actors: at most so many.
        cpus: of an actor: what Ray sets aside for it, and on a CPU how many copies of the models it runs side by side.
        gpus: of an actor; a share of one is allowed.

    Raises:
        ConfigError: a value is out of its range.
    """

    actors: int = 2
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.actors < 1 or self.cpus <= 0 or self.gpus < 0:
            raise ConfigError("Ray needs at least one actor, with more than 0 CPUs and no fewer than 0 GPUs")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a predictor is made on a node: everything but the files, which the node has or fetches.

    Attributes:
        settings: fields of `ServerSettings`; the node's environment gives the others.
        overrides: what the calls choose.
        batch_size: most images in one forward pass.
        workers: copies of the models that run side by side.
    """

    settings: dict[str, Any]
    overrides: ParamOverrides
    batch_size: int
    workers: int

    def make(self) -> Predictor:
        """Load the models here.

        Raises:
            VisionError: one is unknown here, or cannot be loaded.
        """
        settings = ServerSettings.read(**self.settings)
        specs = resolve_specs(settings)
        pull_missing(specs, settings)
        return Predictor(specs, self.overrides, settings=settings, workers=self.workers, batch_size=self.batch_size)


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
        self._limits = DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
        own = settings.model_dump(mode="json", exclude_unset=True, exclude={"host", "port"})
        workers = 1 if self._options.gpus else max(1, round(self._options.cpus))
        self._recipe = Recipe(own, overrides or ParamOverrides(), batch_size, workers)

    def fingerprint(self) -> str:
        """`Predictor.fingerprint`, of a predictor on the cluster: runtime and precision may be others there."""
        ask = self._ray.remote(num_cpus=self._options.cpus, num_gpus=self._options.gpus)(_fingerprint)
        return str(self._ray.get(ask.remote(self._recipe)))

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """What becomes of images, in their order.

        Args:
            items: all are listed before the first is worked on.

        Raises:
            VisionError: the predictor cannot be made on a node.
        """
        return self._run(items, lambda found: found)

    def write(self, items: Iterable[Item], parts: Parts, part_images: int = PART_IMAGES) -> Iterator[Written]:
        """Predict images and write parts, on the nodes.

        Args:
            items: see `outcomes`.
            parts: where to.
            part_images: images of a part; no more is lost by a writer's end.

        Returns:
            The parts, as they are written, in the order of the images.

        Raises:
            VisionError: the predictor cannot be made on a node.
        """
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
        with _settings_of(data):
            found = (
                data.from_arrow_refs(blocks)
                .map_batches(
                    Decode(self._limits),
                    batch_size=None,
                    batch_format="pyarrow",
                    num_cpus=1,
                    memory=DECODING_BYTES,
                )
                .map_batches(
                    _Predict,
                    fn_constructor_args=(self._recipe,),
                    compute=data.ActorPoolStrategy(min_size=1, max_size=self._options.actors),
                    num_cpus=self._options.cpus,
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

    def _outcome(self, one: Item | Outcome) -> Outcome:
        if isinstance(one, Outcome):
            return one
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
