"""Shared fixtures. A test's mark comes from its folder."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import PLUGINS, ROOT

# Read when torch is imported. The networks here are tiny, and threads that wait for each other on a busy machine cost
# several times what they save. What a test sets itself, such as a thread budget, still holds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = ROOT.parent / "shared"

sys.path.insert(0, str(PLUGINS))  # as if the third party's package were installed


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in {"unit", "contract", "e2e", "gpu"}:
            item.add_marker(folder)
        if item.get_closest_marker("yolo") and find_spec("ultralytics") is None:
            item.add_marker(
                pytest.mark.skip(reason="the package ultralytics (AGPL-3.0, extra `yolo`) is not installed")
            )


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    """What the person who runs the tests has in the cache of weights, and in its registry, changes no outcome."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISION_SERVICE_WEIGHTS_DIR", str(tmp_path_factory.mktemp("weights")))
        yield


@pytest.fixture(scope="session")
def samples() -> dict[str, bytes]:
    """The photos that ship with the project, by name."""
    return {path.stem: path.read_bytes() for path in sorted((ROOT / "samples").glob("*.jpg"))}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data that is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs the evaluation data in ../shared, which is not part of the project")
    return SHARED
