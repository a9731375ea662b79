"""`vision-service predict`: models in this process over files, folders, lists, videos and buckets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vision_service.cli import job, options
from vision_service.cli.predict_ray import ActorChoices, check_output, predict_on_ray
from vision_service.errors import ConfigError

if TYPE_CHECKING:
    from vision_service.config import ModelSpec


def predict(
    source: job.Sources = None,
    task: Annotated[options.TaskWord | None, typer.Option(help="What to do, with the model that ships for it.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to run; repeat for several.")] = None,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest of further models; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    runtime: options.Runtime = None,
    precision: options.Precision = None,
    calibration_folder: options.CalibrationFolder = None,
    list_file: job.ListFile = None,
    every: job.Every = None,
    every_s: job.EverySeconds = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for results.jsonl, failures.jsonl and what --save names; with Ray, or a URL."),
    ] = None,
    save: job.Save = None,
    coco_ids: job.CocoIds = None,
    timings: job.Timings = False,
    restart: job.Restart = False,
    retry_failures: job.Retry = False,
    max_failures: job.MaxFailures = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Copies of the models side by side; 0: one a core, or one on a GPU.")
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Most images in one forward pass; above 1, last digits depend on neighbours.")
    ] = 1,
    top_k: options.TopK = None,
    score_threshold: options.ScoreThreshold = None,
    iou_threshold: options.IouThreshold = None,
    max_detections: options.MaxDetections = None,
    classes: options.Classes = None,
    as_json: options.AsJson = False,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    worker_gpus: Annotated[
        float | None, typer.Option(help="ray: GPUs of each copy of the models, or a share of one; 0.")
    ] = None,
) -> None:
    """Run models over images in this process; no server is needed.

    With --output, a job that was stopped goes on when the same command runs again. An image that fails is listed with
    its reason and does not stop the others; the exit code is then 1.
    """
    from vision_service.cli.progress import Downloads
    from vision_service.config.settings import ServerSettings
    from vision_service.engine.build import pull_missing, resolve_specs
    from vision_service.jobs.outputs.kinds import Model
    from vision_service.jobs.predictor import Predictor
    from vision_service.jobs.sources import is_url

    specs = _specs(task, model or [], manifest or [])
    overrides = options.read_overrides(
        [spec.task for spec in specs.values()],
        top_k=top_k,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        classes=classes,
    )
    for spec in specs.values():  # a class that a model does not have shows now, not once it is loaded
        overrides.resolve(spec.params, spec.classes)
    choices = job.Choices(
        source,
        list_file,
        every,
        every_s,
        check_output(engine, output),
        save,
        coco_ids,
        timings,
        restart,
        retry_failures,
        max_failures,
        as_json,
        elsewhere=output is not None and is_url(output),
    )
    models = [Model(spec.name, spec.version, spec.task, spec.classes) for spec in specs.values()]
    options.check_engine(engine, {"ray_address": ray_address, "worker_gpus": worker_gpus})
    choices.check(models)
    chosen: dict[str, Any] = {
        name: value
        for name, value in (
            ("runtime", runtime),
            ("precision", precision),
            ("calibration_folder", calibration_folder),
        )
        if value is not None
    }
    settings = ServerSettings.read(models=tuple(specs), device=device, manifests=tuple(manifest or ()), **chosen)
    if engine == "ray" and output is not None:
        predict_on_ray(
            choices, output, settings, overrides, models, ActorChoices(ray_address, workers, batch, worker_gpus)
        )
        return
    resolved = resolve_specs(settings)
    with Downloads() as watcher:
        pull_missing(resolved, settings, watcher)
    with Predictor(resolved, overrides, settings=settings, workers=workers, batch_size=batch) as predictor:
        job.carry_out(choices, predictor, predictor.fingerprint, models, predictor.limits)


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
