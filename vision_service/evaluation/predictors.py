"""Who answers: models in this process, or a server. Both take images in order and keep memory bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from vision_service.client import VisionClient
from vision_service.config import ModelSpec
from vision_service.engine.pipeline import Pipeline
from vision_service.errors import VisionError
from vision_service.imaging.source import ImageInput
from vision_service.jobs.predictor import in_order
from vision_service.types import ParamOverrides, Result, Task


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a report says of the model.

    Attributes:
        name: what requests say.
        version: of it.
        task: what it does.
        class_names: the index is the class id.
        where: it ran: device, runtime and so on, for people.
    """

    name: str
    version: str
    task: Task
    class_names: tuple[str, ...]
    where: dict[str, str]


class Predictor(Protocol):
    """Answers images."""

    @property
    def facts(self) -> ModelFacts:
        """About the model."""
        ...

    def predict_many(
        self, images: Iterable[ImageInput], overrides: ParamOverrides
    ) -> Iterator[Result[Any] | VisionError]:
        """A result or the image's error for each, in order."""
        ...


class LocalPredictor:
    """A model of a pipeline in this process."""

    def __init__(self, pipeline: Pipeline, spec: ModelSpec) -> None:
        self._pipeline = pipeline
        info = pipeline.catalog.get(spec.task, spec.name, spec.version).info(is_default=False)
        where = {"device": info.device, "runtime": info.runtime, "precision": info.precision}
        self.facts = ModelFacts(spec.name, spec.version, spec.task, spec.classes, where)

    def predict_many(
        self, images: Iterable[ImageInput], overrides: ParamOverrides
    ) -> Iterator[Result[Any] | VisionError]:
        """See `Predictor`."""
        facts = self.facts
        return self._pipeline.predict_many(
            images, task=facts.task, model=facts.name, version=facts.version, overrides=overrides
        )


class RemotePredictor:
    """A model of a server.

    Args:
        client: connected to it.
        model: its name there.
        version: of it; empty: the newest.
        concurrency: calls under way at once.

    Raises:
        ModelNotFound: lists what exists.
    """

    def __init__(self, client: VisionClient, model: str, version: str = "", *, concurrency: int = 8) -> None:
        self._client = client
        self._concurrency = concurrency
        info = client.get_model(model, version)
        where = {"address": client.address, "device": info.device, "runtime": info.runtime, "precision": info.precision}
        self.facts = ModelFacts(info.name, info.version, info.task, info.class_names, where)

    def predict_many(
        self, images: Iterable[ImageInput], overrides: ParamOverrides
    ) -> Iterator[Result[Any] | VisionError]:
        """See `Predictor`."""
        method = getattr(self._client, self.facts.task)
        chosen = overrides.chosen()

        def call(image: ImageInput) -> Result[Any] | VisionError:
            try:
                result: Result[Any] = method(image, model=self.facts.name, version=self.facts.version, **chosen)
            except VisionError as error:
                return error
            return result

        return in_order(call, images, self._concurrency)
