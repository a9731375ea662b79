"""Options that several commands share, and the choices that they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vision_service.errors import InvalidInput

if TYPE_CHECKING:
    from vision_service.types import ParamOverrides, Task

TaskWord = Literal["classify", "detect", "segment", "translate"]

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per image on stdout.")]
TopK = Annotated[int | None, typer.Option(help="classify: at most so many classes.")]
ScoreThreshold = Annotated[float | None, typer.Option(help="Lowest score, 0 to 1.")]
IouThreshold = Annotated[float | None, typer.Option(help="detect: largest overlap of two boxes of a class, 0 to 1.")]
MaxDetections = Annotated[int | None, typer.Option(help="detect: at most so many boxes.")]
Classes = Annotated[
    list[str] | None, typer.Option("--class", help="Class to keep, by name or by id; repeat for several.")
]

Stream = Annotated[
    bool, typer.Option("--stream", help="Send images as requests on one stream instead of a call each: costs less.")
]

Config = Annotated[Path | None, typer.Option(help="Settings file (TOML), as for serve.", dir_okay=False)]
Manifests = Annotated[list[Path] | None, typer.Option("--manifest", help="Manifest of further models; repeatable.")]
Runtime = Annotated[
    str | None, typer.Option(help="How models are executed: auto, torch, openvino, ...; see docs/runtimes.md.")
]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16 or int8.")]
CalibrationFolder = Annotated[
    Path | None, typer.Option(help="Photos like those that will come, for precision int8.", file_okay=False)
]

Engine = Annotated[Literal["local", "ray"], typer.Option(help="Where the work is done: in this process, or on Ray.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="ray: HOST:PORT of a cluster, or auto for the one on this machine; else one is started here."),
]

TAKES: dict[str, tuple[str, ...]] = {
    "classify": ("top_k", "score_threshold", "classes"),
    "detect": ("score_threshold", "iou_threshold", "max_detections", "classes"),
    "segment": ("score_threshold", "classes"),
    "translate": (),
}
"""Which choices have an effect on which task."""


def read_overrides(
    tasks: list[Task],
    *,
    top_k: int | None,
    score_threshold: float | None,
    iou_threshold: float | None,
    max_detections: int | None,
    classes: list[str] | None,
) -> ParamOverrides:
    """What the options choose.

    Args:
        tasks: what will be done.
        top_k: see `Params`.
        score_threshold: see `Params`.
        iou_threshold: see `Params`.
        max_detections: see `Params`.
        classes: names, and ids as text.

    Raises:
        InvalidInput: an option that has no effect on any of the tasks, or out of its range.
    """
    from vision_service.types import ParamOverrides, Params

    kept = tuple(int(item) if item.isdecimal() else item for item in classes or ()) or None
    overrides = ParamOverrides(top_k, score_threshold, iou_threshold, max_detections, kept)
    for name in overrides.chosen():
        if not any(name in TAKES[task] for task in tasks):
            takers = " and ".join(task for task, names in TAKES.items() if name in names)
            raise InvalidInput(name, f"has no effect on {' and '.join(tasks)}, only on {takers}")
    Params(**{name: value for name, value in overrides.chosen().items() if name != "classes"})
    return overrides


def check_engine(engine: str, ray_options: dict[str, Any]) -> None:
    """Refuse choices that only Ray can honour.

    Args:
        engine: which was chosen.
        ray_options: by parameter name; those left out are ``None``.

    Raises:
        InvalidInput: names the first.
    """
    given = [name for name, value in ray_options.items() if value is not None]
    if engine != "ray" and given:
        raise InvalidInput(given[0], "has an effect with --engine ray only")
