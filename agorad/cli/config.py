"""``agoractl config``: the settings that count for a node, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import attrs
import click

from agorad.cli.targets import Where, find, target_options
from agorad.config import Config
from agorad.settings import fields_of, read_toml, unstructure

_OF_ROLE: Final = {
    "worker": ("worker", "compute"), "trainer": ("trainer",), "authority": ("authority",), "seed": ()
}  # fmt: skip


@attrs.frozen
class Setting:
    """One of them."""

    name: str
    value: Any
    """As JSON says it; None where it is not set."""
    origin: str
    """``file`` or ``default``."""


@click.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def config(where: Where, as_json: bool) -> None:
    """Show all settings of nodes with their values, and which of them are defaults.

    They are those of the file: a running node has those of its last start or reload, and what --set gave it.

    Example: agoractl config --node gpu0
    """
    reports = []
    for target in find(where):
        settings = target.settings()
        reports.append((target.name, str(settings.path), list(shown(settings))))
    if as_json:
        nodes = [
            {"node": name, "path": path, "settings": [attrs.asdict(one) for one in found]}
            for name, path, found in reports
        ]
        click.echo(json.dumps({"nodes": nodes}))
        return
    click.echo("\n\n".join("\n".join(lines(path, found)) for _name, path, found in reports))


def shown(settings: Config) -> Iterator[Setting]:
    """Settings that the node's role looks at, and those of the file; secrets hidden."""
    assert settings.path is not None
    table = read_toml(settings.path, "configuration")
    wanted = ("node", *_OF_ROLE[settings.node.role], "metrics", "limits")
    for section in fields_of(Config):
        if section not in wanted and section not in table:
            continue
        values = getattr(settings, section)
        for name, field in fields_of(type(values)).items():
            value = getattr(values, name)
            if not field.repr and value:
                value = "(hidden)"
            origin = "file" if name in table.get(section, ()) else "default"
            yield Setting(f"{section}.{name}", unstructure(value), origin)


def lines(path: str, found: list[Setting]) -> list[str]:
    """As a settings file would say it, what is a default behind a mark."""
    said, section = [f"# {path}; lines behind a # are defaults"], ""
    for one in found:
        where, _, name = one.name.partition(".")
        if where != section:
            section = where
            said += ["", f"[{where}]"]
        value = "not set" if one.value is None else json.dumps(one.value, ensure_ascii=False)
        said.append(f"{name} = {value}" if one.origin == "file" else f"# {name} = {value}")
    return said
