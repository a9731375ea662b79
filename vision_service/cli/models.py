"""`vision-service models`: which models there are, here or on a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vision_service.cli.options import TaskWord

if TYPE_CHECKING:
    from vision_service.config import ModelSpec
    from vision_service.model_info import ModelInfo

Address = Annotated[str | None, typer.Option(help="host:port of a server to ask, instead of the manifests here.")]
Manifests = Annotated[list[Path] | None, typer.Option("--manifest", help="Manifest of further models; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]

_NOT_A_TERMINAL = 200
"""Columns of a table that goes into a pipe, where rich would cut at 80."""


def list_models(
    task: Annotated[TaskWord | None, typer.Option(help="Only models for this task.")] = None,
    address: Address = None,
    manifest: Manifests = None,
    as_json: AsJson = False,
) -> None:
    """List the models that are known here, or that a server serves."""
    rows = _known(manifest or []) if address is None else _served(address)
    if task is not None:
        rows = [row for row in rows if row["task"] == task]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)


def show(
    name: Annotated[str, typer.Argument(help="A model's name; name@version for one of several.")],
    address: Address = None,
    manifest: Manifests = None,
    as_json: AsJson = False,
) -> None:
    """Show one model: its classes, preprocessing, limits and origin."""
    if address is None:
        from vision_service.weights.manifest import find_model

        fields = find_model(name, manifest or []).model_dump(mode="json")
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


def _known(manifests: list[Path]) -> list[dict[str, Any]]:
    from vision_service.config.settings import EMBEDDED_MODELS
    from vision_service.weights.manifest import known_models

    specs = known_models(manifests)
    defaults: dict[str, str] = {}
    for name in EMBEDDED_MODELS:
        defaults.setdefault(specs[name].task, name)
    return [
        {
            "name": name,
            "task": str(spec.task),
            "version": spec.version,
            "backend": spec.backend,
            "licence": spec.weights.licence if spec.weights else "",
            "size_bytes": _size_bytes(spec),
            "is_default": defaults.get(spec.task) == name,
        }
        for name, spec in specs.items()
    ]


def _size_bytes(spec: ModelSpec) -> int | None:
    """Size of the weight file, or nothing when it is not here."""
    if spec.weights is None or not (file := Path(spec.weights.file)).is_file():
        return None
    return file.stat().st_size


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
    for key in rows[0]:
        table.add_column(_HEADINGS.get(key, key), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(key, value) for key, value in row.items()))
    Console(width=None if sys.stdout.isatty() else _NOT_A_TERMINAL).print(table)


_HEADINGS = {"size_bytes": "size", "is_default": "default"}


def _cell(key: str, value: Any) -> str:
    if key == "size_bytes":
        return "-" if value is None else f"{value / 1e6:.1f} MB"
    if key == "is_default":
        return "yes" if value else ""
    return str(value)
