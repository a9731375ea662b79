"""Models in this process, loaded once, over image after image.

What an image's records say depends on the image, the models and the parameters alone, to the last digit: not on its
neighbours, the number of workers, or where a job was cut in two. Networks round differently in batches of different
sizes, sometimes in different rows of one, and with different numbers of threads. So each image is a batch of its own
unless ``batch_size`` says otherwise, and on a CPU each worker is a copy of the models with one thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar

from vision_service.config import ModelSpec
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, replace_fields
from vision_service.engine.loaded import pick_device
from vision_service.engine.pipeline import Pipeline
from vision_service.engine.threads import usable_cores
from vision_service.errors import ConfigError, InvalidImage, VisionError
from vision_service.imaging.decode import DecodeLimits, decode_image
from vision_service.jobs.items import Failure, Item, Outcome
from vision_service.jobs.reading import read_item
from vision_service.types import ParamOverrides, Prediction, Result, UInt8Array

T = TypeVar("T")
R = TypeVar("R")


class Predictor:
    """Several models over the same decoded image. Threads may share one; close it, or use it in a ``with``.

    Args:
        specs: the models, their weights at hand (`engine.build.resolve_specs` and ``pull_missing``).
        overrides: what the calls choose.
        settings: limits of the process; ``None``: as the environment says. Its ``runtime_threads`` are each worker's,
            one if it names none.
        workers: copies of the models that run side by side; 0: as many as there are usable cores, one on a GPU.
        batch_size: most images in one forward pass. Above 1 the last digits may depend on an image's neighbours.

    Raises:
        ConfigError: no model, two of one name and version, or one cannot be loaded.
        InvalidInput: a choice does not fit a model.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        overrides: ParamOverrides | None = None,
        *,
        settings: ServerSettings | None = None,
        workers: int = 0,
        batch_size: int = 1,
    ) -> None:
        settings = settings or ServerSettings.read()
        self.overrides = overrides or ParamOverrides()
        labels = [f"{spec.name}@{spec.version}" for spec in specs]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"need at least one model and each once, got {', '.join(labels) or 'none'}")
        for spec in specs:
            self.overrides.resolve(spec.params, spec.classes)
        self.specs = tuple(replace_fields(spec, {"batching": {"max_batch_size": batch_size}}) for spec in specs)
        self.limits = DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
        settings = settings.model_copy(update={"compute_nice": 0})  # there is nobody to talk to
        on_gpu = any(pick_device(spec.device).type == "cuda" for spec in specs)
        cores = usable_cores()
        self.workers = workers or (1 if on_gpu else cores)
        if not on_gpu:
            # The number of threads decides how sums are split, and so their last digits: it must not be the machine's.
            threads = {
                "runtime_threads": settings.runtime_threads or 1,
                "decode_workers": settings.decode_workers or 1,
                "forward_passes": 1,  # a worker has one batch at a time
            }
            settings = settings.model_copy(update=threads)
        self._threads = settings.runtime_threads
        self._decoding = threading.Semaphore(cores)
        self.in_flight = cores + self.workers * (1 + batch_size)
        self._lock = threading.Lock()
        self._busy: dict[Pipeline, int] = {}
        try:
            for _ in range(self.workers):
                pipeline = build_pipeline(settings, self.specs)
                self._busy[pipeline] = 0
                for spec in self.specs:
                    pipeline.catalog.load(spec)
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        """Stands for everything but the image that decides what records say: hex digits."""
        catalog = next(iter(self._busy)).catalog
        models = []
        for spec in self.specs:
            host = catalog.get(spec.task, spec.name, spec.version).info(is_default=False)
            models.append([identity_of(spec), host.runtime, host.precision, host.device.partition(":")[0]])
        batch = self.specs[0].batching.max_batch_size
        return digest([models, asdict(self.overrides), asdict(self.limits), batch, self._threads])

    def predict(self, item: Item, data: bytes | None = None, *, keep_image: bool = False) -> Outcome:
        """One image, start to end; what goes wrong with it is in the outcome.

        Args:
            item: which image.
            data: content of its file; ``None``: it is read.
            keep_image: leave the decoded image in the outcome.
        """
        if item.is_video:
            return Outcome(item, failures=(Failure(InvalidImage(f"{item.file} cannot be read as a video")),))
        try:
            content = item.pixels if item.pixels is not None else read_item(item, self.limits) if data is None else data
        except OSError as error:
            return Outcome(item, failures=(Failure.unreadable(item.file, error),))
        except VisionError as error:
            return Outcome(item, failures=(Failure(error),))
        if isinstance(content, bytes) and len(self.specs) == 1:
            # The pipeline decodes a large JPEG no larger than its one model needs; drawing wants all of it.
            outcome = self._predict(item, content, None)
            return replace(outcome, image=self._decode(content)) if keep_image and outcome.results else outcome
        started_s = time.perf_counter()
        try:
            image = self._decode(content) if isinstance(content, bytes) else content
        except VisionError as error:
            return Outcome(item, failures=(Failure(error),))
        outcome = self._predict(item, image, 1000 * (time.perf_counter() - started_s))
        return replace(outcome, image=image) if keep_image else outcome

    def predict_many(self, images: Iterable[tuple[str, bytes]]) -> Iterator[Outcome]:
        """Many images whose files somebody else has read: one outcome each, in their order.

        Args:
            images: what results call it, and the content of its file.
        """
        pairs = ((Item(file, PurePosixPath(Path(file).name), len(data)), data) for file, data in images)
        return in_order(lambda pair: self.predict(*pair), pairs, self.in_flight)

    def close(self) -> None:
        """Free the models."""
        for pipeline in self._busy:
            pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, content: bytes) -> UInt8Array:
        with self._decoding:
            return decode_image(content, self.limits)

    def _predict(self, item: Item, image: UInt8Array | bytes, decode_ms: float | None) -> Outcome:
        """Every model's answer, or its failure.

        Args:
            item: which image.
            image: its pixels, or its file for the pipeline to decode.
            decode_ms: what decoding took; ``None``: the pipeline measures it.
        """
        results: list[Result[Prediction]] = []
        failures: list[Failure] = []
        with self._least_busy() as pipeline:
            under_way = [
                (
                    spec,
                    pipeline.submit_patiently(
                        image, task=spec.task, model=spec.name, version=spec.version, overrides=self.overrides
                    ),
                )
                for spec in self.specs
            ]
            for spec, future in under_way:
                try:
                    result = future.result()
                except VisionError as error:
                    unusable = isinstance(error, InvalidImage) and decode_ms is None
                    failures.append(Failure.of(error, "" if unusable else spec.name))
                else:
                    timings = result.timings if decode_ms is None else replace(result.timings, decode_ms=decode_ms)
                    results.append(replace(result, timings=timings))
        return Outcome(item, tuple(results), tuple(failures))

    @contextmanager
    def _least_busy(self) -> Iterator[Pipeline]:
        with self._lock:
            pipeline = min(self._busy, key=self._busy.__getitem__)
            self._busy[pipeline] += 1
        try:
            yield pipeline
        finally:
            with self._lock:
                self._busy[pipeline] -= 1


def in_order(work: Callable[[T], R], items: Iterable[T], in_flight: int) -> Iterator[R]:
    """What becomes of items, in their order; so few are under way that memory stays bounded.

    Args:
        work: done on threads; must not raise.
        items: read as places become free.
        in_flight: how many are worked on at once; as many more may be done and wait for one before them.
    """
    flying: deque[Future[R]] = deque()
    with ThreadPoolExecutor(in_flight, thread_name_prefix="job") as pool:
        try:
            for item in items:
                if len(flying) >= 2 * in_flight:
                    yield flying.popleft().result()
                flying.append(pool.submit(work, item))
            while flying:
                yield flying.popleft().result()
        finally:  # whoever reads has had enough, or an item could not be listed
            for future in flying:
                future.cancel()


def identity_of(spec: ModelSpec) -> dict[str, Any]:
    """What of a spec decides answers: not where its files lie, how calls wait, or which device was asked for."""
    fields = spec.model_dump(mode="json", exclude={"weights", "batching", "device", "runtime", "precision", "trusted"})
    if spec.weights is not None:
        fields["weights"] = [_content_of(file.file, file.sha256) for file in (spec.weights, *spec.weights.companions)]
    return fields


def digest(values: Any) -> str:
    """Hex digits that stand for plain values; the order of keys and of sets means nothing."""
    text = json.dumps(values, sort_keys=True, default=lambda value: sorted(value))
    return hashlib.sha256(text.encode()).hexdigest()


def _content_of(file: str, sha256: str) -> Any:
    if sha256 or not Path(file).is_file():
        return sha256 or file
    status = os.stat(file)  # noqa: PTH116 - one call for both
    return [file, status.st_size, status.st_mtime_ns]
