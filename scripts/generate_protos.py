"""Generates vision_service/api from protos/.

The proto file is given to protoc under the package's own path, so the generated imports are right as they come.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(output: Path) -> None:
    """Generate into a folder.

    Args:
        output: the folder that holds (or will hold) ``vision_service/api/v1``.
    """
    code = protoc.main(
        [
            "protoc",
            f"-Ivision_service/api/v1={ROOT / 'protos' / 'vision' / 'v1'}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            f"--grpc_python_out={output}",
            "vision_service/api/v1/vision.proto",
        ]
    )
    if code:
        sys.exit(f"protoc failed with exit code {code}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT)
    generate(parser.parse_args().output)
