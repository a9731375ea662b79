"""Fetching against a real server that cuts, lies, redirects and dawdles."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import threading

import fsspec
import pytest

from tests.file_server import file_server
from tests.helpers import ROOT
from vision_service.config import FileSpec
from vision_service.errors import WeightsError
from vision_service.weights import verified
from vision_service.weights.download import FetchOptions, Stopped, Watcher, fetch
from vision_service.weights.sources import CHUNK_BYTES, mirrored

CONTENT = random.Random(0).randbytes(10 * CHUNK_BYTES + 123)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Events(Watcher):
    def __init__(self):
        self.started_at, self.waits, self.checked, self.most = [], [], [], 0

    def started(self, file, url, done_bytes, total_bytes):
        self.started_at.append((done_bytes, total_bytes))

    def moved(self, file, done_bytes):
        self.most = done_bytes

    def waiting(self, file, reason):
        self.waits.append(reason)

    def finished(self, file, sha256):
        self.checked.append(sha256)


@pytest.fixture
def server():
    with file_server() as running:
        yield running


@pytest.fixture
def get(tmp_path):
    """Fetches into a folder of the test; what stands there afterwards is checked by `left`."""

    def get(url, sha256=SHA256, size_bytes=None, replace=False, **how):
        events = Events()
        file = FileSpec(file=str(tmp_path / "cache" / "net.pth"), url=url, sha256=sha256, size_bytes=size_bytes)
        options = FetchOptions(**{"weights_dir": tmp_path / "cache", "backoff_s": 0.01, "timeout_s": 5.0, **how})
        fetch(file, options, events, threading.Event(), replace=replace)
        return events

    return get


@pytest.fixture
def left(tmp_path):
    return lambda: sorted(
        path.name for path in (tmp_path / "cache").glob("*") if path.suffix != ".lock" and path.name != ".verified"
    )


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "net.pth"


@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8], ""])
@pytest.mark.parametrize("content", [b"", b"x", CONTENT], ids=["empty", "byte", "long"])
def test_a_file_arrives_and_leaves_nothing_else(server, get, left, target, sha256, content):
    sha256 = hashlib.sha256(content).hexdigest()[: len(sha256)]
    events = get(server.add("/net.pth", content), sha256)
    assert target.read_bytes() == content
    assert left() == ["net.pth"]
    assert [request.status for request in server.requests] == [200]
    assert events.started_at == [(0, len(content))] or not content
    assert events.most == len(content)
    assert events.checked == [hashlib.sha256(content).hexdigest()]


def test_what_is_here_is_not_fetched_unless_it_is_to_be_replaced(server, get, target):
    target.parent.mkdir()
    target.write_bytes(b"older")
    url = server.add("/net.pth", CONTENT)
    get(url)
    assert target.read_bytes() == b"older"
    assert not server.requests
    get(url, replace=True)
    assert target.read_bytes() == CONTENT


class TestCut:
    def test_goes_on_where_it_was_cut_and_no_byte_comes_twice(self, server, get, left, target):
        events = get(server.add("/net.pth", CONTENT, cuts=[4 * CHUNK_BYTES, 3 * CHUNK_BYTES]))
        assert target.read_bytes() == CONTENT
        assert server.sent("/net.pth") == len(CONTENT)
        assert [request.range for request in server.requests] == [
            "",
            f"bytes={4 * CHUNK_BYTES}-",
            f"bytes={7 * CHUNK_BYTES}-",
        ]
        assert events.started_at == [(n * CHUNK_BYTES, len(CONTENT)) for n in (0, 4, 7)]
        assert left() == ["net.pth"]

    def test_a_later_call_goes_on_too(self, server, get, left, target):
        url = server.add("/net.pth", CONTENT, cuts=[4 * CHUNK_BYTES])
        with pytest.raises(
            WeightsError, match=r"cannot fetch http.*bytes are kept in .*net\.pth\.part; the same command"
        ):
            get(url, tries=1)
        assert left() == ["net.pth.part", "net.pth.part.json"]
        get(url)
        assert target.read_bytes() == CONTENT
        assert server.sent("/net.pth") == len(CONTENT)
        assert left() == ["net.pth"]

    def test_a_server_without_ranges_begins_again(self, server, get, target):
        get(server.add("/net.pth", CONTENT, ranges=False, cuts=[4 * CHUNK_BYTES]))
        assert target.read_bytes() == CONTENT
        assert [request.status for request in server.requests] == [200, 200]

    @pytest.mark.parametrize("sha256", [SHA256, ""])
    def test_a_file_that_changed_meanwhile_is_not_joined_to_the_old_one(self, server, get, target, sha256):
        url = server.add("/net.pth", CONTENT[::-1], cuts=[4 * CHUNK_BYTES])
        with pytest.raises(WeightsError, match="in 1 tries"):
            get(url, sha256, tries=1)
        server.add("/net.pth", CONTENT)
        get(url, sha256)
        assert target.read_bytes() == CONTENT
        assert server.requests[-1].range
        assert server.requests[-1].status == 200  # If-Range did it

    def test_without_a_hash_or_a_validator_nothing_is_joined(self, server, get, target):
        get(server.add("/net.pth", CONTENT, etag=None, cuts=[4 * CHUNK_BYTES]), sha256="")
        assert target.read_bytes() == CONTENT
        assert [request.range for request in server.requests] == ["", ""]

    def test_a_part_of_something_else_is_found_out_by_the_hash(self, server, get, left, target):
        target.parent.mkdir()
        target.with_name("net.pth.part").write_bytes(b"?" * CHUNK_BYTES)
        get(server.add("/net.pth", CONTENT))
        assert target.read_bytes() == CONTENT
        assert [request.status for request in server.requests] == [206, 200]
        assert left() == ["net.pth"]

    @pytest.mark.parametrize(("more", "statuses"), [(0, [416]), (10, [416, 200])], ids=["complete", "too long"])
    def test_a_part_that_has_every_byte_or_more(self, server, get, target, more, statuses):
        target.parent.mkdir()
        target.with_name("net.pth.part").write_bytes(CONTENT + b"!" * more)
        get(server.add("/net.pth", CONTENT))
        assert target.read_bytes() == CONTENT
        assert [request.status for request in server.requests] == statuses

    def test_gives_up_when_nothing_more_comes(self, server, get, target):
        url = server.add("/net.pth", CONTENT, cuts=[0] * 9)
        with pytest.raises(WeightsError, match=r"in 3 tries\. 0 bytes are kept"):
            get(url, tries=3)
        assert len(server.requests) == 3
        assert not target.exists()

    def test_stopped_it_keeps_what_came(self, server, left, tmp_path):
        url = server.add("/net.pth", CONTENT, piece_delay_s=0.05)
        stop = threading.Event()
        watcher = Events()
        watcher.moved = lambda *_: stop.set()
        file = FileSpec(file=str(tmp_path / "cache" / "net.pth"), url=url)
        with pytest.raises(Stopped):
            fetch(file, FetchOptions(tmp_path / "cache"), watcher, stop)
        assert left() == ["net.pth.part", "net.pth.part.json"]
        assert (tmp_path / "cache" / "net.pth.part").stat().st_size == CHUNK_BYTES


class TestWrong:
    @pytest.mark.parametrize("digits", [64, 8])
    def test_hash(self, server, get, left, digits):
        url = server.add("/net.pth", b"a page about an error")
        with pytest.raises(
            WeightsError,
            match=f"what came from http.* has the sha256 [0-9a-f]{{64}} instead of {SHA256[:digits]}; it was",
        ):
            get(url, SHA256[:digits])
        assert left() == []

    def test_size_is_seen_before_the_body(self, server, get, left):
        url = server.add("/net.pth", CONTENT)
        with pytest.raises(WeightsError, match=rf"it has {len(CONTENT)} bytes, net\.pth should have 7\. It is another"):
            get(url, size_bytes=7)
        assert left() == []

    def test_not_found_is_said_at_once(self, server, get, left):
        with pytest.raises(WeightsError, match=r"/none\.pth: the server said 404 Not Found\. .*`weights_mirror`"):
            get(server.url + "/none.pth")
        assert len(server.requests) == 1
        assert left() == []

    def test_no_room(self, server, get, left, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(WeightsError, match=r"needs 0\.7 MB more and .* has 0\.0 MB free\. Make room"):
            get(server.add("/net.pth", CONTENT))
        assert left() == []

    def test_a_cache_that_is_no_folder(self, server, get, tmp_path):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(WeightsError, match=r"cannot be written: .*VISION_SERVICE_WEIGHTS_DIR"):
            get(server.add("/net.pth", CONTENT))

    def test_nobody_listens(self, get):
        with pytest.raises(WeightsError, match="in 2 tries"):
            get("http://127.0.0.1:9/net.pth", tries=2)

    @pytest.mark.parametrize("url", ["net.pth", "nope://host/net.pth", "http://[/net.pth", "http:///net.pth"])
    def test_not_an_address(self, get, url):
        with pytest.raises(WeightsError, match=r"net\.pth"):
            get(url)


class TestPatience:
    def test_redirects_are_followed(self, server, get, target):
        server.add("/real.pth", CONTENT)
        get(server.add("/net.pth", b"", redirect=server.url + "/real.pth"))
        assert target.read_bytes() == CONTENT

    def test_a_busy_server_is_asked_again_when_it_says(self, server, get, target):
        events = get(server.add("/net.pth", CONTENT, statuses=[503, 429], headers={"Retry-After": "0"}), backoff_s=60)
        assert target.read_bytes() == CONTENT
        assert [request.status for request in server.requests] == [503, 429, 200]
        assert events.waits[0] == "the server said 503 Service Unavailable; trying again in 0.0 s"

    def test_a_slow_start(self, server, get, target):
        get(server.add("/net.pth", CONTENT, delays_s=[0.4]))
        assert [request.status for request in server.requests] == [200]
        assert target.read_bytes() == CONTENT

    def test_too_slow_a_start_is_tried_again(self, server, get, target):
        events = get(server.add("/net.pth", CONTENT, delays_s=[1.0]), timeout_s=0.3)
        assert len(events.waits) == 1
        assert "timed out" in events.waits[0]
        assert target.read_bytes() == CONTENT

    def test_waits_longer_each_time(self, server, get):
        url = server.add("/net.pth", CONTENT, statuses=[500] * 4)
        events = get(url, backoff_s=0.1)
        waits = [float(line.split(" in ")[1].split()[0]) for line in events.waits]
        ranges = [(0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.8)]  # half to all of 0.1 s, doubled each time
        assert all(low <= wait <= high for wait, (low, high) in zip(waits, ranges, strict=True))


def test_two_processes_fetch_a_file_once(server, tmp_path):
    url = server.add("/net.pth", CONTENT, piece_delay_s=0.15)
    program = (
        "import sys, threading; from pathlib import Path; from vision_service.config import FileSpec;"
        "from vision_service.weights.download import FetchOptions, Watcher, fetch;"
        f"file = FileSpec(file={str(tmp_path / 'net.pth')!r}, url={url!r}, sha256={SHA256!r});"
        "watcher = Watcher(); watcher.waiting = lambda _, reason: print(reason);"
        "print('ready', flush=True); sys.stdin.readline();"
        f"fetch(file, FetchOptions(Path({str(tmp_path)!r})), watcher, threading.Event())"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = []
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        printed.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert (tmp_path / "net.pth").read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert sorted(printed) == ["", "another process is fetching it\n"]


class TestOtherSources:
    def test_a_local_file(self, get, left, target, tmp_path):
        (tmp_path / "my nets.pth").write_bytes(CONTENT)
        target.parent.mkdir()
        target.with_name("net.pth.part").write_bytes(CONTENT[: CHUNK_BYTES + 5])
        events = get((tmp_path / "my nets.pth").as_uri())
        assert events.started_at == [(CHUNK_BYTES + 5, len(CONTENT))]
        assert target.read_bytes() == CONTENT
        assert left() == ["net.pth"]

    def test_no_such_local_file(self, get, left, tmp_path):
        with pytest.raises(WeightsError, match=r"cannot fetch file:///.*none\.pth: No such file"):
            get((tmp_path / "none.pth").as_uri())
        assert left() == []

    def test_fsspec(self, get, target):
        fsspec.filesystem("memory").pipe("/bucket/net.pth", CONTENT)
        target.parent.mkdir()
        target.with_name("net.pth.part").write_bytes(CONTENT[:99])
        events = get("memory://bucket/net.pth")
        assert events.started_at == [(99, len(CONTENT))]
        assert target.read_bytes() == CONTENT

    def test_no_such_remote_file(self, get, left):
        with pytest.raises(WeightsError, match=r"cannot fetch memory://bucket/none\.pth: FileNotFoundError"):
            get("memory://bucket/none.pth")
        assert left() == []

    def test_a_scheme_whose_library_is_not_here(self, get, monkeypatch):
        monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
        with pytest.raises(WeightsError, match=r"s3:// needs a library .*pip install 'vision-service\[remote\]'"):
            get("s3://bucket/net.pth")


class TestMirror:
    @pytest.mark.parametrize(
        ("mirror", "url", "expected"),
        [
            ("", "https://a.org/x/y.pth", "https://a.org/x/y.pth"),
            ("https://m.example", "https://a.org/x/y.pth", "https://m.example/x/y.pth"),
            ("https://m.example/deep/", "http://a.org/x/y.pth?rev=2", "https://m.example/deep/x/y.pth?rev=2"),
            ("s3://bucket/{host}/{path}", "https://a.org/x/y.pth", "s3://bucket/a.org/x/y.pth"),
            ("file:///mnt/{file}", "https://a.org/x/y.pth", "file:///mnt/net.pth"),
            ("https://m.example", "s3://own/y.pth", "s3://own/y.pth"),
            ("https://m.example", "file:///y.pth", "file:///y.pth"),
        ],
    )
    def test_addresses(self, mirror, url, expected):
        assert mirrored(url, mirror, "net.pth") == expected

    def test_unknown_placeholder(self):
        with pytest.raises(
            WeightsError, match=r"weights_mirror is '.*'; placeholders are \{host\}, \{path\} and \{file\}"
        ):
            mirrored("https://a.org/x", "https://m/{name}", "x")

    def test_is_asked_instead(self, server, get, target):
        server.add("/all/x/net.pth", CONTENT)
        get("https://unreachable.invalid/x/net.pth", mirror=server.url + "/all")
        assert target.read_bytes() == CONTENT


def test_a_memo_of_what_was_compared(server, get, target, tmp_path):
    file = FileSpec(file=str(target), sha256=SHA256)
    states = [verified.state(tmp_path / "cache", file)]
    get(server.add("/net.pth", CONTENT))
    states.append(verified.state(tmp_path / "cache", file))
    states.append(verified.state(tmp_path / "cache", FileSpec(file=str(target), sha256="0" * 64)))
    states.append(verified.state(tmp_path / "cache", FileSpec(file=str(target))))
    target.write_bytes(b"altered")
    states.append(verified.state(tmp_path / "cache", file))
    verified.note(tmp_path / "cache", target, hashlib.sha256(b"altered").hexdigest())
    states.append(verified.state(tmp_path / "cache", file))
    assert states == ["missing", "yes", "altered", "no hash", "not yet", "altered"]
