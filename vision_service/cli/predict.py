"""`vision-service predict`: models in this process over files and folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vision_service.cli import options
from vision_service.errors import ConfigError

if TYPE_CHECKING:
    from vision_service.config import ModelSpec


def predict(
    images: options.Images,
    task: Annotated[options.TaskWord | None, typer.Option(help="What to do, with the model that ships for it.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to run; repeat for several.")] = None,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest of further models; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    runtime: options.Runtime = None,
    precision: options.Precision = None,
    output: options.Output = None,
    top_k: options.TopK = None,
    score_threshold: options.ScoreThreshold = None,
    iou_threshold: options.IouThreshold = None,
    max_detections: options.MaxDetections = None,
    classes: options.Classes = None,
    as_json: options.AsJson = False,
) -> None:
    """Run models over images in this process; no server is needed.

    An image that fails is listed at the end, with its reason, and does not stop the others; the exit code is then 1.
    """
    from vision_service.cli.files import find_images
    from vision_service.cli.progress import Downloads
    from vision_service.cli.sink import ResultSink
    from vision_service.config.settings import ServerSettings
    from vision_service.engine.build import local_pipeline, pull_missing

    specs = _specs(task, model or [], manifest or [])
    overrides = options.read_overrides(
        [spec.task for spec in specs.values()],
        top_k=top_k,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        classes=classes,
    )
    for spec in specs.values():  # a class that a model does not have shows now, not once an image
        overrides.resolve(spec.params, spec.classes)
    files = find_images(images)
    with Downloads() as watcher:
        pull_missing(list(specs.values()), ServerSettings.read(), watcher)
    with (
        local_pipeline(
            list(specs),
            device=device,
            runtime=runtime,
            precision=precision,
            manifests=manifest or [],
        ) as pipeline,
        ResultSink(output, as_json=as_json, total=len(files) * len(specs)) as sink,
    ):
        for spec in specs.values():
            outcomes = pipeline.predict_many(
                (file.path for file in files),
                task=spec.task,
                model=spec.name,
                version=spec.version,
                overrides=overrides,
            )
            for file, outcome in zip(files, outcomes, strict=True):
                sink.add(file, outcome, spec.name)


def _specs(task: str | None, names: list[str], manifests: list[Path]) -> dict[str, ModelSpec]:
    """The models that are meant, by the names that mean them."""
    from vision_service.config.settings import EMBEDDED_MODELS
    from vision_service.weights.manifest import find_model

    if names:
        specs = {name: find_model(name, manifests) for name in names}
        for spec in specs.values():
            if task is not None and spec.task != task:
                raise ConfigError(f"{spec.name} is a model for {spec.task}, not for {task}; leave --task out")
        return specs
    if task is None:
        raise ConfigError("say what to do: --task classify, detect, segment or translate, or --model NAME")
    return {name: spec for name in EMBEDDED_MODELS if (spec := find_model(name, manifests)).task == task}
