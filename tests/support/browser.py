"""Opens a page in headless Chromium and returns what a script found there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

FIRST = """<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(event.message));
window.addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
for (const kind of ["error", "warn"]) {
  const own = console[kind];
  console[kind] = (...all) => { problems.push(all.join(" ")); own.apply(console, all); };
}
</script>"""
LAST = """<script>
(async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!document.documentElement.dataset.drawn) await pause(10);
  const outcome = { milliseconds: performance.now(), drawn: Number(document.documentElement.dataset.drawn) };
  try { Object.assign(outcome, await (async () => { SCRIPT })()); } catch (error) { problems.push(String(error)); }
  outcome.problems = problems;
  const place = document.createElement("pre");
  place.id = "outcome";
  place.textContent = JSON.stringify(outcome);
  document.body.append(place);
})();
</script>"""


def look(page: str, script: str, folder: Path, *options: str) -> dict[str, Any]:
    """Opens a page, waits until its charts are drawn, and runs ``script`` there, which returns an object.

    The result has what the script returned, and ``milliseconds`` until the charts were drawn, ``drawn`` (their number)
    and ``problems`` (errors and warnings of the console).
    """
    assert BROWSER is not None
    start, _, end = page.replace("<head>", "<head>" + FIRST, 1).rpartition("</body>")  # libraries may hold one too
    page = f"{start}{LAST.replace('SCRIPT', script)}</body>{end}"
    path = folder / "looked-at.html"
    path.write_text(page, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,900", "--virtual-time-budget=20000", *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))
