"""The user's registry: models that `models add` writes into a manifest of their own in the cache of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomlkit
from filelock import FileLock

from vision_service.config import ModelSpec
from vision_service.errors import ConfigError
from vision_service.weights.manifest import EMBEDDED, REGISTRY, list_models

_HEADING = "# Models of your own. `vision-service models add` appends to this file; edit and remove as you like.\n"


def register(spec: ModelSpec, weights_dir: Path) -> Path:
    """Append a model to the registry; what is in the file, comments too, stays as it is.

    Its class names go into a text file of their own, a name a line, in ``classes/`` beside the registry.

    Args:
        spec: with absolute paths.
        weights_dir: the cache of weights.

    Returns:
        The registry's path.

    Raises:
        ConfigError: there is a model of that name and version, or the registry cannot be written.
    """
    registry = weights_dir / REGISTRY
    try:
        weights_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(weights_dir / f".{REGISTRY}.lock"):
            for one in list_models(weights_dir=weights_dir):
                if (one.spec.name, one.spec.version) == (spec.name, spec.version):
                    where = "ships with the package" if one.family == EMBEDDED else f"is in {registry}"
                    raise ConfigError(
                        f"a model {spec.name!r} version {spec.version!r} {where} already; give this one another "
                        "--version or --name"
                    )
            fields = _fields(spec)
            if spec.classes:
                fields["classes"] = _write_classes(spec, weights_dir / "classes")
            old = registry.read_text("utf-8") if registry.exists() else _HEADING
            _replace(registry, old.rstrip("\n") + "\n\n" + tomlkit.dumps({"model": [fields]}))
    except OSError as error:
        raise ConfigError(f"the registry {registry} cannot be written: {error.strerror or error}") from None
    return registry


def _fields(spec: ModelSpec) -> dict[str, Any]:
    """What differs from the defaults, and the version and the whole preprocessing, which people look for."""
    fields = spec.model_dump(mode="json", exclude_defaults=True)
    preprocess = spec.preprocess.model_dump(mode="json")
    ordered = {"name": spec.name, "version": spec.version, **fields, "preprocess": preprocess}
    return {key: _without_none(value) for key, value in ordered.items()}


def _without_none(value: Any) -> Any:
    """TOML has no null; every field that may be ``None`` is ``None`` by default."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _write_classes(spec: ModelSpec, folder: Path) -> str:
    name = f"{spec.name}@{spec.version}.txt"
    if blank := [index for index, text in enumerate(spec.classes) if not text.strip() or len(text.splitlines()) > 1]:
        raise ConfigError(f"class {blank[0]} of model {spec.name!r} is no line of text: {spec.classes[blank[0]]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / name, "\n".join(spec.classes) + "\n")
    return name


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
