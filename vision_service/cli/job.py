"""What `predict` and `client` share: their options about sources and outputs, and a job from start to exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vision_service.cli.failures import WORK_FAILED
from vision_service.errors import ConfigError

if TYPE_CHECKING:
    from vision_service.imaging.decode import DecodeLimits
    from vision_service.jobs.job import Answers, Done, Job, Summary
    from vision_service.jobs.outputs.kinds import Model
    from vision_service.records import Record

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE...",
        help="Image files, videos, folders, patterns in quotes ('photos/**/*.jpg'), @list.txt, and URLs of these.",
        show_default=False,
    ),
]
ListFile = Annotated[Path | None, typer.Option("--list", help="File with a path or URL a line, as @FILE.")]
Every = Annotated[int | None, typer.Option(help="Of a video, every n-th frame.")]
EverySeconds = Annotated[float | None, typer.Option("--every-s", help="Of a video, a frame every so many seconds.")]
Output = Annotated[
    Path | None,
    typer.Option(help="Folder for results.jsonl, failures.jsonl and what --save names.", file_okay=False),
]
Save = Annotated[
    list[str] | None,
    typer.Option(
        help="Outputs, repeatable or with commas: jsonl, parquet, parquet-flat, csv, coco, rle, yolo, class-map, "
        "pictures, crops, video, html; docs/batch.md says what each is."
    ),
]
CocoIds = Annotated[
    Path | None, typer.Option(help="--save coco: take the ids of images and classes from these annotations.")
]
Timings = Annotated[bool, typer.Option("--timings", help="Put times into results; they then differ from run to run.")]
Restart = Annotated[bool, typer.Option("--restart", help="Do again what the folder has results of.")]
Retry = Annotated[bool, typer.Option("--retry-failures", help="Try again the images that failed in an earlier run.")]
MaxFailures = Annotated[
    str | None, typer.Option(help="Stop when more images fail: a number, or 5% (judged from the 50th image on).")
]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the options choose.

    Attributes:
        sources: arguments of the command.
        list_file: one more source.
        every: frames.
        every_s: seconds.
        output: folder.
        save: outputs.
        coco_ids: annotations.
        timings: times in records.
        restart: forget what was done.
        retry_failures: try failures again.
        max_failures: number or percentage.
        as_json: JSON on stdout.
        elsewhere: results go to a store, and not to a folder of this machine.
    """

    sources: Sequence[str] | None
    list_file: Path | None
    every: int | None
    every_s: float | None
    output: Path | None
    save: Sequence[str] | None
    coco_ids: Path | None
    timings: bool
    restart: bool
    retry_failures: bool
    max_failures: str | None
    as_json: bool
    elsewhere: bool = False

    def check(self, models: Sequence[Model]) -> None:
        """Refuse what can be refused before models are loaded.

        Raises:
            ConfigError: see `all_sources`, and an option has no effect on the models.
        """
        from vision_service.jobs.job import Tolerance
        from vision_service.jobs.outputs.kinds import choose_kinds
        from vision_service.jobs.sources import may_have_video
        from vision_service.jobs.video import Step

        sources = self.all_sources()
        Step(self.every, self.every_s)
        Tolerance.parse(self.max_failures)
        kinds = choose_kinds(self.save, models, may_have_video=may_have_video(sources))
        if self.coco_ids is not None and "coco" not in kinds:
            raise ConfigError("--coco-ids has no effect without --save coco")

    def all_sources(self) -> list[str]:
        """Of the arguments and of ``--list``, checked.

        Raises:
            ConfigError: one is not there, or an option has no effect on them.
        """
        from vision_service.jobs.sources import check_sources, may_have_video

        sources = [*(self.sources or []), *([f"@{self.list_file}"] if self.list_file else [])]
        check_sources(sources)
        if (self.every or self.every_s) and not may_have_video(sources):
            raise ConfigError("--every and --every-s have no effect: no source is a video")
        if self.output is None and not self.elsewhere:
            for flag, value in (("--save", self.save), ("--coco-ids", self.coco_ids), ("--restart", self.restart)):
                if value:
                    raise ConfigError(f"{flag} has no effect without --output")
            if self.retry_failures:
                raise ConfigError("--retry-failures has no effect without --output")
        return sources


def carry_out(
    choices: Choices, answers: Answers, fingerprint: str, models: Sequence[Model], limits: DecodeLimits
) -> None:
    """Run a job, say what failed, make the outputs, and leave with the exit code that tells how it went.

    Args:
        choices: of the command line.
        answers: models in this process, or a server.
        fingerprint: of what decides the answers.
        models: that answer.
        limits: of images.

    Raises:
        ConfigError: a choice is wrong; the sources have no images.
        typer.Exit: 1: images failed, or too many did; 130 and 143: stopped by Ctrl-C and SIGTERM.
    """
    from vision_service.jobs.job import Job, Tolerance
    from vision_service.jobs.video import Step

    sources = choices.all_sources()
    job = Job(sources, Step(choices.every, choices.every_s), Tolerance.parse(choices.max_failures), choices.timings)
    if choices.output is None:
        summary = _watch(job, answers, choices)
        _leave(summary, summary.failed, summary.seen, sources, None)
    else:
        _carry_out_into(choices.output, choices, job, answers, fingerprint, models, limits)


def _carry_out_into(
    folder: Path,
    choices: Choices,
    job: Job,
    answers: Answers,
    fingerprint: str,
    models: Sequence[Model],
    limits: DecodeLimits,
) -> None:
    from dataclasses import asdict, replace

    from vision_service.jobs.journal import Journal
    from vision_service.jobs.outputs.coco import Ids
    from vision_service.jobs.outputs.finish import Finish
    from vision_service.jobs.outputs.kinds import KINDS, choose_kinds
    from vision_service.jobs.outputs.per_image import ImageFiles
    from vision_service.jobs.predictor import digest
    from vision_service.jobs.sources import list_files, may_have_video

    kinds = choose_kinds(choices.save, models, may_have_video=may_have_video(job.sources))
    ids = Ids.read(choices.coco_ids) if choices.coco_ids is not None else None
    finish = Finish(kinds, models, job.sources, job.step, limits, ids)
    files = ImageFiles(folder, kinds, models)
    if files.wanted:
        job = replace(job, write=files.write, keep_image=files.needs_image)
    per_image = [kind for kind in kinds if KINDS[kind].per_image]
    identity = digest([fingerprint, asdict(job.step), job.timings, per_image])
    with Journal(folder, identity, restart=choices.restart) as journal:
        if journal.started_anew:
            typer.echo(f"{folder} has results of other models or choices; all images are done again", err=True)
        journal.compare(list_files(job.sources), retry_failures=choices.retry_failures)
        before = journal.standing()
        if before.done or before.failed:
            failed = f" and {before.failed} that failed (--retry-failures tries them again)" if before.failed else ""
            typer.echo(f"going on after {before.done} images that are done{failed}", err=True)
        summary = _watch(job, answers, choices, journal)
        after = journal.standing()
        if not (summary.signal or summary.too_many_failures):
            finish.write(folder)
    _leave(summary, after.failed, after.done + after.failed, job.sources, folder)


def _watch(job: Job, answers: Answers, choices: Choices, journal: object = None) -> Summary:
    """Run it with a bar, and its lines on stdout."""
    from vision_service.cli.job_progress import JobProgress
    from vision_service.jobs.journal import Journal
    from vision_service.jobs.sources import is_url

    known = journal if isinstance(journal, Journal) else None
    done_before = 0 if known is None else sum((known.standing().done, known.standing().failed))
    # Counting a store costs as many questions as listing it.
    count = None if any(map(is_url, job.sources)) else lambda: max(0, job.count() - done_before)

    def show(done: Done) -> None:
        _print(done, as_json=choices.as_json)
        progress.advance()

    with JobProgress(count) as progress:
        return job.run(answers, known, show)


def _print(done: Done, *, as_json: bool) -> None:
    from vision_service.cli.output import to_line

    if as_json:
        typer.echo(done.results + done.failures, nl=False)
    else:
        for result in done.outcome.results:
            typer.echo(f"{done.outcome.item.file}: {to_line(result)}")


def say_failures(failed: int, reasons: Sequence[Record], where: str = "") -> None:
    """Name those that are known, and how many more there are.

    Args:
        failed: images.
        reasons: the first of their failures, as records.
        where: all are, as the end of a line.
    """
    if failed:
        typer.echo(f"{failed} failed:", err=True)
    for reason in reasons:
        typer.echo(f"  {reason['file']}: {reason['message']}", err=True)
    if failed > len(reasons):
        typer.echo(f"  and {failed - len(reasons)} more{where}", err=True)


def _leave(summary: Summary, failed: int, seen: int, sources: Sequence[str], folder: Path | None) -> None:
    from vision_service.jobs.sources import no_images

    again = "" if folder is None else "; the same command goes on from here"
    say_failures(summary.failed, summary.reasons, "" if folder is None else f"; all are in {folder / 'failures.jsonl'}")
    if summary.signal:
        typer.echo(f"stopped after {seen} images{again}", err=True)
        raise typer.Exit(128 + signal.Signals(summary.signal))
    if summary.too_many_failures:
        typer.echo(f"error: stopped after {seen} images: more failed than --max-failures allows{again}", err=True)
        raise typer.Exit(WORK_FAILED)
    if not seen:
        raise no_images(sources)
    if failed:
        if failed > summary.failed:
            typer.echo(f"{failed - summary.failed} failed in earlier runs; --retry-failures tries them again", err=True)
        raise typer.Exit(WORK_FAILED)
