"""Installs what the package needs, but not the package: a layer of an image that stays when only code changes.

Runs inside the build, with the environment's own interpreter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path


def requirements(extras: list[str], pyproject: Path = Path("pyproject.toml")) -> list[str]:
    """The requirements of the project and of some of its extras.

    Raises:
        SystemExit: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    offered = project["optional-dependencies"]
    unknown = [name for name in extras if name not in offered]
    if unknown:
        raise SystemExit(f"EXTRAS: no extra {', '.join(unknown)}; there are {', '.join(sorted(offered))}")
    return [*project["dependencies"], *(one for name in extras for one in offered[name])]


def pip(*arguments: str) -> None:
    """Run pip in this environment, and stop the build when it fails."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def install(wanted: list[str], torch_index_url: str) -> None:
    """Install, torch first and from an index of its own where there is one."""
    pins = ("-c", "constraints.txt")
    if torch_index_url:
        torch = [one for one in wanted if one.startswith(("torch>", "torchvision>"))]
        pip("install", *pins, "--index-url", torch_index_url, *torch)
    pip("install", *pins, *wanted)
    # The same OpenCV without windows: theirs need X and Mesa, 200 MB of libraries that a service never opens.
    opencv = version("opencv-python")
    pip("uninstall", "--yes", "opencv-python")
    pip("install", "--no-deps", f"opencv-python-headless=={opencv}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", default="", help="extras of the project, with commas between")
    parser.add_argument("--torch-index-url", default="", help="where torch and torchvision come from")
    chosen = parser.parse_args()
    install(requirements([name for name in chosen.extras.split(",") if name]), chosen.torch_index_url)
