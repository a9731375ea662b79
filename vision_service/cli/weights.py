"""`vision-service models pull` and `verify`: the files behind the models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vision_service.cli.failures import WORK_FAILED
from vision_service.cli.options import Config, Manifests

if TYPE_CHECKING:
    from vision_service.config import FileSpec, ModelSpec
    from vision_service.config.settings import ServerSettings

Names = Annotated[list[str], typer.Argument(help="Models: NAME or NAME@VERSION.", show_default=False)]


def pull(
    names: Names,
    config: Config = None,
    manifest: Manifests = None,
    mirror: Annotated[str | None, typer.Option(help="Where to fetch from instead; see docs/weights.md.")] = None,
    parallel: Annotated[int, typer.Option(help="Most files at a time.", min=1)] = 4,
    force: Annotated[bool, typer.Option("--force", help="Fetch files that are here as well.")] = False,
) -> None:
    """Fetch the weights of models, checked by size and sha256; a download that was cut off goes on where it ended."""
    from dataclasses import replace

    from vision_service.cli.progress import Downloads
    from vision_service.weights.download import FetchOptions
    from vision_service.weights.pull import files_of, wanted
    from vision_service.weights.pull import pull as fetch_all

    settings = _settings(config, mirror)
    specs = [_find(name, settings, manifest) for name in names]
    files = wanted(specs, also_here=force)
    with Downloads() as watcher:
        options = replace(FetchOptions.from_settings(settings), parallel=parallel)
        fetch_all(files, options, watcher, replace=force)
    for name, spec in zip(names, specs, strict=True):
        typer.echo(f"{name}: {', '.join(file.file for file in files_of(spec)) or 'needs no files'}")


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models; without any, each whose files are here.", show_default=False)
    ] = None,
    config: Config = None,
    manifest: Manifests = None,
) -> None:
    """Read weight files again and compare their size and sha256; exit code 1 if one is altered or missing.

    Without names, models whose files are not here are passed over.
    """
    from vision_service.weights.pull import files_of

    settings = _settings(config)
    specs = {name: _find(name, settings, manifest) for name in names} if names else _all_here(settings, manifest)
    failed = False
    for name, spec in specs.items():
        for file in files_of(spec):
            right, said = _verdict(file, settings.weights_dir)
            failed |= not right
            typer.echo(f"{name}: {file.file}: {said}")
    if not specs:
        typer.echo("no weights are here")
    if failed:
        typer.echo("fetch what is wrong again with `vision-service models pull --force NAME`", err=True)
        raise typer.Exit(WORK_FAILED)


def _verdict(file: FileSpec, weights_dir: Path) -> tuple[bool, str]:
    from vision_service.weights import verified
    from vision_service.weights.check import FULL, sha256_of

    path = Path(file.file)
    try:
        sha256 = sha256_of(path)
    except FileNotFoundError:
        return False, "missing"
    verified.note(weights_dir, path, sha256)
    if file.size_bytes is not None and path.stat().st_size != file.size_bytes:
        return False, f"ALTERED: {path.stat().st_size} bytes, expected {file.size_bytes}"
    if not sha256.startswith(file.sha256):
        return False, f"ALTERED: its sha256 is {sha256}, expected {file.sha256}"
    if not file.sha256:
        return True, f"no sha256 to compare with, it has {sha256}"
    return True, "right" if len(file.sha256) == FULL else f"right in the {len(file.sha256)} digits that are known"


def _settings(config: Path | None, mirror: str | None = None) -> ServerSettings:
    from vision_service.config.settings import ServerSettings

    return ServerSettings.read(config, **({} if mirror is None else {"weights_mirror": mirror}))


def _find(name: str, settings: ServerSettings, manifests: list[Path] | None) -> ModelSpec:
    from vision_service.weights.manifest import find_model

    return find_model(name, manifests or settings.manifests, weights_dir=settings.weights_dir)


def _all_here(settings: ServerSettings, manifests: list[Path] | None) -> dict[str, ModelSpec]:
    from vision_service import zoo
    from vision_service.weights.manifest import known_models
    from vision_service.weights.pull import files_of

    known = known_models(manifests or settings.manifests, weights_dir=settings.weights_dir, families=zoo.FAMILIES)
    return {key: spec for key, spec in known.items() if any(Path(file.file).exists() for file in files_of(spec))}
