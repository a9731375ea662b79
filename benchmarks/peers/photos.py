"""The images that are sent."""

from pathlib import Path


def read_jpegs(folder: Path) -> list[bytes]:
    """The JPEG files of a folder, by name."""
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
