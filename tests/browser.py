"""A page in headless Chromium: its content after a script has used it, and its errors and warnings."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
LISTEN = """<script>
window.complaints = [];
window.onerror = message => complaints.push(String(message));
window.onunhandledrejection = event => complaints.push(String(event.reason));
document.addEventListener("securitypolicyviolation", event => complaints.push("blocked " + event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...words) => complaints.push(words.join(" "));
</script>"""


def chromium() -> str:
    """The browser's path; skips the test if none is installed."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser; none of {', '.join(NAMES)} is installed")
    return found


def run(
    page: Path, script: str, folder: Path, *, width: int = 1000, height: int = 800, shot: Path | None = None
):
    """Open a page, run `script`, the body of an async function, and return its value.

    A complaint of the page (an error, a warning, a blocked request) fails the test. shot: a PNG to write.
    """
    browser = chromium()
    text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + LISTEN, 1)
    probe = f"""<script>window.addEventListener("load", async () => {{
      const value = await (async () => {{ {script} }})();
      await new Promise(done => setTimeout(done, 50));
      const result = document.createElement("pre");
      result.id = "result";
      const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
      const requests = loaded.filter(name => !name.startsWith("data:"));
      result.textContent = JSON.stringify({{ value, complaints, requests }});
      document.body.append(result);
      result.hidden = true;
    }});</script></body>"""
    probed = folder / "probed.html"
    probed.write_text(text.replace("</body>", probe, 1), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    command += ["--virtual-time-budget=8000", "--dump-dom"]
    command += [f"--screenshot={shot}"] if shot else []
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="result"[^>]*>(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not finish: {done.stderr[-2000:]}"
    result = json.loads(html.unescape(found[1]))
    assert result["complaints"] == [], result["complaints"]
    assert result["requests"] == [], result["requests"]
    return result["value"]
