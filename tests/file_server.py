"""A server of files on this machine that behaves as badly as real ones do."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Server:
    """What the server has, how it misbehaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # one is used up by each request
    etag: str | None = None
    has_ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # of content: (name, Range)
    asked: list[str] = field(default_factory=list)  # for headers only


def handler_of(state: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            state.asked.append(name)
            self.send_response(200 if name in state.files else 404)
            if state.etag:
                self.send_header("X-Linked-Etag", f'"{state.etag}"')
            self.end_headers()

        def do_GET(self) -> None:
            name, asked = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
            state.requests.append((name, asked))
            fault = state.faults.pop(0) if state.faults else ""
            content = state.files.get(name)
            if content is None or fault.isdigit():
                self.send_error(int(fault) if fault else 404)
                return
            if fault == "garbage":
                content = b"x" * len(content)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.has_ranges else 0
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                told = start - 10 if fault == "wrong range" else start
                self.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
            if fault != "no length":
                self.send_header("Content-Length", str(len(content) - start))
            if state.etag:
                self.send_header("X-Linked-Etag", f'"{state.etag}"')
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[:65536] if fault == "break" else body)

    return Handler


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    state = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{httpd.server_address[1]}/"
        try:
            yield state
        finally:
            httpd.shutdown()
            thread.join()
