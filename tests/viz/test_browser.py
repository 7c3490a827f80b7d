"""A real browser opens the page as a double click does: every image shows, the console is silent.

Skipped where no Chromium is installed.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0", "--dump-dom"),
)
COUNT = """<script>addEventListener("load", () => {
  const images = [...document.images];
  const shown = images.filter(image => image.complete && image.naturalWidth > 0);
  document.title = `shown ${shown.length} of ${images.length}`;
});</script>"""

pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium is installed")


def browse(page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def complaints(page: Path, profile: Path) -> list[str]:
    """Return what the page writes to the console."""
    return re.findall(r":CONSOLE.*", browse(page, profile).stderr)


def images(page: Path, tmp_path: Path) -> tuple[int, int]:
    """Return how many images of a page show, and how many there are."""
    # A copy may run a script, which the page itself forbids.
    text = re.sub(r"<meta http-equiv=.*?>", "", page.read_text())
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</head>", f"{COUNT}</head>"))
    found = re.search(r"shown (\d+) of (\d+)", browse(copy, tmp_path / "images").stdout)
    assert found, "the script did not run"
    return int(found[1]), int(found[2])


def test_every_image_shows_and_the_console_is_silent(page: Path, tmp_path: Path) -> None:
    shown, count = images(page, tmp_path)
    assert shown == count == page.read_text().count("<img ") > 100
    assert complaints(page, tmp_path / "console") == []


def test_the_checks_see_faults(page: Path, tmp_path: Path) -> None:
    """A broken image is missed; a blocked script and one that fails are told."""
    text = page.read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("data:image/png;base64,iVBOR", "data:image/png;base64,xxxx", 1))
    shown, count = images(broken, tmp_path)
    assert shown == count - 1
    broken.write_text(text.replace("</main>", "<script>alert(1)</script></main>"))
    assert any("Content Security Policy" in line for line in complaints(broken, tmp_path / "csp"))
    broken.write_text("<script>nothing()</script>")
    assert any("ReferenceError" in line for line in complaints(broken, tmp_path / "error"))
