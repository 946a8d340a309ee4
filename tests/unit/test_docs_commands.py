"""What the documents tell people to type, to write into settings and to open exists as it is written there.

That the commands do what the pages say is tested where they run: tests/system/test_docs_run.py.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import attrs
import click
import pytest
from markdown.extensions.toc import slugify_unicode

from agorad import config
from agorad.cli import agoractl
from agorad.config import Config
from agorad.main import main as agorad
from agorad.run import Manifest
from tests.documents import NOT_HERE, PAGES, ROOT, STORY, blocks, prose, spoken, words

LANGUAGES = {"sh", "toml", "json", "text", "python"}
COMMAND = re.compile(r"\n\n {4}((?:sudo )?(?:agoractl|agorad|make|docker|pip|apt|cd|curl|systemctl)\b.*)")


def context(line: list[str]) -> tuple[click.Context, list[str]]:
    """The command that this line calls, and what is left for it."""
    command: click.Command = agoractl if line[0] == "agoractl" else agorad
    ctx, rest = click.Context(command, info_name=line[0]), line[1:]
    while isinstance(ctx.command, click.Group) and rest and rest[0][0].islower():
        found = ctx.command.get_command(ctx, rest[0])
        assert found is not None, f"no command {rest[0]!r}"
        ctx, rest = click.Context(found, info_name=rest[0], parent=ctx), rest[1:]
    return ctx, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_of_a_page_can_be_typed(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language!r}"
    for block in blocks(page, "sh"):
        for line in block.commands():
            if not (typed := words(line)):
                continue
            ctx, rest = context(typed)
            try:
                assert ctx.info_name is not None
                ctx.command.make_context(ctx.info_name, rest, parent=ctx.parent)
            except click.ClickException as error:
                pytest.fail(f"{page.name}:{block.line}: {line}: {error.format_message()}")
    assert COMMAND.findall(page.read_text()) == [], "commands stand in ```sh blocks, so that tests see them"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_have_these_names_and_options(page: Path) -> None:
    """Only those: a value may be a word that stands for one."""
    for text in spoken(page):
        ctx, rest = context(text.removeprefix("sudo ").replace("…", "X").split())
        known = {
            name for param in ctx.command.get_params(ctx) for name in (*param.opts, *param.secondary_opts)
        }
        said = {word.partition("=")[0] for part in rest for word in [part.strip("[],")] if word[:1] == "-"}
        assert said <= known, f"{page.name}: `{text}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_that_are_named_exist(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        config.from_table(
            {"node": {"role": "worker", "run": "run.toml", "state": "."}} | tomllib.loads(block.text),
            tmp_path,
        )
    sections: dict[str, set[str]] = {}
    for whole in (Config, Manifest):
        for section in attrs.fields(attrs.resolve_types(whole)):
            sections.setdefault(section.name, set())
            if attrs.has(section.type):
                sections[section.name] |= {field.name for field in attrs.fields(section.type)}
    text = prose(page)
    named = re.findall(r"`([a-z]+)\.([a-z_0-9]+)(?: = [^`]*)?`", text)
    settings = {pair for pair in named if pair[0] in sections and sections[pair[0]]}
    assert {
        f"{a}.{b}" for a, b in settings if b not in sections[a] and b not in ("toml", "sqlite", "safetensors")
    } == set()
    files = re.findall(r"`((?:p2p|stage|agorad|csrc|tests|docker|deploy|bench|docs)/[\w./-]*)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_what_is_typed_on_no_page_is_listed_with_its_reason() -> None:
    with_commands = {page.name for page in PAGES if blocks(page, "sh")}
    assert with_commands == {"README.md", *(name for name, _, _ in STORY)}
    commands = [line for page in PAGES for block in blocks(page, "sh") for line in block.commands()]
    assert [b for b in NOT_HERE if not any(re.match(b, line) for line in commands)] == [], "written nowhere"


def test_anchors_lead_to_headings() -> None:
    """Those between pages of the site; mkdocs looks at the rest."""
    headings = {
        page.name: {
            slugify_unicode(line, "-") for line in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        }
        for page in PAGES
    }
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", prose(page)):
            assert anchor in headings[Path(target).name or page.name], f"{page.name}: {target}#{anchor}"


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [
        page.name for page in PAGES[1:] if page.name != "index.md" and f"docs/{page.name}" not in text
    ] == []
