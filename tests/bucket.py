"""A bucket for tests: a folder behind as much of S3's protocol as reading takes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Bucket:
    """`folder` as s3://here/..."""

    folder: Path
    port: int = 0
    lost: set[str] = field(default_factory=set)
    """Names that are listed, but cannot be read."""
    read: list[str] = field(default_factory=list)
    """Names that were read."""
    also: dict[str, Path] = field(default_factory=dict)
    """Files under names that no file in `folder` can have."""

    def uri(self, name: str) -> str:
        return f"s3://here/{name}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=here"


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Answer for the folder until the end."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(folder)

    class Handler(_Handler):
        about = bucket

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        bucket.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield bucket
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    about: Bucket
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._object()

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(query.get("prefix", [""])[0])
        else:
            self._object()

    def _list(self, prefix: str) -> None:
        root = self.about.folder
        files = sorted(path for path in root.rglob("*") if path.is_file())
        names = {str(path.relative_to(root)): path for path in files} | self.about.also
        wanted = {name: path for name, path in names.items() if name.startswith(prefix)}
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{path.stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name, path in wanted.items()
        )
        body = f"<ListBucketResult><KeyCount>{len(wanted)}</KeyCount>{entries}</ListBucketResult>"
        self._answer(200, body.encode(), {"Content-Type": "application/xml"})

    def _object(self) -> None:
        name = unquote(urlsplit(self.path).path).removeprefix("/here/")
        file = self.about.also.get(name) or self.about.folder / name
        if not file.is_file() or (self.command == "GET" and name in self.about.lost):
            self._answer(404, b"", {})
            return
        content = file.read_bytes()
        headers = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"x"'}
        if self.command == "GET":
            self.about.read.append(name)
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            self._answer(206, content[int(first) : end + 1], headers)
        else:
            self._answer(200, content, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
