"""`vision-service client`: a server's models over files, folders, lists, videos and buckets."""

from __future__ import annotations

from typing import Annotated

import typer

from vision_service.cli import job, options
from vision_service.cli.failures import asking

Address = Annotated[str, typer.Option(help="host:port of the server.")]


def client(
    task: Annotated[options.TaskWord, typer.Argument(help="What to do.")],
    source: job.Sources = None,
    address: Address = "localhost:50051",
    model: Annotated[str, typer.Option(help="Model to ask; else the server's default.")] = "",
    version: Annotated[str, typer.Option(help="Version of that model; else the newest.")] = "",
    list_file: job.ListFile = None,
    every: job.Every = None,
    every_s: job.EverySeconds = None,
    output: job.Output = None,
    save: job.Save = None,
    coco_ids: job.CocoIds = None,
    timings: job.Timings = False,
    restart: job.Restart = False,
    retry_failures: job.Retry = False,
    max_failures: job.MaxFailures = None,
    top_k: options.TopK = None,
    score_threshold: options.ScoreThreshold = None,
    iou_threshold: options.IouThreshold = None,
    max_detections: options.MaxDetections = None,
    classes: options.Classes = None,
    in_flight: Annotated[
        int, typer.Option("--in-flight", "--concurrency", min=1, help="Calls under way at once.")
    ] = 16,
    stream: options.Stream = False,
    timeout: Annotated[float, typer.Option(help="Seconds for a call, retries included.")] = 30.0,
    as_json: options.AsJson = False,
) -> None:
    """Send images to a server.

    With --output, a job that was stopped goes on when the same command runs again. An image that fails is listed with
    its reason and does not stop the others; the exit code is then 1.
    """
    from vision_service.client import VisionClient
    from vision_service.config.settings import ServerSettings
    from vision_service.imaging.decode import DecodeLimits
    from vision_service.jobs.outputs.kinds import Model
    from vision_service.jobs.served import ServedModel
    from vision_service.types import Params, Task

    overrides = options.read_overrides(
        [Task(task)],
        top_k=top_k,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        classes=classes,
    )
    choices = job.Choices(
        source,
        list_file,
        every,
        every_s,
        output,
        save,
        coco_ids,
        timings,
        restart,
        retry_failures,
        max_failures,
        as_json,
    )
    choices.check([Model(model, version, Task(task), ())])
    settings = ServerSettings.read()
    limits = DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    with VisionClient(address, timeout_s=timeout, stream=stream) as server:
        served = ServedModel(
            server, Task(task), model=model, version=version, overrides=overrides, in_flight=in_flight, limits=limits
        )
        with asking(address):
            info = served.pin()
        overrides.resolve(Params(), info.class_names)  # a class that it does not have shows now, not image by image
        models = [Model(info.name, info.version, info.task, info.class_names)]
        job.carry_out(choices, served, served.fingerprint(info), models, limits)
