"""`vision-service models`: which models there are, here or on a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vision_service.cli.options import Config, Manifests, TaskWord
from vision_service.errors import ConfigError, choices

if TYPE_CHECKING:
    from vision_service.config import ModelSpec
    from vision_service.config.settings import ServerSettings
    from vision_service.model_info import ModelInfo

Address = Annotated[str | None, typer.Option(help="host:port of a server to ask, instead of the manifests here.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]

_NOT_A_TERMINAL = 200
"""Columns of a table that goes into a pipe, where rich would cut at 80."""


def list_models(
    task: Annotated[TaskWord | None, typer.Option(help="Only models for this task.")] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Only embedded, user, or a library's such as torchvision; repeatable.")
    ] = None,
    address: Address = None,
    config: Config = None,
    manifest: Manifests = None,
    as_json: AsJson = False,
) -> None:
    """List the models that are known here, and whether their weights are; or those that a server serves."""
    if address is None:
        from vision_service.config.settings import ServerSettings

        settings = ServerSettings.read(config)
        rows = _known(settings, manifest or list(settings.manifests), family or _families_at_a_glance())
    elif family:
        raise ConfigError("--family has no effect together with --address: a server does not tell families")
    else:
        rows = _served(address)
    if task is not None:
        rows = [row for row in rows if row["task"] == task]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def show(
    name: Annotated[str, typer.Argument(help="A model's name; name@version for one of several.")],
    address: Address = None,
    config: Config = None,
    manifest: Manifests = None,
    as_json: AsJson = False,
) -> None:
    """Show one model: its classes, preprocessing, limits, origin, and whether its weights are here."""
    if address is None:
        from vision_service.config.settings import ServerSettings
        from vision_service.weights.manifest import find_model

        settings = ServerSettings.read(config)
        spec = find_model(name, manifest or settings.manifests, weights_dir=settings.weights_dir)
        fields = spec.model_dump(mode="json") | _files(spec, settings.weights_dir)
    else:
        from vision_service.client import VisionClient

        plain, _, version = name.partition("@")
        with VisionClient(address) as server:
            fields = _info_fields(server.get_model(plain, version))
    if as_json:
        typer.echo(json.dumps(fields, indent=2))
        return
    for key, value in fields.items():
        typer.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


_AT_A_GLANCE = 300
"""Models of a library that are listed without being asked for."""


def _families_at_a_glance() -> list[str]:
    """All families but those that would bury the others, which stderr names."""
    from vision_service import zoo
    from vision_service.weights.manifest import EMBEDDED, USER

    counts = {family: len(names) for family, names in zoo.names().items()}
    for family, count in counts.items():
        if count > _AT_A_GLANCE:
            typer.echo(f"{count} models of {family} are not listed; --family {family} lists them", err=True)
    return [EMBEDDED, USER, *(family for family, count in counts.items() if count <= _AT_A_GLANCE)]


def _known(settings: ServerSettings, manifests: list[Path], families: list[str]) -> list[dict[str, Any]]:
    from vision_service import zoo
    from vision_service.config.settings import EMBEDDED_MODELS
    from vision_service.weights.manifest import EMBEDDED, USER, list_models

    for family in families:
        if family not in (every := (EMBEDDED, USER, *zoo.FAMILIES)):
            raise ConfigError(f"no family {family!r}; {choices(family, every)}")
    in_zoo = [family for family in zoo.FAMILIES if family in families]
    models = list_models(manifests, weights_dir=settings.weights_dir, families=in_zoo)
    tasks = {one.key: one.spec.task for one in models}
    defaults: dict[str, str] = {}
    for name in EMBEDDED_MODELS:
        defaults.setdefault(tasks[name], name)
    return [
        {
            "name": one.key,
            "task": str(one.spec.task),
            "version": one.spec.version,
            "family": one.family,
            "backend": one.spec.backend,
            "licence": one.spec.weights.licence if one.spec.weights else "",
            **_files(one.spec, settings.weights_dir),
            "is_default": defaults.get(one.spec.task) == one.key,
        }
        for one in models
        if one.family in families
    ]


def _files(spec: ModelSpec, weights_dir: Path) -> dict[str, Any]:
    """Size (of what is not here, perhaps only roughly), presence and what was compared, of all files together."""
    from vision_service.weights import verified
    from vision_service.weights.pull import files_of

    files = files_of(spec)
    states = {verified.state(weights_dir, file) for file in files}
    here = [Path(file.file).stat().st_size if Path(file.file).is_file() else None for file in files]
    exact = [size or file.size_bytes for size, file in zip(here, files, strict=True)]
    sizes = [size or file.about_bytes for size, file in zip(exact, files, strict=True)]
    known = bool(sizes) and sizes[0] is not None  # companions are small: configurations
    worst = next((state for state in _WORST_FIRST if state in states), "")
    return {
        "size_bytes": sum(size or 0 for size in sizes) if known else None,
        "size_is_about": known and None in exact,
        "here": "missing" not in states,
        "verified": "" if worst == "missing" else worst,
    }


_WORST_FIRST = ("missing", "altered", "no hash", "not yet", "yes")


def _served(address: str) -> list[dict[str, Any]]:
    from vision_service.client import VisionClient

    keys = ("name", "task", "version", "state", "backend", "device", "precision", "licence", "is_default")
    with VisionClient(address) as server:
        every = [_info_fields(info) for info in server.list_models()]
    return [{key: fields[key] for key in keys} for fields in every]


def _info_fields(info: ModelInfo) -> dict[str, Any]:
    fields = asdict(info)
    text = fields.pop("preprocess_json")
    return {**fields, "preprocess": json.loads(text) if text else None}


def _print_table(rows: Iterable[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    if not rows:
        typer.echo("no models")
        return
    table = Table(box=None, pad_edge=False)
    keys = [key for key in rows[0] if key != "size_is_about"]
    for key in keys:
        table.add_column(_HEADINGS.get(key, key), overflow="fold")
    for row in rows:
        table.add_row(*(_about(row) * (key == "size_bytes") + _cell(key, row[key]) for key in keys))
    Console(width=None if sys.stdout.isatty() else _NOT_A_TERMINAL).print(table)


_HEADINGS = {"size_bytes": "size", "is_default": "default"}


def _about(row: dict[str, Any]) -> str:
    return "about " if row.get("size_is_about") else ""


def _cell(key: str, value: Any) -> str:
    if key == "size_bytes":
        return "-" if value is None else f"{value / 1e6:.1f} MB"
    if isinstance(value, bool):
        return "yes" if value else ("no" if key == "here" else "")
    return str(value)
