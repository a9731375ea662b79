"""`vision-service models add`: a weight file of the user's own becomes a model with a name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vision_service.cli.options import Config, TaskWord
from vision_service.errors import ConfigError

if TYPE_CHECKING:
    from vision_service.config import FileSpec, ModelSpec

_UNTRUSTED_DIGITS = 16


def add(
    file: Annotated[Path, typer.Argument(help="The weight file; it stays where it is.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option(help="What requests will say.")],
    task: Annotated[TaskWord, typer.Option(help="What the model does.")],
    backend: Annotated[str, typer.Option(help="Which backend reads it.")],
    classes: Annotated[
        Path | None, typer.Option(help="Text file, a class name a line.", exists=True, dir_okay=False)
    ] = None,
    preprocess_from: Annotated[
        str | None, typer.Option(help="Known model whose preprocessing it needs; its classes, too, without --classes.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Backend option, key=value; repeatable.")] = None,
    companion: Annotated[
        list[Path] | None, typer.Option(help="Further file that the backend needs; repeatable.", dir_okay=False)
    ] = None,
    version: Annotated[str, typer.Option(help="Several versions of a name may stand side by side.")] = "1",
    licence: Annotated[str, typer.Option(help="Terms of the weights, SPDX where there is one.")] = "unknown",
    trust: Annotated[bool, typer.Option("--trust", help="The file may run code while it is loaded.")] = False,
    config: Config = None,
) -> None:
    """Register a weight file: note its sha256, try to load it, write its spec into models.toml in the cache."""
    from vision_service.config.settings import ServerSettings
    from vision_service.weights.registry import register

    weights_dir = ServerSettings.read(config).weights_dir
    fields: dict[str, Any] = {"name": name, "version": version, "task": task, "backend": backend}
    fields["options"] = _read_options(option or [])
    fields |= _borrowed(preprocess_from, fields, config)
    if classes is not None:
        fields["classes"] = [line.strip() for line in classes.read_text("utf-8").splitlines()]
    weights = _describe(file).model_dump() | {"licence": licence, "source": f"added from {file.absolute()}"}
    fields["weights"] = weights | {"companions": [_describe(one).model_dump() for one in companion or []]}
    spec = _validated(fields)
    _check_that_it_loads(spec, trust)
    registry = register(spec, weights_dir)
    typer.echo(f"added {name}@{version} to {registry}; `vision-service serve --model {name}@{version}` serves it")


def _describe(file: Path) -> FileSpec:
    from vision_service.config import FileSpec
    from vision_service.weights.check import sha256_of

    try:
        return FileSpec(file=str(file.absolute()), sha256=sha256_of(file), size_bytes=file.stat().st_size)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None


def _read_options(pairs: list[str]) -> dict[str, Any]:
    """Values are TOML where they can be, else text: ``width=32``, ``arch=resnet18``."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--option is key=value, got {pair!r}")
        try:
            options[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = text
    return options


def _borrowed(like: str | None, fields: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """What another model knows: preprocessing, and classes and defaults where it does the same task."""
    from vision_service.config.settings import ServerSettings
    from vision_service.errors import ModelNotFound
    from vision_service.weights.manifest import find_model

    settings = ServerSettings.read(config)
    guess = like or str(fields["options"].get("arch", ""))
    try:
        model = find_model(guess, settings.manifests, weights_dir=settings.weights_dir)
    except ModelNotFound:
        if like is not None:
            raise
        raise ConfigError(
            "how are its images prepared? Name a known model that is prepared likewise: --preprocess-from NAME "
            "(`vision-service models list` shows all)"
        ) from None
    borrowed: dict[str, Any] = {"preprocess": model.preprocess}
    if model.task == fields["task"]:
        borrowed |= {"classes": model.classes, "background_id": model.background_id, "params": model.params}
    return borrowed


def _validated(fields: dict[str, Any]) -> ModelSpec:
    from pydantic import ValidationError

    from vision_service.config import ModelSpec

    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        hint = "" if fields.get("classes") else "; name them by --classes FILE"
        raise ConfigError(f"model {fields['name']!r}: {problems}{hint}") from None


def _check_that_it_loads(spec: ModelSpec, trust: bool) -> None:
    """Build the network with the file, which is not to be trusted for having been hashed just now."""
    from vision_service.backends.table import create_backend

    if spec.weights is None:
        return
    partly_known = spec.weights.model_copy(update={"sha256": spec.weights.sha256[:_UNTRUSTED_DIGITS]})
    create_backend(spec.model_copy(update={"weights": partly_known, "trusted": trust})).build()
