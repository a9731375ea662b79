"""From settings to a running pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vision_service.config import ModelSpec
from vision_service.config.settings import EMBEDDED_MODELS, ServerSettings
from vision_service.engine.catalog import Catalog
from vision_service.engine.loaded import pick_device
from vision_service.engine.pipeline import Pipeline
from vision_service.engine.threads import ForwardGate, ThreadBudget, usable_cores
from vision_service.errors import ConfigError, WeightsError, choices
from vision_service.imaging.decode import DecodeLimits
from vision_service.runtimes import Execution
from vision_service.weights.download import FetchOptions, Watcher
from vision_service.weights.manifest import find_model
from vision_service.weights.pull import pull, wanted

logger = logging.getLogger(__name__)


def resolve_specs(settings: ServerSettings) -> list[ModelSpec]:
    """The specs to serve: from the manifests and the zoo, with the settings' replacements.

    Raises:
        ConfigError: a model is unknown, a replacement is for a model that is not served, or it does not fit.
    """
    for name in settings.trusted_models:
        if name not in settings.models:
            raise ConfigError(f"trusted_models has {name!r}, which is not served; {choices(name, settings.models)}")
    for name in settings.model:
        if name not in settings.models:
            raise ConfigError(f"settings for model {name!r}, which is not served; {choices(name, settings.models)}")
    specs = []
    for name in settings.models:
        found = find_model(name, settings.manifests, weights_dir=settings.weights_dir)
        spec = replace_fields(found, settings.model.get(name, {}))
        if name in settings.trusted_models:
            spec = replace_fields(spec, {"trusted": True})
        for field in ("device", "runtime", "precision"):
            if getattr(spec, field) == "auto":
                spec = replace_fields(spec, {field: getattr(settings, field)})
        if spec.calibration_folder is None and settings.calibration_folder is not None:
            spec = replace_fields(spec, {"calibration_folder": settings.calibration_folder})
        specs.append(spec)
    for task, name in settings.default_models.items():
        default = next((spec for spec in specs if spec.name == name), None)
        if default is None:
            near = choices(name, {spec.name for spec in specs})
            raise ConfigError(f"default_models.{task} is {name!r}, which is not served; {near}")
        if default.task is not task:
            raise ConfigError(f"default_models.{task} is {name!r}, which is a {default.task} model")
    return specs


def pull_missing(specs: Sequence[ModelSpec], settings: ServerSettings, watcher: Watcher | None = None) -> None:
    """Fetch the weight files that models miss.

    Args:
        specs: from `resolve_specs`.
        settings: where from and where to; unless all models are required, a failure is logged and the model will fail
            to load.
        watcher: told what happens; the log without one.

    Raises:
        WeightsError: a file could not be had and all models are required; says which and what to do next.
    """
    try:
        pull(wanted(specs), FetchOptions.from_settings(settings), watcher)
    except WeightsError as error:
        if settings.require_all_models:
            raise
        logger.error("%s", error)


def replace_fields(spec: ModelSpec, replacements: Mapping[str, Any]) -> ModelSpec:
    """A spec with some fields replaced, nested ones merged.

    Raises:
        ConfigError: a field does not exist or a value does not fit; names it.
    """
    if not replacements:
        return spec
    try:
        return ModelSpec.model_validate(_merge(spec.model_dump(), replacements))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"the settings for model {spec.name!r} are wrong: {problems}") from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        # Another resize mode has other fields: it replaces the old one whole.
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("mode") in (None, old.get("mode")):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def build_pipeline(settings: ServerSettings, specs: Sequence[ModelSpec]) -> Pipeline:
    """A pipeline with its threads planned and no model loaded yet.

    Args:
        settings: of the process.
        specs: the models that will be loaded.
    """
    on_gpu = bool(specs) and all(pick_device(spec.device).type == "cuda" for spec in specs)
    budget = ThreadBudget.plan(
        usable_cores(),
        on_gpu=on_gpu,
        decode_workers=settings.decode_workers,
        runtime_threads=settings.runtime_threads,
        forward_passes=settings.forward_passes,
    )
    budget.apply()
    return Pipeline(
        Catalog(
            settings.default_models,
            Execution(
                budget.runtime_threads,
                settings.compile_cache_dir,
                budget.forward_passes,
                budget.threads_beside,
                settings.compute_nice,
            ),
            ForwardGate(budget.cores),
        ),
        decode_workers=budget.decode_workers,
        nice=settings.compute_nice,
        limits=DecodeLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
        max_decoding_jobs=settings.max_decoding_jobs,
    )


@contextmanager
def local_pipeline(
    models: Sequence[str] = EMBEDDED_MODELS,
    *,
    device: str = "auto",
    runtime: str | None = None,
    precision: str | None = None,
    manifests: Sequence[Path] = (),
) -> Iterator[Pipeline]:
    """A pipeline in this process with models loaded; closed on the way out.

    Args:
        models: names in the manifests and the zoo; missing weights are fetched.
        device: where models run whose spec says ``auto``.
        runtime: how models are executed whose spec says ``auto``; ``None``: as the environment says.
        precision: of models whose spec says ``auto``; likewise.
        manifests: manifests of further models.

    Raises:
        ConfigError: a model is unknown or cannot be loaded.
    """
    chosen: dict[str, Any] = {
        name: value for name, value in (("runtime", runtime), ("precision", precision)) if value is not None
    }
    settings = ServerSettings.read(models=tuple(models), device=device, manifests=tuple(manifests), **chosen)
    specs = resolve_specs(settings)
    with build_pipeline(settings, specs) as pipeline:
        pull_missing(specs, settings)
        for spec in specs:
            pipeline.catalog.load(spec)
        yield pipeline
