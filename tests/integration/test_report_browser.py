"""The report in a browser: it fits a phone, fetches nothing, and the console stays silent."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from dist_resnet.report.__main__ import main
from tests.helpers.report_page import make_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A phone's width, a desktop's; the frame's document is measured by the page around it.
MEASURE = """<!DOCTYPE html><title>x</title><pre id="result"></pre>
<iframe id="phone" width="375" height="800" src="PAGE"></iframe>
<iframe id="desk" width="1280" height="800" src="PAGE"></iframe>
<script>
window.onload = () => {
  const result = {};
  for (const id of ["phone", "desk"]) {
    const inner = document.getElementById(id).contentWindow, page = inner.document;
    const root = page.documentElement;
    const links = [...page.querySelectorAll("a, [tabindex='0']")];
    links[0].focus();
    result[id] = {
      overflow: root.scrollWidth - root.clientWidth,
      requests: inner.performance.getEntriesByType("resource").map(e => e.name),
      curves: page.querySelectorAll("figure svg path.line").length,
      height: root.scrollHeight,
      skip: page.activeElement.getBoundingClientRect().left,
      rest: Math.max(...[...page.images].map(i => i.complete ? 0 : 1), 0),
    };
  }
  document.getElementById("result").textContent = JSON.stringify(result);
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    return found


class _Server(http.server.SimpleHTTPRequestHandler):
    seen: list[str]

    def __init__(self, *arguments: Any, seen: list[str], **options: Any) -> None:
        self.seen = seen
        super().__init__(*arguments, **options)

    def log_message(self, *arguments: object) -> None:
        self.seen.append(self.path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of tmp_path's files, and the paths that were asked for."""
    seen: list[str] = []
    handler = functools.partial(_Server, directory=str(tmp_path), seen=seen)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("runs", [1, 2])
def test_in_a_browser(
    browser: str, served: tuple[str, list[str]], tmp_path: Path, runs: int
) -> None:
    address, seen = served
    names = ["a", "a-run-whose-name-is-long-enough-to-need-two-lines-on-a-phone"][:runs]
    for name in names:
        make_run(tmp_path / name, 150, 16)
    page = tmp_path / "page.html"
    assert main([*(str(tmp_path / name) for name in names), "--output", str(page)]) == 0
    (tmp_path / "measure.html").write_text(MEASURE.replace("PAGE", "page.html"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--virtual-time-budget=10000", "--dump-dom", f"{address}/measure.html",
    ]  # fmt: skip
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    match = re.search(r'<pre id="result">(.+?)</pre>', outcome.stdout, re.DOTALL)
    assert match, outcome.stderr[-2000:]
    for width, measured in json.loads(unescape(match[1])).items():
        assert measured["overflow"] == 0, width
        assert measured["requests"] == []
        assert measured["curves"] >= 8 * runs
        assert measured["height"] > 1000
        assert measured["skip"] >= 0  # the skip link is seen once it has the focus
        assert measured["rest"] == 0
    console = [line for line in outcome.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert set(seen) <= {"/measure.html", "/page.html", "/favicon.ico"}
