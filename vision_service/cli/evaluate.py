"""`vision-service evaluate`: figures of a model on a dataset, and what changed between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vision_service.cli import options
from vision_service.cli.failures import WORK_FAILED, asking
from vision_service.errors import ConfigError, InvalidInput

if TYPE_CHECKING:
    from vision_service.evaluation.evaluate import Evaluation
    from vision_service.evaluation.predictors import Predictor
    from vision_service.evaluation.tables import Table

_MOST_ROWS = 30
_OF_COMPARE = {"compare", "resamples", "seed", "report", "html", "pictures"}
_LIBRARIES = ("torchmetrics", "matplotlib", "jinja2", "yaml", "timm")


def evaluate(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model: its name here, or on the server of --address.")] = None,
    dataset: Annotated[Path | None, typer.Argument(help="Folder or file of the dataset.")] = None,
    format: Annotated[
        Literal["coco", "voc", "yolo", "masks", "class-folders", "csv", "file-names"] | None,
        typer.Option(help="How the dataset is written; else by what is there."),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the dataset, by its name there, such as val.")] = "",
    classes: Annotated[Path | None, typer.Option(help="Names of the class ids in masks, one a line.")] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="Model's class to dataset's class (TOML, JSON or CSV).")
    ] = None,
    unmapped: Annotated[
        Literal["ignore", "count"] | None, typer.Option(help="What to do with classes that only the model has.")
    ] = None,
    score_threshold: Annotated[
        float | None, typer.Option(help="detect: lowest score, 0.01 unless given; segment: the model's own.")
    ] = None,
    iou_threshold: options.IouThreshold = None,
    max_detections: Annotated[int | None, typer.Option(help="detect: most boxes an image, 100 unless given.")] = None,
    difficult: Annotated[
        Literal["ignore", "count"] | None, typer.Option(help="detect: difficult objects (VOC) and crowds (COCO).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many images only.")] = None,
    max_failures: Annotated[int | None, typer.Option(min=0, help="Stop once more images than this failed.")] = None,
    address: Annotated[str, typer.Option(help="host:port of a server that has the model; else in this process.")] = "",
    version: Annotated[str, typer.Option(help="--address: version of the model; else the newest.")] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="--address: calls under way at once.")] = 8,
    stream: Annotated[
        bool, typer.Option("--stream", help="--address: images as requests on one stream, not a call each: costs less.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="--address: seconds for a call, retries included.")] = 30.0,
    manifest: options.Manifests = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most images in one pass; above 1, last digits may differ from run to run.")
    ] = 1,
    report: Annotated[Path | None, typer.Option(help="Write everything to this JSON file.", dir_okay=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and pictures.", dir_okay=False)] = None,
    pictures: Annotated[int, typer.Option(min=0, help="--html: images shown on the page, worst first.")] = 12,
    save_coco: Annotated[
        Path | None,
        typer.Option(help="detect: folder for annotations.json and predictions.json, as scored.", file_okay=False),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two reports: what changed from the first to the second.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="--compare: of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="--compare: of the bootstrap.")] = 0,
) -> None:
    """Evaluate a model on a dataset, in this process or through a server, or compare two reports.

    Images that cannot be read are listed, no figure counts them, and the exit code is then 1.
    """
    _need_extra()
    given = {name for name in context.params if _was_typed(context, name)}
    if html is None:
        _refuse(given, {"pictures"}, "it is for --html")
    if compare is not None:
        _refuse(given, context.params.keys() - _OF_COMPARE, "--compare takes two reports and no model or dataset")
        _compare(compare, resamples=resamples, seed=seed, report=report, html=html, pictures=pictures)
        return
    _refuse(given, {"resamples", "seed"}, "it is for --compare")
    if model is None or dataset is None:
        raise ConfigError("say which MODEL on which DATASET, or --compare A.json B.json")
    if address:
        _refuse(given, {"manifest", "device", "batch_size"}, "with --address the model runs on the server")
        answering = _remote(address, model, version, concurrency=concurrency, timeout_s=timeout, stream=stream)
    else:
        _refuse(given, {"version", "concurrency", "stream", "timeout"}, "it is for --address")
        answering = _local(model, manifest or [], device, batch_size)

    from vision_service.evaluation.evaluate import Options
    from vision_service.evaluation.evaluate import evaluate as evaluate_model

    chosen = Options(
        format=format or "",
        split=split,
        classes=classes,
        map_file=map_file,
        unmapped=unmapped,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        difficult=difficult,
        limit=limit,
        max_failures=max_failures,
    )
    with answering as predictor, _progress() as (started, watch):
        if save_coco is not None and predictor.facts.task != "detect":
            raise InvalidInput("save_coco", f"has no effect on {predictor.facts.task}, only on detect")
        done = evaluate_model(predictor, dataset, chosen, started=started, watch=watch)
    _save(done, report, html, pictures, save_coco)  # first: whoever reads what is printed may hang up
    _print(done)
    _say_written(report, html, save_coco)
    if done.report.failures:
        raise typer.Exit(WORK_FAILED)


def _print(done: Evaluation) -> None:
    from vision_service.evaluation.tables import by_class, class_notes, overall

    _print_table(overall(done.report))
    _print_table(by_class(done.report, most=_MOST_ROWS))
    for line in [*class_notes(done.report), *done.report.notes]:
        typer.echo(f"note: {line}")
    failures = done.report.failures
    if failures:
        typer.echo(f"{len(failures)} images failed, and no figure counts them:", err=True)
    for failure in failures:
        typer.echo(f"  {failure['image']}: {failure['message']}", err=True)


def _save(done: Evaluation, report: Path | None, html: Path | None, pictures: int, coco: Path | None) -> None:
    from vision_service.evaluation.report import write_text

    if report is not None:
        done.report.write(report)
    if coco is not None:
        from vision_service.evaluation.detect import DetectionScorer

        assert isinstance(done.scorer, DetectionScorer), "checked before the run"
        done.scorer.write_coco(coco)
    if html is not None:
        from vision_service.evaluation.page import report_page

        write_text(html, report_page(done.report, done.dataset, pictures))


def _say_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            typer.echo(f"wrote {path}")


def _compare(
    paths: tuple[Path, Path], *, resamples: int, seed: int, report: Path | None, html: Path | None, pictures: int
) -> None:
    from vision_service.evaluation.compare import compare_reports
    from vision_service.evaluation.report import Report, write_text
    from vision_service.evaluation.tables import changed_classes, changed_images, differences

    one, other = (Report.read(path) for path in paths)
    found = compare_reports(one, other, resamples=resamples, seed=seed)
    if report is not None:
        found.write(report)
    if html is not None:
        from vision_service.evaluation.page import comparison_page

        write_text(html, comparison_page(found, one, other, (str(paths[0]), str(paths[1])), pictures))
    _print_table(differences(found, str(paths[0]), str(paths[1])))
    _print_table(changed_classes(found, _MOST_ROWS))
    _print_table(changed_images(found, _MOST_ROWS))
    for line in found.notes:
        typer.echo(f"note: {line}")
    _say_written(report, html)


def _print_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    if not table.rows:
        return
    shown = RichTable()
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge to wrap at
    console.print(table.title)
    console.print(shown)


@contextmanager
def _local(model: str, manifests: list[Path], device: str, batch_size: int) -> Iterator[Predictor]:
    from vision_service.cli.progress import Downloads
    from vision_service.config.settings import ServerSettings
    from vision_service.engine.build import build_pipeline, pull_missing, replace_fields, resolve_specs
    from vision_service.evaluation.predictors import LocalPredictor

    settings = ServerSettings.read(models=(model,), device=device, manifests=tuple(manifests))
    (spec,) = resolve_specs(settings)
    spec = replace_fields(spec, {"batching": {"max_batch_size": batch_size}})
    with Downloads() as watcher:
        pull_missing([spec], settings, watcher)
    with build_pipeline(settings, [spec]) as pipeline:
        pipeline.catalog.load(spec)
        yield LocalPredictor(pipeline, spec)


@contextmanager
def _remote(
    address: str, model: str, version: str, *, concurrency: int, timeout_s: float, stream: bool
) -> Iterator[Predictor]:
    from vision_service.client import VisionClient
    from vision_service.evaluation.predictors import RemotePredictor

    with VisionClient(address, timeout_s=timeout_s, stream=stream) as client:
        with asking(address):
            predictor = RemotePredictor(client, model, version, concurrency=concurrency)
        yield predictor


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[[object], None]]]:
    """Two functions that move a bar on stderr: one is told how many images there are, one after each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task("images", total=None)
        yield lambda total: bars.update(bar, total=total), lambda _: bars.advance(bar)


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"  # by name: typer may bring a click of its own


def _refuse(given: set[str], names: Iterable[str], why: str) -> None:
    for name in sorted(given & set(names)):
        raise InvalidInput(name, f"has no effect here: {why}")


def _need_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"evaluating needs {', '.join(missing)}: pip install 'vision-service[evaluate]'")
