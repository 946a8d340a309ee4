"""What the documents promise to cover, they cover: protocols, refusals, links."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import attrs

from agorad.authority.refusals import REFUSALS
from agorad.exitcodes import ExitCode
from agorad.run import Admission

ROOT = Path(__file__).parents[2]
SOURCES = "".join(
    path.read_text() for room in ("p2p", "stage", "agorad") for path in (ROOT / room).rglob("*.py")
)
PAGE = (ROOT / "docs" / "protocols.md").read_text()


def test_every_protocol_and_every_refusal_is_documented() -> None:
    protocols = set(re.findall(r'"(/(?:agora|ipfs)/[a-z]+/[0-9.]+)"', SOURCES))
    codes = set(re.findall(r'(?:Refused|refusal)\(\s*"([a-z_]+)"', SOURCES))
    assert len(protocols) > 6
    assert len(codes) > 20
    assert sorted(name for name in protocols if f"## {name}\n" not in PAGE) == []
    assert sorted(code for code in codes if f"`{code}`" not in PAGE) == []


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_joining_says_about_refusals_is_what_the_table_says() -> None:
    page = (ROOT / "docs" / "joining.md").read_text()
    for code, refusal in REFUSALS.items():
        end = "asked again" if refusal.retry else str(int(refusal.exit))
        assert f"| `{code}` | {end} | {refusal.remedy} |" in page
    for field in attrs.fields(Admission):
        assert f"`{field.name}`" in page, field.name


def test_every_end_has_its_line_in_troubleshooting() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+)(?:\\\*)? \|", page, re.MULTILINE)}
    assert codes == set(map(int, ExitCode))
    for code, refusal in REFUSALS.items():
        row = next(line for line in page.splitlines() if line.startswith("| `") and f"`{code}`" in line)
        assert row.split("|")[2].strip() == ("–" if refusal.retry else str(int(refusal.exit)))


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.glob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', text), page.name
        assert not re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//', text), page.name


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}" not in nav] == []


def test_every_dependency_has_its_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["postgres"]]
    page = (ROOT / "docs" / "licences.md").read_text()
    names = [re.split(r"[\[<>=; ]", line)[0] for line in wanted]
    assert [name for name in names if f"| {name} |" not in page] == []
