"""A local stand-in for the Hugging Face hub's HTTP interface, for the real `huggingface_hub`."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as folders `root/user/name/files`, served under `url`."""

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, []
        self.cut_after: int | None = None
        """Close the connection after this number of bytes of the next download."""
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            if match := re.match(r"/api/models/([^/]+/[^/]+)(/revision/[^/?]+|/tree/[^?]+)?", self.path):
                self._info(hub.root / match[1], match[1], tree="/tree/" in self.path, body=body)
            elif match := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
                self._file(hub.root / match[1] / match[2], body)
            else:
                self._send(404, b"{}", body)

        def _info(self, folder: Path, repo: str, *, tree: bool, body: bool) -> None:
            if not folder.is_dir():
                self._send(404, b'{"error":"Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            entries = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0"} for f in files
            ]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "downloads": 0, "likes": 0,
                    "tags": [], "siblings": [{"rfilename": f} for f in files]}  # fmt: skip
            self._send(200, json.dumps(entries if tree else info).encode(), body)

        def _file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                return
            data = path.read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            start = int(m[1]) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206 if start else 200, data[start:], body, headers)

        def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            if hub.cut_after is not None and len(data) > hub.cut_after and "resolve" in self.path:
                self.wfile.write(data[: hub.cut_after])
                hub.cut_after = None
                self.close_connection = True
                return
            self.wfile.write(data)

    return Handler


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """The hub on a free port of the loopback interface, until the block ends."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
