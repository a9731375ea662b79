"""Known models: those that ship, those that a user brings in manifests, and those of the libraries in the zoo.

A manifest is a TOML file whose ``[[model]]`` tables are `ModelSpec`, field by field, with two conveniences:
``classes`` may name a text file with a class a line, and paths are relative to the manifest.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vision_service import zoo
from vision_service.config import ModelSpec
from vision_service.config.settings import default_weights_dir
from vision_service.errors import ConfigError, InvalidInput, ModelNotFound, choices

EMBEDDED, USER = "embedded", "user"
REGISTRY = "models.toml"
"""The user's registry: a manifest in the cache of weights, which `models add` writes."""

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


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model and the name that means it.

    Attributes:
        key: ``name``, or ``name@version`` when another version has the plain name.
        family: ``embedded``, ``user``, or a family of the zoo.
        spec: what it is; weight files are absolute paths, whether or not they are here.
    """

    key: str
    family: str
    spec: ModelSpec


def list_models(
    manifests: Sequence[Path] = (), *, weights_dir: Path | None = None, families: Iterable[str] = ()
) -> list[KnownModel]:
    """All models that can be served.

    Args:
        manifests: a user's own, read after the embedded one and the registry.
        weights_dir: the cache of weights; ``None``: the one that the environment names.
        families: of the zoo, to list as well; each imports its library.

    Returns:
        When a name comes in several versions, the manifest read last has the plain name, and manifests have it before
        families.

    Raises:
        ConfigError: a manifest cannot be read, a model in it is wrong, or a name and version come twice.
    """
    weights_dir = weights_dir or default_weights_dir()
    known = _of_manifests(manifests, weights_dir)
    for family in families:
        module = import_module(zoo.FAMILIES[family])
        for name in module.names():
            spec = module.spec(name)
            if spec is None:
                continue
            key = name if name not in known else f"{name}@{spec.version}"
            known.setdefault(key, KnownModel(key, family, place(spec, weights_dir)))
    return list(known.values())


def known_models(
    manifests: Sequence[Path] = (), *, weights_dir: Path | None = None, families: Iterable[str] = ()
) -> dict[str, ModelSpec]:
    """The specs of `list_models`, by key."""
    return {one.key: one.spec for one in list_models(manifests, weights_dir=weights_dir, families=families)}


def _of_manifests(manifests: Sequence[Path], weights_dir: Path) -> dict[str, KnownModel]:
    origins: dict[tuple[str, str], Path] = {}
    known: dict[str, KnownModel] = {}
    for path, family in _manifest_files(manifests, weights_dir):
        for spec in read_manifest(path):
            if (spec.name, spec.version) in origins:
                raise ConfigError(
                    f"{path}: model {spec.name!r} version {spec.version!r} is already in "
                    f"{origins[spec.name, spec.version]}; give one of them another name or version"
                )
            origins[spec.name, spec.version] = path
            if spec.name in known:
                older = known.pop(spec.name)
                key = f"{spec.name}@{older.spec.version}"
                known[key] = KnownModel(key, older.family, older.spec)
            known[spec.name] = KnownModel(spec.name, family, spec)
    return known


def _manifest_files(manifests: Sequence[Path], weights_dir: Path) -> Iterator[tuple[Path, str]]:
    yield embedded_manifest(), EMBEDDED
    registry = weights_dir / REGISTRY
    if registry.is_file():
        yield registry, USER
    for path in manifests:
        if Path(path).absolute() != registry.absolute():
            yield Path(path), USER


def find_model(name: str, manifests: Sequence[Path] = (), *, weights_dir: Path | None = None) -> ModelSpec:
    """The model of a name.

    Args:
        name: ``name`` or ``name@version``. Manifests are asked first, then the families of the zoo, which imports their
            libraries.
        manifests: a user's own.
        weights_dir: the cache of weights; ``None``: the one that the environment names.

    Raises:
        ModelNotFound: there is none; names near matches.
        ConfigError: as in `list_models`.
    """
    weights_dir = weights_dir or default_weights_dir()
    known = _of_manifests(manifests, weights_dir)
    wanted, _, version = name.partition("@")
    if not version and wanted in known:
        return known[wanted].spec
    for one in known.values():
        if version and (one.spec.name, one.spec.version) == (wanted, version):
            return one.spec
    found = zoo.find(wanted, version)
    if found is None:
        raise ModelNotFound(f"no model {name!r} is known; {_near(wanted, version, known)}")
    return place(found, weights_dir)


def _near(name: str, version: str, known: dict[str, KnownModel]) -> str:
    """A clause that helps with a name that nobody has."""
    own = [f"{one.spec.name}@{one.spec.version}" for one in known.values()] if version else list(known)
    in_zoo = [other for names in zoo.names().values() for other in names]
    if version and name in in_zoo and (default := zoo.find(name)):
        own.append(f"{name}@{default.version}")
    wanted = f"{name}@{version}" if version else name
    if difflib.get_close_matches(wanted, [*own, *in_zoo], n=1):
        return choices(wanted, {*own, *in_zoo})
    more = f", and {len(in_zoo)} in the libraries' families; `vision-service models list` shows all" if in_zoo else ""
    return choices(wanted, own) + more


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


def place(spec: ModelSpec, folder: Path) -> ModelSpec:
    """A spec whose files are absolute paths.

    Args:
        spec: with paths relative to a folder.
        folder: which one: that of a manifest, or the cache.
    """
    if spec.weights is None:
        return spec

    def located(file: str) -> str:
        return str(folder / Path(file).expanduser())

    companions = tuple(one.model_copy(update={"file": located(one.file)}) for one in spec.weights.companions)
    moved = {"file": located(spec.weights.file), "companions": companions}
    return spec.model_copy(update={"weights": spec.weights.model_copy(update=moved)})


def _read_model(path: Path, index: int, entry: dict[str, Any]) -> ModelSpec:
    where = f"{path}: model {entry.get('name', f'number {index + 1}')!r}"
    resolved = dict(entry)
    if isinstance(entry.get("classes"), str):
        resolved["classes"] = _read_classes(where, path.parent, entry["classes"])
    try:
        return place(ModelSpec.model_validate(resolved), path.parent)
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
