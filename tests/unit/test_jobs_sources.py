"""What a command line names, in which order, and from which stores."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import cv2
import fsspec
import numpy as np
import pytest

from tests.helpers import red_image
from vision_service.errors import ConfigError, InvalidImage
from vision_service.imaging.decode import DecodeLimits
from vision_service.jobs.items import Frame, Item
from vision_service.jobs.predictor import read_item
from vision_service.jobs.sources import list_files, may_have_video, plain_name
from vision_service.jobs.video import Step, count_frames, frames_of


def names(*sources) -> list[str]:
    return [str(item.name) for item in list_files([str(source) for source in sources])]


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "photos"
    for name in ("b.png", "a.jpg", "deep/er/z.JPG", "deep/c.webp", "deep.jpg", "notes.txt", "deep/x[1].png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "circle").symlink_to(root)
    return root


class TestLocal:
    def test_folders_in_the_order_of_paths_part_by_part(self, tree):
        found = names(tree)
        assert found == ["a.jpg", "b.png", "deep/c.webp", "deep/er/z.JPG", "deep/x[1].png", "deep.jpg"]
        # The same as sorting the whole list by its parts, which is never made.
        assert found == [str(path) for path in sorted(map(PurePosixPath, found))]

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.jpg", ["a.jpg", "deep.jpg"]),
            ("**/*.png", ["b.png", "deep/x[1].png"]),
            ("**/*.[jJ][pP][gG]", ["a.jpg", "deep/er/z.JPG", "deep.jpg"]),
            ("deep/*.webp", ["c.webp"]),
            ("*/*.webp", ["deep/c.webp"]),
            ("?.png", ["b.png"]),
            ("*.txt", ["notes.txt"]),
            ("*.gif", []),
        ],
    )
    def test_patterns(self, tree, pattern, expected):
        assert names(f"{tree}/{pattern}") == expected

    def test_relative_patterns(self, tree, monkeypatch):
        monkeypatch.chdir(tree)
        assert [item.file for item in list_files(["*.jpg"])] == ["a.jpg", "deep.jpg"]
        assert names("**/*.webp") == ["deep/c.webp"]
        assert names("deep/**/*.JPG") == ["er/z.JPG"]

    def test_a_name_with_magic_in_it_is_a_name_when_it_exists(self, tree):
        assert names(tree / "deep" / "x[1].png") == ["x[1].png"]

    def test_files_are_taken_at_their_word_and_once(self, tree):
        assert names(tree / "notes.txt") == ["notes.txt"]
        assert names(tree / "b.png", tree, f"{tree}/*.png")[:2] == ["b.png", "a.jpg"]
        assert len(names(tree / "b.png", tree, f"{tree}/*.png")) == 6

    def test_lists(self, tree, tmp_path):
        listed = tmp_path / "list.txt"
        listed.write_text(f"# chosen\n{tree / 'b.png'}\n\n{tree / 'gone.png'}\n{tree / 'b.png'}\n")
        found = list(list_files([f"@{listed}"]))
        assert [Path(item.file).name for item in found] == ["b.png", "gone.png"]
        assert [item.size_bytes for item in found] == [5, -1]

    def test_nothing_is_listed_ahead(self, tree):
        stream = list_files([str(tree)])
        assert next(stream).name == PurePosixPath("a.jpg")
        (tree / "deep" / "late.png").write_bytes(b"")
        assert "deep/late.png" in [str(item.name) for item in stream]

    def test_what_changes_shows(self, tree):
        (before,) = list_files([str(tree / "a.jpg")])
        (tree / "a.jpg").write_bytes(b"other")
        (after,) = list_files([str(tree / "a.jpg")])
        assert before.stamp != after.stamp
        assert before.file == after.file

    @pytest.mark.parametrize("named", ["gone.png", "@gone.txt", "nowhere/"])
    def test_what_is_not_there(self, named):
        with pytest.raises(ConfigError, match="does not exist"):
            list_files([named])

    def test_no_sources(self):
        with pytest.raises(ConfigError, match="name files, folders"):
            list_files([])

    @pytest.mark.parametrize("text", ["/etc/passwd", "../../a", "a/../../b", "..", ""])
    def test_names_stay_below(self, text):
        name = plain_name(text)
        assert not name.is_absolute()
        assert ".." not in name.parts
        assert name.parts


class TestStores:
    @pytest.fixture
    def memory(self):
        store = fsspec.filesystem("memory")
        for name in ("b.png", "a.jpg", "deep/c.png", "notes.txt"):
            store.pipe(f"/photos/{name}", name.encode())
        yield "memory://photos"
        store.rm("/photos", recursive=True)

    def test_folders_patterns_and_files(self, memory):
        assert names(memory) == ["a.jpg", "b.png", "deep/c.png"]
        assert names(f"{memory}/**/*.png") == ["b.png", "deep/c.png"]
        assert names(f"{memory}/*.png") == ["b.png"]
        assert names(f"{memory}/notes.txt") == ["notes.txt"]

    def test_content_size_and_stamp(self, memory):
        (item,) = list_files([f"{memory}/deep/*.png"])
        assert (item.file, item.size_bytes) == ("memory:///photos/deep/c.png", 10)
        assert item.stamp
        assert read_item(item, DecodeLimits()) == b"deep/c.png"

    def test_too_large_is_refused_before_it_is_read(self, memory):
        (item,) = list_files([f"{memory}/deep/*.png"])
        with pytest.raises(InvalidImage, match="has 10 bytes, the limit is 9"):
            read_item(item, DecodeLimits(max_bytes=9))

    def test_what_is_not_there_fails_when_it_is_read(self, memory):
        (item,) = list_files([f"{memory}/gone.png"])
        with pytest.raises(OSError, match="gone"):
            read_item(item, DecodeLimits())

    def test_urls_of_files_on_this_machine(self, tree):
        assert names(f"file://{tree}/deep") == ["c.webp", "er/z.JPG", "x[1].png"]

    def test_an_unknown_store(self):
        with pytest.raises(ConfigError, match=r"pip install 'vision-service\[remote\]'"):
            list(list_files(["nosuch://bucket/photos"]))

    def test_a_web_server(self, tree):
        pytest.importorskip("aiohttp")

        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tree)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            (item,) = list_files([f"{url}/a.jpg"])
            assert (item.size_bytes, read_item(item, DecodeLimits())) == (5, b"a.jpg")
            assert names(f"{url}/deep/er/") == ["z.JPG"]
            (gone,) = list_files([f"{url}/gone.jpg"])
            with pytest.raises(OSError, match=r"gone\.jpg"):
                read_item(gone, DecodeLimits())
        finally:
            server.shutdown()
            server.server_close()


@pytest.fixture
def clip(tmp_path) -> Path:
    """Two seconds at ten frames a second; the frame's number times ten is its red."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for index in range(20):
        writer.write(red_image(10 * index, 48, 64)[..., ::-1])
    writer.release()
    return path


class TestVideo:
    @pytest.mark.parametrize(
        ("step", "indices"),
        [
            (Step(), range(20)),
            (Step(frames=7), [0, 7, 14]),
            (Step(seconds=0.5), [0, 5, 10, 15]),
            (Step(seconds=0.25), [0, 3, 5, 8, 10, 13, 15, 18]),
            (Step(seconds=100), [0]),
        ],
    )
    def test_frames(self, clip, step, indices):
        (video,) = list_files([str(clip)])
        assert video.is_video
        frames = list(frames_of(video, step))
        assert [frame.frame.index for frame in frames] == list(indices)
        assert count_frames(video, step) == len(frames)
        for frame in frames:
            assert frame.frame.time_s == pytest.approx(frame.frame.index / 10, abs=1e-3)
            assert abs(float(frame.pixels[..., 0].mean()) - 10 * frame.frame.index) < 6
            assert frame.pixels[..., 2].mean() < 10

    def test_names_have_index_and_time(self, clip):
        (video,) = list_files([str(clip)])
        frame = video.at(Frame(15, 1.5))
        assert (frame.file, str(frame.name)) == (f"{clip}#frame=15&t=1.500", "clip/000015_1500ms.frame")
        assert frame.source == str(clip)

    def test_frames_that_are_done_are_not_converted(self, clip):
        (video,) = list_files([str(clip)])
        left = list(frames_of(video, Step(), lambda item: item.frame.index >= 18))
        assert [frame.frame.index for frame in left] == [18, 19]

    def test_no_video(self, tmp_path):
        (tmp_path / "bad.mp4").write_bytes(b"not a video")
        with pytest.raises(InvalidImage, match="cannot be opened as a video"):
            list(frames_of(Item(str(tmp_path / "bad.mp4"), PurePosixPath("bad.mp4")), Step()))

    def test_steps_that_mean_nothing(self):
        for wrong in ({"frames": 0}, {"seconds": 0.0}, {"seconds": float("nan")}):
            with pytest.raises(ConfigError, match="must be above 0"):
                Step(**wrong)
        with pytest.raises(ConfigError, match="choose one"):
            Step(2, 0.5)

    def test_which_sources_may_be_videos(self):
        assert [may_have_video([one]) for one in ("a.MP4", "x/*.mov", "@list.txt", "a.jpg", "photos")] == [
            *(True, True, True),
            *(False, False),
        ]


def test_pixels_do_not_count_when_items_are_compared():
    item = Item("a", PurePosixPath("a"), pixels=np.zeros((1, 1, 3), np.uint8))
    assert item == Item("a", PurePosixPath("a"))
