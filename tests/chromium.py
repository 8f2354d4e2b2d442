"""A headless Chromium for tests of pages: opens a file, runs JavaScript in it, collects its complaints.

    with chromium.Page(path) as page:
        page.wait_for("document.body?.dataset.ready", timeout=60)
        assert page.evaluate("document.title") == "..."
        assert not page.errors

It speaks the DevTools protocol over the browser's debugging pipe, so that no driver and no port is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing() -> str | None:
    """The reason why pages cannot be tested here, else None."""
    return None if _program() else f"needs a Chromium: none of {', '.join(NAMES)} is installed"


def _program() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab with one local file; `errors` collects uncaught errors, error logs and outside requests."""

    def __init__(
        self, path: Path, *, width: int = 1000, height: int = 800, flags: tuple[str, ...] = ()
    ) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._number, self._buffer = 0, b""
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        program = _program()
        assert program is not None, missing()
        command = [
            program,
            *FLAGS,
            *flags,
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
        ]
        # Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, *command, "about:blank"],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._session: str | None = None
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=path.resolve().as_uri())

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        with contextlib.suppress(OSError):
            self._call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def evaluate(self, code: str, *, timeout: float = 60) -> Any:
        """The value of an expression, awaited if it is a promise. AssertionError if it throws."""
        found = self._call(
            "Runtime.evaluate",
            timeout_s=timeout,
            expression=code,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, code: str, *, timeout: float = 60) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + timeout
        while not (value := self.evaluate(code)):
            assert time.monotonic() < end, f"{code} is still {value!r} after {timeout} s; {self.errors}"
            time.sleep(0.05)
        return value

    def set_files(self, selector: str, *files: Path) -> None:
        """Choose files in a file input."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`mousePressed`, `mouseMoved` or `mouseReleased` at a point of the window."""
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, *, timeout_s: float = 60, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout_s
        while True:
            answer = self._read(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            if not part:
                raise BrokenPipeError("the browser closed its pipe")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(a.get("value", a)) for a in parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.errors.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                self.requests.append(url)
                if not url.startswith(("file:", "data:", "blob:", "about:")):
                    self.errors.append(f"outside request: {url[:200]}")
