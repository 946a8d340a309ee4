"""The page in a real browser: followed live while nodes come and go, without complaint of it or of axe.

Needs Debian's chromium and the Python package playwright (`apt-get install chromium`, `pip install
playwright`); axe-core comes from npm, once, beside the tests' own packages. Skipped where these are missing.
With AGORA_SCREENSHOTS=FOLDER it leaves pictures of every page there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agorad.ask import ask
from tests.system.swarms import Demo, demo

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = "axe-core@4.10.3"
WIDTHS = {"desktop": (1280, 900), "phone": (375, 740)}
PAGES = ("/", "/leaderboard", "/join", "/api/v1/")
LIVE_MS = 150_000

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def axe() -> str:
    """Source of axe-core."""
    if sys.prefix == sys.base_prefix or shutil.which("npm") is None:
        pytest.skip("axe-core is installed by npm beside a virtual environment; one of the two is missing")
    folder = Path(sys.prefix) / "interop" / "axe"
    found = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), AXE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"axe-core does not install here: {done.stderr[-300:]}")
    return found.read_text()


class Look:
    """A browser's window that remembers what it should not have done."""

    def __init__(self, browser: Any, base: str, width: str, scheme: str = "light") -> None:
        wide, high = WIDTHS[width]
        self.context = browser.new_context(
            viewport={"width": wide, "height": high}, color_scheme=scheme, bypass_csp=False
        )
        self.page = self.context.new_page()
        self.base = base
        self.complaints: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(self.base):
            self.complaints.append(f"asked for {request.url}")

    def check(self, axe: str, name: str) -> None:
        """No serious finding, nothing wider than the window; a picture where they are wanted."""
        self.page.evaluate(axe)
        found = self.page.evaluate("axe.run().then(found => found.violations)")
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert grave == [], [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in grave]
        assert self.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        if folder := os.environ.get("AGORA_SCREENSHOTS"):
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def until(page: Any, condition: str) -> None:
    """The page's content policy forbids to evaluate texts there, so it is asked from outside."""
    deadline = time.monotonic() + LIVE_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"not within {LIVE_MS} ms: {condition}"
        time.sleep(0.1)


def started(running: Demo) -> str:
    """The page's address, once every replica is at work."""
    control = Path(running.node("authority")["control"])
    running.wait_for(lambda: ask(control, "status").get("page"), 60, "page")
    return str(ask(control, "status")["page"]).rstrip("/")


def test_people_follow_a_swarm(tmp_path: Path, axe: str) -> None:
    options = (
        "--stages", "2", "--workers", "2", "--seconds", "600",
        "--set", "model.seq=64", "--set", "training.target_batch=8", "--set", "training.eval_every=5",
        "--set", "training.average_every=4",
    )  # fmt: skip
    with demo(tmp_path / "demo", *options) as running, playwright.sync_playwright() as driver:
        base = started(running)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            desk = Look(browser, base, "desktop")
            page = desk.page
            page.goto(base)
            until(page, "document.querySelectorAll('.badge.active').length == 4")
            page.wait_for_selector("#chart-loss svg", timeout=LIVE_MS)
            page.wait_for_selector("#rounds tbody tr", timeout=LIVE_MS)
            follow(running, page)
            keyboard(page)
            node = page.get_attribute(".stages a", "href")
            for width in WIDTHS:
                for scheme in ("light", "dark"):
                    look = Look(browser, base, width, scheme)
                    for path in (*PAGES, node, "/nothing"):
                        answer = look.page.goto(base + path)
                        assert answer.status == (404 if path == "/nothing" else 200)
                        name = path.strip("/").replace("/", "-")[:12] or "swarm"
                        look.page.wait_for_timeout(300)
                        look.check(axe, f"{name}-{width}-{scheme}")
                    gone = [one for one in look.complaints if "404" not in one]
                    assert gone == []
                    look.context.close()
            without_script(browser, base)
            assert desk.complaints == []
        finally:
            browser.close()
        running.process.send_signal(signal.SIGINT)


def follow(running: Demo, page: Any) -> None:
    """A worker leaves and comes back; the page says so without being loaded again."""
    page.evaluate("window.same = true")
    gone = running.node("worker-1-1")
    short = gone["peer_id"][-6:]
    ask(Path(gone["control"]), "leave")
    until(page, f"!document.querySelector('.stages').textContent.includes('{short}')")
    until(page, f"document.querySelector('#changes').textContent.includes('{short} left stage 1')")
    until(page, f"document.querySelector('#news').textContent.includes('{short} left')")
    again = running.restart("worker-1-1")
    try:
        until(page, f"document.querySelector('.stages').textContent.includes('{short}')")
        until(page, f"document.querySelector('#changes').textContent.includes('{short} joined stage 1')")
    finally:
        again.terminate()
        again.wait(40)
    assert page.evaluate("window.same")


def keyboard(page: Any) -> None:
    """The first key leads past the head; what is open or in focus stays so while figures change."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.focus("#chart-loss-figures summary")
    page.keyboard.press("Enter")
    before = page.inner_text("#as-of")
    until(page, f"document.querySelector('#as-of').textContent != '{before}'")
    page.wait_for_timeout(500)
    assert page.evaluate("document.querySelector('#chart-loss-figures').open")
    assert page.evaluate("document.activeElement.closest('#chart-loss-figures') != null")
    page.click("#control button")
    assert page.inner_text("#control button") == "Follow again"
    paused = page.inner_text("#as-of")
    page.wait_for_timeout(5000)
    assert page.inner_text("#as-of") == paused
    page.click("#control button")
    until(page, f"document.querySelector('#as-of').textContent != '{paused}'")


def without_script(browser: Any, base: str) -> None:
    """All of it is there to be read."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(base)
    assert page.locator(".stages tbody tr").count() >= 3
    assert page.locator("#chart-loss svg").count() == 1
    page.goto(base + "/join")
    page.fill("#peer", "12D3KooWNobody")
    page.click("button[type=submit]")
    assert page.inner_text("h1") == "No such page" or page.inner_text("h1") == "No such node"
    context.close()
