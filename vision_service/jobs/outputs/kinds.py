"""Which outputs there are. A visible table: the name that ``--save`` takes, and for which tasks it means something.

Files about one image are written beside its prediction, by the workers; a job that is cut off and goes on overwrites
them. All others are made of ``results.jsonl`` when the job is through, so they agree with it whatever happened before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vision_service.errors import ConfigError, choices
from vision_service.types import Task

_LISTS = (Task.CLASSIFY, Task.DETECT, Task.SEGMENT)


@dataclass(frozen=True, slots=True)
class Kind:
    """An output.

    Attributes:
        tasks: of models that it is for.
        per_image: written with each image; otherwise at the end, of all records.
        needs_image: of a per-image one, whether it draws on the picture or cuts pieces out of it.
    """

    tasks: tuple[Task, ...]
    per_image: bool = False
    needs_image: bool = False


KINDS: dict[str, Kind] = {
    "jsonl": Kind(tuple(Task)),
    "parquet": Kind(tuple(Task)),
    "parquet-flat": Kind(_LISTS),
    "csv": Kind(_LISTS),
    "coco": Kind((Task.DETECT,)),
    "rle": Kind((Task.DETECT, Task.SEGMENT)),
    "html": Kind((Task.CLASSIFY, Task.DETECT)),
    "video": Kind(_LISTS),
    "yolo": Kind((Task.DETECT,), per_image=True),
    "class-map": Kind((Task.SEGMENT,), per_image=True),
    "pictures": Kind(tuple(Task), per_image=True, needs_image=True),
    "crops": Kind((Task.DETECT,), per_image=True, needs_image=True),
}


@dataclass(frozen=True, slots=True)
class Model:
    """What outputs know of a model.

    Attributes:
        name: in requests and file names.
        version: its version.
        task: what it does.
        classes: the index is the class id.
    """

    name: str
    version: str
    task: Task
    classes: tuple[str, ...]


def choose_kinds(wanted: Iterable[str] | None, models: Sequence[Model], *, may_have_video: bool) -> tuple[str, ...]:
    """The outputs of a job.

    Args:
        wanted: names, each may be several with commas; ``None``: ``jsonl``, and pictures where a model makes images,
            since its records do not hold them.
        models: that answer.
        may_have_video: whether a source is a video, or may turn out to be.

    Raises:
        ConfigError: there is no such output, or it has no effect on these models and sources.
    """
    if wanted is None:
        return ("jsonl", "pictures") if any(model.task is Task.TRANSLATE for model in models) else ("jsonl",)
    names = [name.strip() for part in wanted for name in part.split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--save {name}: there is no such output; {choices(name, KINDS)}")
        if not any(model.task in KINDS[name].tasks for model in models):
            tasks = " and ".join(sorted({str(model.task) for model in models}))
            raise ConfigError(f"--save {name} has no effect on {tasks}, only on {' and '.join(KINDS[name].tasks)}")
    if "video" in names and not may_have_video:
        raise ConfigError("--save video has no effect: no source is a video")
    return tuple(name for name in KINDS if name == "jsonl" or name in names)


def models_for(kind: str, models: Sequence[Model]) -> list[Model]:
    """The models whose records an output is made of."""
    return [model for model in models if model.task in KINDS[kind].tasks]


def file_of(folder: Path, kind: str, suffix: str, model: Model, among: Sequence[Model]) -> Path:
    """A file of an output that has one a model: with the model's name where there are several."""
    several = len(among) > 1
    return folder / (f"{kind}.{model.name}-{model.version}{suffix}" if several else f"{kind}{suffix}")
