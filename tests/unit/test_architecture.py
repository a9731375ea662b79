"""The house's rules about who may import whom, read from the source."""

import ast
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "vision_service"

FLOORS = [
    {"cli", "__main__"},
    {"bench"},
    {"server", "client", "evaluation", "jobs"},
    {"rpc"},
    {"engine"},
    {"backends", "runtimes"},
    {"imaging", "networks", "weights", "wire", "zoo", "records"},
    {"cluster", "config", "http2", "model_info", "segments"},
    {"types", "errors", "api"},
]
"""From the roof down: a room imports from its own floor or from those below."""


def rooms():
    return sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("vision_pb2"))


def imports(path):
    """Names of modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room):
    found = [level for level, names in enumerate(FLOORS) if room in names]
    assert found, f"room {room!r} stands on no floor: add it to FLOORS and to docs/architecture.md"
    return found[0]


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "vision_service" and len(parts) > 1 and (PACKAGE / parts[1]).with_suffix("").exists():
            assert floor_of(parts[1]) >= floor_of(room), f"{path.name} ({room}) imports {name}, which is above it"
            if room == "networks":
                assert parts[1] == "networks", f"{path.name}: a network is pure, it imports {name}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("grpc", {"server", "rpc", "client", "api"}), ("ultralytics", {"backends"}), ("torch", None)],
)
def test_only_some_rooms_use_a_library(library, allowed):
    users = {room_of(path) for path in rooms() if any(name.split(".")[0] == library for name in imports(path))}
    if library == "torch":
        assert not users & {"types", "errors", "config", "client", "cli", "wire", "model_info"}
    else:
        assert users <= allowed


def test_one_file_imports_ultralytics_and_not_when_it_is_imported():
    users = [path for path in rooms() if any(name.split(".")[0] == "ultralytics" for name in imports(path))]
    assert [path.name for path in users] in ([], ["ultralytics.py"])
    for path in users:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in top if "ultralytics" in ast.unparse(node).split()]


def test_the_batcher_knows_neither_torch_nor_grpc():
    for name in ("batcher", "queue", "admission"):
        used = {imported.split(".")[0] for imported in imports(PACKAGE / "engine" / f"{name}.py")}
        assert not used & {"torch", "grpc", "numpy", "cv2"}


def test_help_and_client_import_no_torch():
    code = "import sys, vision_service.cli, vision_service.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_generated_code_is_what_the_protos_say(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "generate_protos.py", "--output", tmp_path], check=True)
    for made in sorted((tmp_path / "vision_service" / "api" / "v1").iterdir()):
        assert made.read_text() == (PACKAGE / "api" / "v1" / made.name).read_text(), "run `make protos`"


def test_every_field_and_method_of_the_api_is_documented():
    lines = (ROOT / "protos" / "vision" / "v1" / "vision.proto").read_text().splitlines()
    for number, line in enumerate(lines):
        text = line.strip()
        declares = text.startswith(("rpc ", "message ", "enum ", "service ")) or (" = " in text and text.endswith(";"))
        if declares and not text.startswith(("syntax", "package", "//")):
            assert lines[number - 1].strip().startswith("//"), f"line {number + 1}: {text}"
