"""`vision-service predict --engine ray`: the same job on a cluster."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vision_service.cli.failures import WORK_FAILED
from vision_service.cli.job import Choices, say_failures
from vision_service.errors import ConfigError

if TYPE_CHECKING:
    from vision_service.config.settings import ServerSettings
    from vision_service.jobs.outputs.kinds import Model
    from vision_service.jobs.ray_job import RaySummary
    from vision_service.types import ParamOverrides


@dataclass(frozen=True, slots=True)
class ActorChoices:
    """What the command line says about the cluster.

    Attributes:
        address: of it.
        count: copies of the models; 0: as many as fit.
        batch_size: most images in one forward pass.
        gpus: of each copy.
    """

    address: str | None
    count: int
    batch_size: int
    gpus: float | None


def check_output(engine: str, output: str | None) -> Path | None:
    """The folder for results, where it is one of this machine.

    Raises:
        ConfigError: Ray needs an output, and only Ray writes to a URL.
    """
    from vision_service.jobs.sources import is_url

    if output is None:
        if engine == "ray":
            raise ConfigError("--engine ray writes files alone: add --output, a folder that all nodes share or a URL")
        return None
    if is_url(output):
        if engine != "ray":
            raise ConfigError(f"--output {output}: only --engine ray writes to a URL")
        return None
    if Path(output).exists() and not Path(output).is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder")
    return Path(output)


def predict_on_ray(
    choices: Choices,
    output: str,
    settings: ServerSettings,
    overrides: ParamOverrides,
    models: Sequence[Model],
    actors: ActorChoices,
) -> None:
    """Run a job on Ray, say what failed, and leave with the exit code that tells how it went.

    Args:
        choices: of the command line.
        output: a folder or a URL.
        settings: of the process.
        overrides: what the calls choose.
        models: that answer.
        actors: on Ray.

    Raises:
        ConfigError: a choice that only the local engine can honour, or the cluster is not there.
        typer.Exit: 1: images failed, or too many did; 130: stopped by Ctrl-C.
    """
    from vision_service.cli.job_progress import JobProgress
    from vision_service.cluster import connected
    from vision_service.jobs.job import Tolerance
    from vision_service.jobs.outputs.finish import Finish
    from vision_service.jobs.outputs.kinds import choose_kinds
    from vision_service.jobs.ray_engine import ActorOptions, RayPredictor
    from vision_service.jobs.ray_job import run_on_ray

    kinds = choose_kinds(choices.save, models, may_have_video=False)
    _refuse(choices, kinds, output)
    options = ActorOptions(actors.count, actors.gpus or 0.0)
    sources = choices.all_sources()
    try:
        with connected(actors.address or "") as ray, JobProgress(None) as progress:
            predictor = RayPredictor(ray, settings, overrides, options=options, batch_size=actors.batch_size)
            summary = run_on_ray(
                predictor,
                sources,
                output,
                restart=choices.restart,
                retry_failures=choices.retry_failures,
                too_many=Tolerance.parse(choices.max_failures).is_passed,
                starts=progress.set_total,
                done=progress.advance,
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is written in {output} stays, and the same command goes on from there", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if choices.output is not None and not summary.too_many_failures:
        Finish(kinds, models, sources, limits=predictor.limits).write(choices.output)
    _leave(summary, output)


def _refuse(choices: Choices, kinds: Sequence[str], output: str) -> None:
    from vision_service.jobs.journal import DATABASE
    from vision_service.jobs.outputs.kinds import KINDS
    from vision_service.jobs.sources import is_url

    for flag, value in (("--json", choices.as_json), ("--timings", choices.timings)):
        if value:
            raise ConfigError(f"{flag} has no effect with --engine ray")
    if choices.every or choices.every_s:
        raise ConfigError("--engine ray reads no videos, so --every and --every-s have no effect")
    for kind in kinds:
        if KINDS[kind].per_image or (is_url(output) and kind not in ("jsonl", "parquet")):
            raise ConfigError(f"--save {kind} cannot be written by --engine ray to {output}; run it without")
    if choices.output is not None and (choices.output / DATABASE).exists():
        raise ConfigError(f"{output} has the results of a job without Ray; choose another folder")


def _leave(summary: RaySummary, output: str) -> None:
    say_failures(summary.failed, summary.reasons)
    typer.echo(f"{summary.seen} images were done now and {summary.before} before; results in {output}", err=True)
    if summary.too_many_failures:
        typer.echo("error: more failed than --max-failures allows; the same command goes on from here", err=True)
    if summary.too_many_failures or summary.failed_in_all:
        raise typer.Exit(WORK_FAILED)
