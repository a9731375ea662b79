"""A server's model over image after image, as `Predictor` does it in process."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from vision_service.client import VisionClient
from vision_service.errors import InvalidImage, ModelNotFound, QueueFull, VisionError
from vision_service.imaging.decode import DecodeLimits, decode_image
from vision_service.jobs.items import Failure, Item, Outcome
from vision_service.jobs.predictor import digest
from vision_service.jobs.reading import read_item
from vision_service.model_info import ModelInfo
from vision_service.types import ParamOverrides, Task

_PATIENCE_S = 600.0
"""How long an image is offered to a server that is full, seconds. The client itself gives up after a few times, because
somebody waits for its answer; nobody does for one of a job's."""

_DECIDES = ("name", "version", "task", "backend", "runtime", "precision", "source", "class_names", "preprocess_json")
"""What of a served model decides answers. The rest is measured anew at each start of a server, or is of the moment."""


class ServedModel:
    """Asks a server. Threads may share it.

    A server joins images into batches, and networks round differently in batches of different sizes: the last digits
    of records may differ from run to run.

    Args:
        client: of the server.
        task: what is wanted.
        model: which model; empty: the server's default.
        version: of that model; empty: the newest.
        overrides: what calls choose.
        in_flight: calls under way at once.
        limits: of images.
    """

    def __init__(
        self,
        client: VisionClient,
        task: Task,
        *,
        model: str = "",
        version: str = "",
        overrides: ParamOverrides | None = None,
        in_flight: int = 8,
        limits: DecodeLimits | None = None,
    ) -> None:
        self._client = client
        self._method: Any = getattr(client, task)
        self._model, self._version = model, version
        self._overrides = overrides or ParamOverrides()
        self._chosen = self._overrides.chosen()
        self.task = task
        self.limits = limits or DecodeLimits()
        self.in_flight = in_flight

    def pin(self) -> ModelInfo:
        """Which model answers, from now on it and no other: a job must not change models on its way.

        Raises:
            ModelNotFound: the server has no such model.
            VisionError: it cannot be asked.
        """
        name = self._model
        if not name:
            served = self._client.list_models(self.task)
            name = next((model.name for model in served if model.is_default), "")
            if not name:
                raise ModelNotFound(f"{self._client.address} has no model for {self.task}")
        info = self._client.get_model(name, self._version)
        self._model, self._version = info.name, info.version
        return info

    def fingerprint(self, info: ModelInfo) -> str:
        """Stands for everything but the image that decides what records say: hex digits."""
        return digest([[getattr(info, name) for name in _DECIDES], asdict(self._overrides)])

    def predict(self, item: Item, *, keep_image: bool = False) -> Outcome:
        """One image; what goes wrong is in the outcome.

        Args:
            item: which image.
            keep_image: leave the decoded image in the outcome.
        """
        if item.is_video:
            return Outcome(item, failures=(Failure(InvalidImage(f"{item.file} cannot be read as a video")),))
        try:
            content = read_item(item, self.limits) if item.pixels is None else item.pixels
            result = self._ask(content)
            image = None
            if keep_image:
                image = decode_image(content, self.limits) if isinstance(content, bytes) else content
        except OSError as error:
            return Outcome(item, failures=(Failure.unreadable(item.file, error, self._model),))
        except VisionError as error:
            return Outcome(item, failures=(Failure.of(error, self._model),))
        return Outcome(item, (result,), (), image)

    def _ask(self, content: Any) -> Any:
        """The server's result; while it is full, again and again. Errors as the client's."""
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._method(content, model=self._model, version=self._version, **self._chosen)
            except QueueFull as error:
                if time.monotonic() >= until_s:
                    raise
                time.sleep(min(error.retry_after_s, 1.0))
