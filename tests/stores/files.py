"""An HTTP server of a folder's files, as web servers do it: index pages, ranges, etags, HEAD."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote, urlsplit


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        self.server.requests[self.command] += 1
        path = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if path.is_dir():
            return self._send(200, self._index(path), {"Content-Type": "text/html; charset=utf-8"}, body)
        if not path.is_file():
            return self._send(404, b"not found", {}, body)
        data = path.read_bytes()
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{path.stat().st_mtime_ns:x}-{len(data):x}"',
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range", "")
        if not (self.server.ranges and wanted.startswith("bytes=")):
            return self._send(200, data, headers, body)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1 if first and last else len(data), len(data))
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"}, body)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.close_connection = True
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _index(self, folder: Path) -> bytes:
        """As Apache writes it: sorting links, the parent, and the entries relative to the page."""
        links = ['<a href="?C=N;O=D">Name</a>', '<a href="../">Parent</a>']
        for path in sorted(folder.iterdir()):
            name = path.name + ("/" if path.is_dir() else "")
            links.append(f'<a href="{escape(quote(name, safe="/&"))}">{escape(name)}</a>')
        links += self.server.extra_links
        return f"<html><body>{'<br>'.join(links)}</body></html>".encode()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        """Stay quiet."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool, lengths: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.lengths = folder, ranges, lengths
        self.requests: Counter[str] = Counter()
        self.extra_links: list[str] = []


class FileServer:
    """Serves `folder` at `url`.

    ranges    False: the server cannot send parts of a file
    lengths   False: it does not say how long a file is
    """

    def __init__(self, folder: Path, *, ranges: bool = True, lengths: bool = True) -> None:
        self._server = _Server(folder, ranges=ranges, lengths=lengths)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> Counter[str]:
        """Requests seen so far, by method."""
        return self._server.requests

    @property
    def extra_links(self) -> list[str]:
        """HTML that is put at the end of every index page."""
        return self._server.extra_links

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
