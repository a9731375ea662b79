"""How far two `results.jsonl` of the same images are apart: of `predict` and `client`, of two runs, of two machines.

    python scripts/compare_results.py in-process/results.jsonl served/results.jsonl

Objects are matched by class and place, classes by class; order does not count, since equal scores may come in either.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Apart:
    """How far a model's answers are apart.

    Attributes:
        images: compared.
        equal: of those, with equal records.
        matched: classes or objects that both have.
        score: largest difference of a score, 0..1.
        edge_px: largest difference of a box's edge, pixels of the image.
        area: largest difference of a segment's area, as a share of the image.
        alone: what only one has: file, class, score.
    """

    images: int = 0
    equal: int = 0
    matched: int = 0
    score: float = 0.0
    edge_px: float = 0.0
    area: float = 0.0
    alone: list[tuple[str, str, float]] = field(default_factory=list)


def compare(one: Path, other: Path) -> dict[str, Apart]:
    """By model.

    Raises:
        ValueError: they are not about the same images and models.
    """
    left, right = read(one), read(other)
    if left.keys() != right.keys():
        some = sorted(left.keys() ^ right.keys())[:3]
        raise ValueError(f"{one} and {other} are not about the same images and models: {some} in one of them only")
    found: dict[str, Apart] = {}
    for (file, model), record in left.items():
        apart = found.setdefault(model, Apart())
        apart.images += 1
        apart.equal += record == right[file, model]
        add(apart, file, record, right[file, model])
    return found


def add(apart: Apart, file: str, left: Row, right: Row) -> None:
    """Count an image."""
    (rows, others), size = (rows_of(left), rows_of(right)), left["height"] * left["width"]
    for row in rows:
        alike = [other for other in others if other["class_id"] == row["class_id"]]
        if not alike:
            apart.alone.append((file, row["class_name"], row.get("score", 1.0)))
            continue
        nearest = min(alike, key=lambda other: edges_apart(row, other))
        others.remove(nearest)
        apart.matched += 1
        apart.score = max(apart.score, abs(row.get("score", 1.0) - nearest.get("score", 1.0)))
        apart.edge_px = max(apart.edge_px, edges_apart(row, nearest))
        apart.area = max(apart.area, abs(row.get("area", 0) - nearest.get("area", 0)) / size)
    apart.alone += [(file, other["class_name"], other.get("score", 1.0)) for other in others]


def edges_apart(one: Row, other: Row) -> float:
    """Largest difference of an edge, pixels; 0 of classes, which have no box."""
    return max((abs(a - b) for a, b in zip(one.get("box", ()), other.get("box", ()), strict=True)), default=0.0)


def rows_of(record: Row) -> list[Row]:
    """Its classes, objects or segments."""
    return list(next((record[key] for key in ("classes", "detections", "segments") if key in record), []))


def read(path: Path) -> dict[tuple[str, str], Row]:
    """Records by file and model."""
    with path.open(encoding="utf-8") as lines:
        records = map(json.loads, lines)
        return {(record["file"], record["model"]): record for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    chosen = parser.parse_args()
    try:
        found = compare(chosen.one, chosen.other)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for model, apart in found.items():
        print(f"{model}: {apart.images} images, {apart.equal} with equal records; {apart.matched} in both,")
        print(f"  scores apart by at most {apart.score:.6f}, edges by {apart.edge_px:.2f} px,", end=" ")
        print(f"areas by {apart.area:.2e} of the image; in one only: {len(apart.alone)}")
        for file, name, score in apart.alone[:20]:
            print(f"    {file}: {name} {score:.6f}")


if __name__ == "__main__":
    main()
