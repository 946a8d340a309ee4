"""The documents' site in a real browser: nothing is cut off, on any width, and nothing is fetched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT

sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CUT = """
[...document.querySelectorAll('table, td code, p code, li code, code.language-sh')]
  .filter(e => { const box = e.getBoundingClientRect();
                 return box.width > 0 && box.right > document.documentElement.clientWidth + 1; })
  .map(e => e.tagName + ': ' + e.textContent.slice(0, 60))
"""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian: apt install chromium)")
def test_nothing_is_cut_off_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=100)
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) > 20
    asked: list[str] = []
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            for width in (1280, 390):
                tab = browser.new_page(viewport={"width": width, "height": 900})
                tab.on("request", lambda request: asked.append(request.url))
                for page in pages:
                    tab.goto(page.as_uri())
                    assert tab.evaluate(CUT) == [], f"{page.name} at {width}"
                    wide = tab.evaluate("document.documentElement.scrollWidth")
                    assert wide <= width, f"{page.name} at {width}: it is {wide} wide"
        finally:
            browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
