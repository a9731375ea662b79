"""`vision-service bench`: how fast models are here."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vision_service.cli import options
from vision_service.errors import InvalidInput, choices

if TYPE_CHECKING:
    from vision_service.bench.plan import Measure

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
"""Photos of a source checkout; an installed package has none."""


def bench(
    model: Annotated[list[str] | None, typer.Option(help="Model to measure; repeatable.")] = None,
    manifest: options.Manifests = None,
    config: options.Config = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "",
    runtime: Annotated[list[str] | None, typer.Option(help="As for serve; repeat to measure several.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="As for serve; repeat to measure several.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to send [samples].", exists=True)] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="network, pipeline, served, streamed (requests on one stream) or single; repeatable [all of them]."
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Of the network alone; repeatable [1, 2, 4, ... up to the model's].", min=1)
    ] = None,
    in_flight: Annotated[int, typer.Option(help="Calls under way in the closed loops.", min=1)] = 32,
    rate: Annotated[
        float, typer.Option(help="Calls a second in an open loop, as well as the rest; 0: no open loop.", min=0)
    ] = 0.0,
    overload: Annotated[
        float,
        typer.Option(
            help="Open loops at so many times the speed of the closed one, by callers that hold back and that do not; "
            "0: none.",
            min=0,
        ),
    ] = 0.0,
    seconds: Annotated[float, typer.Option(help="Length of each measurement in a round.", min=0.1)] = 5.0,
    turns: Annotated[
        int,
        typer.Option(help="Parts into which each is cut; they take turns, so that ratios are of neighbours.", min=1),
    ] = 4,
    warmup: Annotated[float, typer.Option(help="Seconds before each measurement.", min=0)] = 1.0,
    rounds: Annotated[int, typer.Option(help="How often everything is measured; medians are shown.", min=1)] = 3,
    generators: Annotated[int, typer.Option(help="Processes that generate load.", min=1)] = 1,
    address: Annotated[str, typer.Option(help="Measure a server that runs already, host:port.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.", dir_okay=False)] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two reports instead, the older one first.")
    ] = None,
) -> None:
    """Measure models: the network alone, the pipeline in process, and behind a server, which is started for it.

    Load comes from processes of their own. Every measurement is taken in turn, round after round.
    """
    from vision_service.bench.plan import Plan, Setup, Variant
    from vision_service.bench.report import Report
    from vision_service.bench.run import measure as run
    from vision_service.bench.table import compare as compared
    from vision_service.bench.table import lines_of
    from vision_service.config.settings import EMBEDDED_MODELS
    from vision_service.jobs.sources import list_files

    if compare is not None:
        for line in compared(*map(Report.read, compare)):
            typer.echo(line)
        return
    variants = [Variant(*one) for one in product(model or EMBEDDED_MODELS, runtime or [""], precision or [""])]
    plan = Plan(
        variants=variants,
        setup=Setup(config, tuple(manifest or ()), device),
        images=[Path(file.file).read_bytes() for file in list_files([str(images or _samples())])],
        measures=_measures(measure, rate=rate, overload=overload, address=address),
        batch_sizes=tuple(batch_size or ()),
        in_flight=in_flight,
        rate=rate,
        overload=overload,
        seconds=seconds,
        turns=turns,
        warmup_s=warmup,
        rounds=rounds,
        generators=generators,
        address=address,
    )
    report = run(plan, lambda text: typer.echo(text, err=True))
    for line in lines_of(report):
        typer.echo(line)
    if json_file is not None:
        report.write(json_file)


def _samples() -> Path:
    if not SAMPLES.is_dir():
        raise InvalidInput("images", "an installed package has no photos of its own; give a folder with --images")
    return SAMPLES


def _measures(asked: list[str] | None, *, rate: float, overload: float, address: str) -> tuple[Measure, ...]:
    """What to measure. A server that runs already cannot be measured from inside."""
    from vision_service.bench.plan import MEASURES

    known = ("network", "pipeline", "served", "streamed", "single")
    asked = list(known[2:] if address else known) if asked is None else asked
    if wrong := [name for name in asked if name not in known]:
        raise InvalidInput("measure", f"there is no {wrong[0]!r}; {choices(wrong[0], known)}")
    if address and {"network", "pipeline"} & set(asked):
        raise InvalidInput("address", "a server that runs already is measured as served, streamed and single only")
    asked += [name for name, value in (("open", rate), ("overload", overload)) if value]
    return tuple(name for name in MEASURES if name in asked)
