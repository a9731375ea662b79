"""Settings of a serving process: flags over environment over file over defaults, read once."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from vision_service.config.specs import PrecisionName, RuntimeName
from vision_service.errors import ConfigError, choices
from vision_service.types import Task

ENV_PREFIX = "VISION_SERVICE_"
EMBEDDED_MODELS = ("mobilenet_v2", "nanodet_g", "selfie_segmentation", "esrgan_slim_x2")
MIB = 1024 * 1024

Count = Annotated[int, Field(ge=1)]


class ServerSettings(BaseSettings):
    """What `serve` can be told, by flag, by environment (``VISION_SERVICE_PORT=...``) or by file (TOML).

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        models: which models to serve, by name in the manifests.
        manifests: manifests of further models (TOML files like the one in ``weights/``).
        default_models: for a task, the model that answers calls that name none; else the first of ``models``.
        model: per model name, fields of its spec to replace, such as ``batching.max_batch_size``.
        weights_dir: the cache of weights, where the user's registry ``models.toml`` lies as well.
        weights_mirror: where to fetch from instead of the hosts that specs name; see docs/weights.md.
        offline: never use the network to fetch weights.
        trusted_models: models whose weight files may run code when they are loaded (pickles), by name as in ``models``.
        device: where models run whose spec says ``auto``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        runtime: how models are executed whose spec says ``auto``: ``auto``, ``torch``, ``openvino``, ...
        precision: of models whose spec says ``auto``: ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        calibration_folder: images for precision ``int8``, for models whose spec names no folder.
        compile_cache_dir: where compiled networks are kept for the next start; by default beside ``weights_dir``.
        require_all_models: stop when a model cannot be loaded; otherwise serve the others.
        decode_workers: threads that decode and preprocess; 0 plans them from the usable cores.
        runtime_threads: threads inside one forward pass on the CPU; 0 plans them from the usable cores.
        forward_passes: forward passes of one model that may run on the CPU at one time, and share the threads; 0 plans
            them from the usable cores.
        compute_nice: by how much threads that decode and compute are nicer (see ``man 2 nice``) than those that talk to
            callers, which have short slices besides (`vision_service.engine.slices`); 0: neither.
        transport: what takes calls: ``asyncio``, gRPC by this project on the event loop, or ``grpcio``, gRPC's own
            server, which costs a call more; see docs/serving.md.
        grpc_experiments: what ``serve`` sets gRPC's variable ``GRPC_EXPERIMENTS`` to where nobody else has; empty:
            nothing. See docs/decisions.md.
        max_image_bytes: largest encoded or raw image, bytes.
        max_image_pixels: largest image, pixels, read from its header before it is decoded.
        max_message_bytes: largest gRPC message in either direction, bytes.
        max_decoding_jobs: most images decoding or waiting to be.
        drain_timeout_s: how long calls under way may take after SIGTERM.
        log_level: least severe level that is logged.
        log_format: ``json`` for machines, ``text`` for people.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", protected_namespaces=()
    )

    host: str = "0.0.0.0"  # noqa: S104 - a server in a container is reached from outside it
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    models: Annotated[tuple[str, ...], NoDecode] = EMBEDDED_MODELS
    manifests: Annotated[tuple[Path, ...], NoDecode] = ()
    default_models: dict[Task, str] = {}
    model: dict[str, dict[str, Any]] = {}
    weights_dir: Path = Field(default_factory=lambda: default_weights_dir())
    weights_mirror: Annotated[str, Field(pattern=r"^([a-z][a-z0-9+.-]*://.*)?$")] = ""
    offline: bool = False
    trusted_models: Annotated[tuple[str, ...], NoDecode] = ()
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    runtime: RuntimeName = "auto"
    precision: PrecisionName = "auto"
    calibration_folder: Path | None = None
    compile_cache_dir: Path = Field(default_factory=lambda read: _beside(read.get("weights_dir")))
    require_all_models: bool = True
    decode_workers: Annotated[int, Field(ge=0)] = 0
    runtime_threads: Annotated[int, Field(ge=0)] = 0
    forward_passes: Annotated[int, Field(ge=0)] = 0
    compute_nice: Annotated[int, Field(ge=0, le=19)] = 10
    transport: Literal["asyncio", "grpcio"] = "asyncio"
    grpc_experiments: str = "-event_engine_listener"
    max_image_bytes: Count = 32 * MIB
    max_image_pixels: Count = 50_000_000
    max_message_bytes: Count = 64 * MIB
    max_decoding_jobs: Count = 256
    drain_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "text"

    @classmethod
    def read(cls, config_file: Path | None = None, **flags: Any) -> ServerSettings:
        """Read all sources.

        Args:
            config_file: a TOML file with fields of this class.
            **flags: fields given on the command line; they win.

        Raises:
            ConfigError: a source cannot be read, or a value is wrong; names each.
        """
        _refuse_unknown_environment(cls)
        from_file = _read_toml(config_file) if config_file is not None else {}

        class WithFile(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], init_settings: Any, env_settings: Any, **others: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

        try:
            settings: ServerSettings = WithFile(**flags)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"the settings are wrong: {problems}") from None
        except SettingsError as error:
            raise ConfigError(f"the environment is wrong: {error}") from None
        return settings

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in models if models.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice")
        return models

    @field_validator("models", "manifests", "trusted_models", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("weights_dir", "compile_cache_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()


def default_weights_dir() -> Path:
    """The cache of weights where nothing else is set: ``VISION_SERVICE_WEIGHTS_DIR``, else below the user's cache."""
    if chosen := os.environ.get(f"{ENV_PREFIX}WEIGHTS_DIR"):
        return Path(chosen).expanduser().absolute()
    # XDG Base Directory Specification: a relative path in the variable is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "vision-service" / "weights"


def _beside(weights_dir: Path | None) -> Path:
    """Where compiled networks go by default. There is no ``weights_dir`` when what was given for it is wrong."""
    return (weights_dir or default_weights_dir()).parent / "compiled"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} is not TOML: {error}") from None


def _refuse_unknown_environment(cls: type[ServerSettings]) -> None:
    """A misspelt variable would have no effect and nobody would notice."""
    for variable in os.environ:
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable.removeprefix(ENV_PREFIX).split("__")[0].lower()
        if name not in cls.model_fields:
            raise ConfigError(f"environment variable {variable}: no such setting; {choices(name, cls.model_fields)}")
