"""Settings of the process and specs of the models: read once, typed, frozen."""

from vision_service.config.specs import (
    BatchingSpec,
    FileSpec,
    Letterbox,
    Limit,
    ModelSpec,
    Native,
    PreprocessSpec,
    ShortestSideCrop,
    Stretch,
    WeightsSpec,
)

__all__ = [
    "BatchingSpec",
    "FileSpec",
    "Letterbox",
    "Limit",
    "ModelSpec",
    "Native",
    "PreprocessSpec",
    "ShortestSideCrop",
    "Stretch",
    "WeightsSpec",
]
