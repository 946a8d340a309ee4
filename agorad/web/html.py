"""HTML out of nested calls: ``tag("p", "text & more", cls="note")``. Text is escaped; ``Safe`` is HTML
already.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final

VOID: Final = frozenset({"meta", "link", "input", "br"})


class Safe(str):
    """A piece of HTML."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
"""Text (escaped), ``Safe``, or several of these; None is nothing."""


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Safe:
    """One element. ``cls`` is class, ``data_x`` is data-x, True an attribute without a value."""
    head = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = {"cls": "class", "for_": "for"}.get(key, key.replace("_", "-"))
        head.append(key if value is True else f'{key}="{escape(str(value))}"')
    if name in VOID:
        return Safe(f"<{' '.join(head)}>")
    return Safe(f"<{' '.join(head)}>{join(children)}</{name}>")


def join(children: Child) -> Safe:
    """Several pieces, one after the other."""
    if children is None:
        return Safe("")
    if isinstance(children, Safe):
        return children
    if isinstance(children, str):
        return Safe(escape(children))
    return Safe("".join(map(join, children)))
