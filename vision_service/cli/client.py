"""`vision-service client`: a server's models over files and folders."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vision_service.cli import options
from vision_service.errors import VisionError

if TYPE_CHECKING:
    from vision_service.cli.files import ImageFile

Address = Annotated[str, typer.Option(help="host:port of the server.")]


def client(
    task: Annotated[options.TaskWord, typer.Argument(help="What to do.")],
    images: options.Images,
    address: Address = "localhost:50051",
    model: Annotated[str, typer.Option(help="Model to ask; else the server's default.")] = "",
    version: Annotated[str, typer.Option(help="Version of that model; else the newest.")] = "",
    output: options.Output = None,
    top_k: options.TopK = None,
    score_threshold: options.ScoreThreshold = None,
    iou_threshold: options.IouThreshold = None,
    max_detections: options.MaxDetections = None,
    classes: options.Classes = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls under way at once.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds for a call, retries included.")] = 30.0,
    as_json: options.AsJson = False,
) -> None:
    """Send images to a server.

    An image that fails is listed at the end, with its reason, and does not stop the others; the exit code is then 1.
    """
    from vision_service.cli.files import find_images
    from vision_service.cli.sink import ResultSink
    from vision_service.client import VisionClient
    from vision_service.types import Task

    overrides = options.read_overrides(
        [Task(task)],
        top_k=top_k,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        classes=classes,
    )
    files = find_images(images)
    with (
        VisionClient(address, timeout_s=timeout) as server,
        ResultSink(output, as_json=as_json, total=len(files)) as sink,
    ):
        method = getattr(server, task)

        def call(file: ImageFile) -> Any:
            try:
                return method(file.path, model=model, version=version, **options.chosen(overrides))
            except VisionError as error:
                return error

        for file, outcome in _in_order(call, files, concurrency):
            sink.add(file, outcome, model)


def _in_order(
    call: Callable[[ImageFile], Any], files: list[ImageFile], concurrency: int
) -> Iterator[tuple[ImageFile, Any]]:
    """Outcomes in the order of the files; few enough under way that memory stays bounded."""
    flying: deque[tuple[ImageFile, Future[Any]]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        for file in files:
            if len(flying) >= 2 * concurrency:
                first, outcome = flying.popleft()
                yield first, outcome.result()
            flying.append((file, pool.submit(call, file)))
        for file, outcome in flying:
            yield file, outcome.result()
