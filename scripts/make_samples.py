"""Write samples/*.jpg from the photos that scikit-image ships as PNG (`pip install scikit-image`).

Their origin, authors and licences stand in samples/README.md. The PNGs are 0.2 to 0.8 MB; JPEG at quality 92 is what
a photo usually comes as, and keeps the repository small.

    python scripts/make_samples.py
"""

from pathlib import Path

from skimage import data

from vision_service.imaging.encode import encode_image

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
QUALITY = 92


def main():
    for load in (data.astronaut, data.chelsea, data.coffee):
        path = SAMPLES / f"{load.__name__}.jpg"
        path.write_bytes(encode_image(load(), "jpeg", QUALITY))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
