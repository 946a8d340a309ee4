"""The README and the pages in ``docs/`` as tests read them: blocks of code, and commands in the text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("agoractl", "agorad")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@attrs.frozen
class Block:
    """A fenced block: the page's name, the line of its first line, and what it is written in."""

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> list[str]:
        """What is typed, a command a line, without comments."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [line for whole in lines if (line := re.sub(r"(^|\s+)#\s.*$", "", whole).rstrip())]


def blocks(page: Path, *languages: str) -> list[Block]:
    """Of these languages, or all, in order."""
    text = page.read_text()
    return [
        Block(page.name, text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in _BLOCK.finditer(text)
        if not languages or found[1] in languages
    ]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return _BLOCK.sub("", page.read_text())


def spoken(page: Path) -> list[str]:
    """Our commands in the middle of the text, as they would be typed."""
    names = "|".join(PROGRAMS)
    found = re.findall(rf"`((?:sudo )?(?:{names}) [^`]+)`", re.sub(r"\s*\n\s*", " ", prose(page)))
    return [text.replace("\\|", "|") for text in found]


def words(command: str) -> list[str]:
    """A command of ours as its words, its program first and without a path; empty for another program."""
    parts = shlex.split(re.split(r"\s*[>|]", command)[0])
    if parts[:2] == ["make", "demo"]:
        asked = next((part.partition("=")[2] for part in parts if part.startswith("ARGS=")), "")
        return ["agoractl", "demo", *shlex.split(asked)]
    while parts and (parts[0] == "sudo" or re.match(r"[A-Z_]+=", parts[0])):
        parts = parts[1:]
    if not parts or Path(parts[0]).name not in PROGRAMS:
        return []
    return [Path(parts[0]).name, *parts[1:]]


NOT_HERE = {
    r"make ": "these are what runs the tests; tests/system/test_demo.py trains with other shapes",
    r"sudo ": "root's systemd: tests/system/test_systemd.py does it in one of its own",
    r"systemctl --user|agoractl service uninstall": "a user's systemd: tests/system/test_systemd_user.py",
    r"docker |.* --use-docker$": "needs a Docker engine: tests/unit/test_docker.py",
    r"apt |ufw |firewall-cmd |nft ": "changes the machine",
    r"agoractl run plan .* --measure 1": "takes minutes: tests/unit/test_plan.py measures smaller stages",
    r"agoractl run plan .* --counts 2/3/1": "three stages, where the story has one: test_simulation.py",
}
"""Commands that tests/system/test_docs_run.py does not type, and why."""


def not_here(command: str) -> str:
    """Why it is not typed; empty if it is."""
    return next((why for begins, why in NOT_HERE.items() if re.match(begins, command)), "")


STORY = (
    ("operator.md", "", "## 8. End it"),
    *((name, "", "") for name in (
        "join.md", "cli.md", "network.md", "points.md", "authority.md", "metrics.md", "plan.md",
        "running.md", "assistant.md", "contributing.md",
    )),
    ("operator.md", "## 8. End it", ""),
    ("models.md", "", ""),
)  # fmt: skip
"""The pages in the order in which tests/system/test_docs_run.py types them: from this heading to that one."""
