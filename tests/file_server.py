"""A real HTTP server on a free port that serves files and misbehaves on request."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file and how it is served; lists are used up, one item a request."""

    content: bytes
    ranges: bool = True
    etag: str | None = ""  # "": from the content; None: no validator at all
    redirect: str = ""
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # bytes of the body after which the connection ends
    delays_s: list[float] = field(default_factory=list)  # before the first byte of the reply
    piece_delay_s: float = 0.0  # between pieces of 64 KiB


@dataclass
class Request:
    path: str
    range: str
    status: int = 0
    sent: int = 0  # bytes of the body


class FileServer:
    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, Served] = {}
        self.requests: list[Request] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    def add(self, path: str, content: bytes, **how) -> str:
        self.files[path] = Served(content, **how)
        return self.url + path

    def sent(self, path: str) -> int:
        return sum(request.sent for request in self.requests if request.path == path)


def _handler(server_of):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            server: FileServer = server_of()
            request = Request(self.path, self.headers.get("Range", ""))
            with server.lock:
                server.requests.append(request)
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self.reply(server, request)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with server.lock:
                    server.at_once -= 1

        def reply(self, server, request):
            served = server.files.get(self.path.partition("?")[0])
            if served is not None and served.delays_s:
                time.sleep(served.delays_s.pop(0))
            if served is None:
                return self.empty(request, 404)
            if served.redirect:
                return self.empty(request, 302, {"Location": served.redirect})
            if served.statuses:
                return self.empty(request, served.statuses.pop(0), served.headers)
            return self.body(served, request)

        def empty(self, request, status, headers=()):
            request.status = status
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def body(self, served, request):
            content, start = served.content, 0
            etag = served.etag if served.etag != "" else f'"{hashlib.md5(content).hexdigest()}"'
            asked = re.fullmatch(r"bytes=(\d+)-", request.range)
            if asked and served.ranges and self.headers.get("If-Range") in (None, etag):
                start = int(asked[1])
                if start >= len(content):
                    return self.empty(request, 416, {"Content-Range": f"bytes */{len(content)}"})
            request.status = 206 if start else 200
            self.send_response(request.status)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if etag is not None:
                self.send_header("ETag", etag)
            self.end_headers()
            end = min(len(content), start + served.cuts.pop(0)) if served.cuts else len(content)
            for at in range(start, end, 65536):
                piece = content[at : min(at + 65536, end)]
                self.wfile.write(piece)
                request.sent += len(piece)
                time.sleep(served.piece_delay_s)
            if end < len(content):
                self.close_connection = True
            return None

    return Handler


@contextmanager
def file_server() -> Iterator[FileServer]:
    box: list[FileServer] = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(lambda: box[0]))
    box.append(FileServer(f"http://127.0.0.1:{http.server_port}"))
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield box[0]
    finally:
        http.shutdown()
        thread.join(5)
        http.server_close()
