"""Known models, read from manifests: the one that ships with the package and those that a user brings.

A manifest is a TOML file whose ``[[model]]`` tables are `ModelSpec`, field by field, with two conveniences:
``classes`` may name a text file with a class a line, and paths are relative to the manifest.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, InvalidInput, ModelNotFound, choices

_PACKAGE = Path(__file__).resolve().parents[1]


def embedded_manifest() -> Path:
    """The manifest that ships: inside the package once installed, in ``weights/`` of a source checkout.

    Raises:
        ConfigError: neither is there.
    """
    places = (_PACKAGE / "_embedded" / "manifest.toml", _PACKAGE.parent / "weights" / "manifest.toml")
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"the embedded models' manifest is in neither {places[0]} nor {places[1]}: the installation is incomplete, "
        "install the package again"
    )


def known_models(manifests: Sequence[Path] = ()) -> dict[str, ModelSpec]:
    """All models that can be served.

    Args:
        manifests: a user's own, read after the embedded one.

    Returns:
        By name. When a name comes in several versions, the one read last stands under the plain name and the others
        under ``name@version``. Weight files are absolute paths; whether they exist is seen when they are loaded.

    Raises:
        ConfigError: a manifest cannot be read, a model in it is wrong, or a name and version come twice.
    """
    origins: dict[tuple[str, str], Path] = {}
    models: dict[str, ModelSpec] = {}
    for path in (embedded_manifest(), *manifests):
        for spec in read_manifest(path):
            key = (spec.name, spec.version)
            if key in origins:
                raise ConfigError(
                    f"{path}: model {spec.name!r} version {spec.version!r} is already in {origins[key]}; "
                    "give one of them another name or version"
                )
            origins[key] = path
            if spec.name in models:
                older = models.pop(spec.name)
                models[f"{older.name}@{older.version}"] = older
            models[spec.name] = spec
    return models


def find_model(name: str, manifests: Sequence[Path] = ()) -> ModelSpec:
    """The model of a name.

    Args:
        name: as in `known_models`: ``name`` or ``name@version``.
        manifests: a user's own.

    Raises:
        ModelNotFound: there is none; names near matches.
        ConfigError: as in `known_models`.
    """
    models = known_models(manifests)
    wanted, _, version = name.partition("@")
    if version:
        for spec in models.values():
            if (spec.name, spec.version) == (wanted, version):
                return spec
    elif wanted in models:
        return models[wanted]
    every = [f"{spec.name}@{spec.version}" for spec in models.values()] if version else list(models)
    raise ModelNotFound(f"no model {name!r} is known; {choices(name, every)}")


def read_manifest(path: Path) -> list[ModelSpec]:
    """The models of one manifest, in its order.

    Args:
        path: a TOML file.

    Raises:
        ConfigError: it cannot be read, or a model in it is wrong; says which and where.
    """
    path = Path(path).absolute()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the manifest {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the manifest {path} is not valid TOML: {error}") from None
    if unknown := [key for key in content if key != "model"]:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; a manifest consists of [[model]] tables")
    entries = content.get("model", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: write [[model]], with two brackets, before each model")
    return [_read_model(path, index, entry) for index, entry in enumerate(entries)]


def _read_model(path: Path, index: int, entry: dict[str, Any]) -> ModelSpec:
    where = f"{path}: model {entry.get('name', f'number {index + 1}')!r}"
    resolved = dict(entry)
    if isinstance(entry.get("classes"), str):
        resolved["classes"] = _read_classes(where, path.parent, entry["classes"])
    weights = entry.get("weights")
    if isinstance(weights, dict) and isinstance(weights.get("file"), str):
        resolved["weights"] = {**weights, "file": str(path.parent / Path(weights["file"]).expanduser())}
    try:
        return ModelSpec.model_validate(resolved)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_problems(error))}") from None
    except InvalidInput as error:  # from the params' own checks, which serve requests as well
        raise ConfigError(f"{where}: params.{error}") from None


def _read_classes(where: str, folder: Path, name: str) -> tuple[str, ...]:
    """Class names from ``classes/`` next to the manifest, or from a path relative to it; one a line."""
    places = [folder / "classes" / name, folder / name]
    for place in places:
        if place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            if blank := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
                raise ConfigError(f"{where}: line {blank[0]} of {place} is blank, but each line names the next class")
            return tuple(line.strip() for line in lines)
    near = choices(name, (file.name for file in places[0].parent.glob("*.txt")))
    raise ConfigError(f"{where}: no file of class names {name!r} in {folder} or its folder 'classes'; {near}")


def _problems(error: ValidationError) -> Iterable[str]:
    """What pydantic found, a clause for each field."""
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = choices(str(problem["loc"][-1]), ModelSpec.model_fields) if len(problem["loc"]) == 1 else ""
            yield f"unknown field {field!r}" + (f"; {near}" if near else "")
        elif problem["type"] == "missing":
            yield f"{field!r} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{field}: {message}" if field else message
