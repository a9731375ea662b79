"""A job that is stopped, however it is stopped, goes on to what an uninterrupted one has."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path

import cv2
import pytest
from typer.testing import CliRunner

from tests.helpers import red_image, tiny_manifest
from tests.job_processes import kill_at_30_60_and_90_percent, lines_in, start, wait_for_lines
from vision_service.cli import app
from vision_service.cli.job_progress import progress_line
from vision_service.errors import ConfigError
from vision_service.jobs.job import Tolerance
from vision_service.jobs.journal import DATABASE, Journal

IMAGES = 200
TORCH = 'runtime = "torch"'  # quicker to load


def save(path: Path, red: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), red_image(red)[..., ::-1])
    return path


def arguments(folder: Path, output: Path, *more) -> list[str]:
    manifest = folder.parent / "manifest.toml"
    words = ("predict", folder, "--model", "tiny", "--manifest", manifest, "--output", output, *more)
    return [str(word) for word in words]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def rows(output: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten images and a manifest beside them."""
    tiny_manifest(tmp_path, tiny=TORCH, other=TORCH)
    for red in range(10):
        save(tmp_path / "photos" / f"{red}.png", red)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    tiny_manifest(folder, tiny=f"{TORCH}\noptions.sleep_s = 0.01")
    for index in range(IMAGES):
        save(folder / "photos" / f"{index:03d}.png", index)
    return folder / "photos"


@pytest.fixture(scope="module")
def uninterrupted(many) -> bytes:
    output = many.parent / "whole"
    assert run(*arguments(many, output)).exit_code == 0
    content = (output / "results.jsonl").read_bytes()
    assert content.count(b"\n") == IMAGES
    return content


class TestStopped:
    def test_killed_at_30_60_and_90_percent(self, many, uninterrupted):
        output = many.parent / "killed"
        kill_at_30_60_and_90_percent(output, IMAGES, *arguments(many, output))
        last = run(*arguments(many, output, "--save", "csv"))
        assert last.exit_code == 0
        assert "going on after" in last.stderr
        assert (output / "results.jsonl").read_bytes() == uninterrupted
        assert len((output / "results.csv").read_text().splitlines()) == 1 + IMAGES

    def test_interrupted(self, many, uninterrupted):
        output = many.parent / "interrupted"
        process = start(*arguments(many, output))
        wait_for_lines(process, output, 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command goes on from here" in said.decode()
        assert 0 < lines_in(output) < IMAGES
        assert run(*arguments(many, output)).exit_code == 0
        assert (output / "results.jsonl").read_bytes() == uninterrupted


class TestGoingOn:
    def test_what_is_done_is_not_done_again(self, photos, tmp_path):
        from tiny_backend import SEEN

        words = arguments(photos, tmp_path / "out")
        assert run(*words).exit_code == 0
        before = (tmp_path / "out" / "results.jsonl").read_bytes()
        SEEN.clear()
        again = run(*words)
        assert (again.exit_code, again.stdout) == (0, "")
        assert not set(SEEN) - {127}  # the grey image of the warm-up
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == before

    def test_changed_and_new_files_are_done(self, photos, tmp_path):
        words = arguments(photos, tmp_path / "out")
        run(*words)
        save(photos / "3.png", 33)
        save(photos / "4a.png", 44)
        again = run(*words, "--json")
        assert [Path(json.loads(line)["file"]).name for line in again.stdout.splitlines()] == ["3.png", "4a.png"]
        found = {Path(row["file"]).name: row["classes"][0]["class_id"] for row in rows(tmp_path / "out")}
        assert found == {f"{red}.png": red for red in range(10)} | {"3.png": 33, "4a.png": 44}
        assert len(rows(tmp_path / "out")) == 11

    @pytest.mark.parametrize("change", [("--class", "3"), ("--timings",), ("--save", "pictures"), ("--restart",)])
    def test_other_choices_do_all_again(self, photos, tmp_path, change):
        words = arguments(photos, tmp_path / "out")
        run(*words)
        again = run(*words, *change)
        assert "all images are done again" in again.stderr
        assert len(again.stdout.splitlines()) == 10
        assert len(rows(tmp_path / "out")) == 10

    def test_another_output_at_the_end_needs_no_model(self, photos, tmp_path):
        run(*arguments(photos, tmp_path / "out"))
        again = run(*arguments(photos, tmp_path / "out", "--save", "csv"))
        assert again.stdout == ""
        assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 11

    def test_another_model_does_all_again(self, photos, tmp_path):
        run(*arguments(photos, tmp_path / "out"))
        run(*arguments(photos, tmp_path / "out", "--model", "other"))
        assert [row["model"] for row in rows(tmp_path / "out")] == ["tiny", "other"] * 10

    def test_a_torn_tail_is_cut_off(self, photos, tmp_path):
        words = arguments(photos, tmp_path / "out")
        run(*words)
        results = tmp_path / "out" / "results.jsonl"
        whole = results.read_bytes()
        results.write_bytes(whole + b'{"file": "half a li')
        assert run(*words).exit_code == 0
        assert results.read_bytes() == whole

    def test_a_file_that_somebody_shortened_is_not_built_upon(self, photos, tmp_path):
        words = arguments(photos, tmp_path / "out")
        run(*words)
        (tmp_path / "out" / "results.jsonl").write_bytes(b"")
        again = run(*words)
        assert again.exit_code == 2
        assert "--restart starts anew" in again.stderr
        assert run(*words, "--restart").exit_code == 0
        assert len(rows(tmp_path / "out")) == 10

    def test_a_damaged_journal_is_said(self, tmp_path):
        (tmp_path / DATABASE).write_bytes(b"no database" * 100)
        with pytest.raises(ConfigError, match="is damaged"):
            Journal(tmp_path, "x")

    def test_one_job_at_a_time(self, tmp_path):
        with Journal(tmp_path, "x"), pytest.raises(ConfigError, match="another job writes to"):
            Journal(tmp_path, "x")

    def test_cut_off_between_new_files_and_their_names(self, photos, tmp_path):
        """As if the process had died right after it noted that lines of a changed image are to go."""
        words = arguments(photos, tmp_path / "out")
        run(*words)
        results = tmp_path / "out" / "results.jsonl"
        kept = b"".join(line for line in results.read_bytes().splitlines(keepends=True) if b"3.png" not in line)
        (tmp_path / "out" / "results.jsonl.new").write_bytes(kept)
        (tmp_path / "out" / "failures.jsonl.new").write_bytes(b"")
        base = sqlite3.connect(tmp_path / "out" / DATABASE)
        base.execute("DELETE FROM done WHERE file LIKE '%3.png'")
        base.execute("UPDATE lengths SET bytes = ? WHERE name = 'results.jsonl'", (len(kept),))
        base.execute("INSERT INTO swaps VALUES ('results.jsonl'), ('failures.jsonl')")
        base.commit()
        base.close()
        again = run(*words)
        assert again.stdout.splitlines() == [f"{photos / '3.png'}: red 3 0.01"]
        assert sorted(row["classes"][0]["class_id"] for row in rows(tmp_path / "out")) == list(range(10))


class TestFailures:
    def broken(self, photos: Path) -> dict[str, str]:
        """One image in ten, each broken in its own way."""
        whole = cv2.imencode(".jpg", red_image(5, 200, 200))[1].tobytes()
        huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (100_000).to_bytes(4) * 2 + b"\x08\x02\0\0\0" + b"\0" * 100
        (photos / "empty.jpg").write_bytes(b"")
        (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (photos / "text.png").write_text("no image")
        (photos / "huge.png").write_bytes(huge)
        (photos / "link.png").symlink_to(photos / "0.png")
        return {"empty.jpg": "no bytes", "cut.jpg": "truncated", "text.png": "accepted are JPEG", "huge.png": "ends"}

    def test_each_has_its_reason_and_the_job_completes(self, photos, tmp_path):
        for red in range(10, 36):
            save(photos / f"{red}.png", red)
        reasons = self.broken(photos)
        done = run(*arguments(photos, tmp_path / "out"))
        assert done.exit_code == 1
        assert "4 failed:" in done.stderr
        failures = {Path(row["file"]).name: row for row in rows(tmp_path / "out", "failures.jsonl")}
        assert failures.keys() == reasons.keys()
        for name, word in reasons.items():
            assert failures[name]["error"] == "InvalidImage"
            assert word in failures[name]["message"]
            assert name in done.stderr
        assert len(rows(tmp_path / "out")) == 37

    def test_they_are_tried_again_when_they_change_or_on_demand(self, photos, tmp_path):
        words = arguments(photos, tmp_path / "out")
        (photos / "bad.png").write_text("no image")
        assert run(*words).exit_code == 1
        again = run(*words)
        assert (again.exit_code, again.stdout) == (1, "")
        assert "1 failed in earlier runs; --retry-failures tries them again" in again.stderr
        assert "1 failed:" in run(*words, "--retry-failures").stderr
        assert len(rows(tmp_path / "out", "failures.jsonl")) == 1
        save(photos / "bad.png", 99)
        assert run(*words).exit_code == 0
        assert not (tmp_path / "out" / "failures.jsonl").exists()
        assert len(rows(tmp_path / "out")) == 11

    def test_what_may_pass_is_tried_again_by_itself(self, photos, tmp_path):
        listed = tmp_path / "list.txt"
        listed.write_text(f"{photos / '1.png'}\n{photos / 'later.png'}\n")
        words = arguments(photos, tmp_path / "out")
        words[1] = f"@{listed}"
        assert run(*words).exit_code == 1
        assert "later.png cannot be read: No such file" in rows(tmp_path / "out", "failures.jsonl")[0]["message"]
        save(photos / "later.png", 77)
        assert run(*words).exit_code == 0
        assert [row["classes"][0]["class_id"] for row in rows(tmp_path / "out")] == [1, 77]

    @pytest.mark.parametrize(("most", "stops"), [("0", True), ("40", False), ("20%", True), ("90%", False)])
    def test_too_many_stop_the_job(self, photos, tmp_path, most, stops):
        for index in range(40):
            (photos / f"bad{index:02d}.png").write_text("no image")
        for red in range(100, 150):
            save(photos / f"z{red}.png", red)
        done = run(*arguments(photos, tmp_path / "out", "--max-failures", most))
        assert done.exit_code == 1
        assert ("more failed than --max-failures allows; the same command goes on" in done.stderr) == stops
        assert (len(rows(tmp_path / "out")) < 60) == stops

    @pytest.mark.parametrize(
        ("text", "failed", "seen", "passed"),
        [
            (None, 9, 9, False),
            ("2", 2, 2, False),
            ("2", 3, 3, True),
            ("10%", 49, 49, False),
            ("10%", 5, 50, False),
            ("10%", 6, 50, True),
        ],
    )
    def test_tolerance(self, text, failed, seen, passed):
        assert Tolerance.parse(text).is_passed(failed, seen) == passed

    @pytest.mark.parametrize("text", ["", "x", "-1", "101%", "nan%", "%"])
    def test_no_tolerance(self, text):
        with pytest.raises(ConfigError, match="number of images or a percentage"):
            Tolerance.parse(text)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((350, 1000, 5.0), "350 of 1000 images, 70.0/s, 9 s left"),
        ((350, None, 5.0), "350 images, 70.0/s"),
        ((0, 10, 0.0), "0 of 10 images, 0.0/s"),
    ],
)
def test_progress_in_a_pipe(values, line):
    assert progress_line(*values) == line
