"""Where the results of a command go: stdout, a folder, a progress bar on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from vision_service.cli.failures import WORK_FAILED
from vision_service.cli.files import ImageFile, PictureNames
from vision_service.cli.output import to_line
from vision_service.errors import VisionError
from vision_service.imaging.decode import decode_image
from vision_service.imaging.draw import annotate
from vision_service.imaging.encode import encode_image
from vision_service.records import error_to_record, to_record
from vision_service.types import Prediction, Result, TranslatedImage


class ResultSink:
    """Takes outcomes one by one. stdout has results and nothing else.

    Args:
        output: folder for pictures, ``results.jsonl`` and ``failures.jsonl``; ``None`` writes none.
        as_json: JSON on stdout instead of text.
        total: how many outcomes will come.
    """

    def __init__(self, output: Path | None, *, as_json: bool, total: int) -> None:
        self._output = output
        self._as_json = as_json
        self._names = PictureNames()
        self._failures: list[dict[str, Any]] = []
        self._results: IO[str] | None = None
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # The bar may move aside for lines on the same terminal, but must not swallow what goes into a pipe.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._bar = self._progress.add_task("images", total=total)

    def add(self, file: ImageFile, outcome: Result[Prediction] | VisionError, model: str = "") -> None:
        """Write one outcome.

        Args:
            file: the image.
            outcome: what became of it.
            model: which was asked; for failures.
        """
        if isinstance(outcome, VisionError):
            failure = {"file": str(file.path), "model": model, **error_to_record(outcome)}
            self._failures.append(failure)
            if self._as_json:
                typer.echo(json.dumps(failure))
        else:
            self._add_result(file, outcome)
        self._progress.advance(self._bar)

    def _add_result(self, file: ImageFile, result: Result[Prediction]) -> None:
        as_json = json.dumps({"file": str(file.path), **to_record(result)}) if self._as_json or self._output else ""
        if self._output is not None and self._results is not None:
            self._results.write(as_json + "\n")
            self._draw(self._output, file, result)
        typer.echo(as_json if self._as_json else f"{file.path}: {to_line(result)}")

    def _draw(self, output: Path, file: ImageFile, result: Result[Prediction]) -> None:
        prediction = result.prediction
        if isinstance(prediction, TranslatedImage):
            name = self._names.name(file, result.model_name, ".png")
            picture = encode_image(prediction.image, "png", 90)
        else:
            name = self._names.name(file, result.model_name, ".jpg")
            picture = encode_image(annotate(decode_image(file.path.read_bytes()), prediction), "jpeg", 90)
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(picture)

    def __enter__(self) -> Self:
        if self._output is not None:
            self._output.mkdir(parents=True, exist_ok=True)
            (self._output / "failures.jsonl").unlink(missing_ok=True)  # of an earlier run
            self._results = (self._output / "results.jsonl").open("w", encoding="utf-8")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """List what failed, on stderr and in ``failures.jsonl``; then the command has failed."""
        self._progress.stop()
        if self._results is not None:
            self._results.close()
        if not self._failures:
            return
        if self._output is not None:
            lines = "".join(json.dumps(failure) + "\n" for failure in self._failures)
            (self._output / "failures.jsonl").write_text(lines, encoding="utf-8")
        typer.echo(f"{len(self._failures)} failed:", err=True)
        for failure in self._failures:
            typer.echo(f"  {failure['file']}: {failure['message']}", err=True)
        if error is None:
            raise typer.Exit(WORK_FAILED)


class _Rate(ProgressColumn):
    def render(self, task: Bar) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")
