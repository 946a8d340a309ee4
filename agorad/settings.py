"""From TOML tables to frozen settings, strictly, and with errors that say what to write instead.

``structure`` builds an attrs class from a table, checking every key and every type; nested attrs
classes are sections, tuples of them are arrays of tables. An unknown key is an error that names it and
the nearest known one. Numbers are never taken from strings, and booleans are never numbers; the one
convenience is an integer where a float is meant. ``override`` applies ``section.key=value`` texts of
the command line, reading the value by the type of the field it is for.

Written by hand, rather than with a converter library, because the seed must start in a second within
60 MB and because the error texts are the point. Supported field types: bool, int, float, str, Path,
Literal of strings, ``X | None``, ``tuple[X, ...]`` and attrs classes.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

from p2p.errors import LocalError
from p2p.files import read_small

T = TypeVar("T")

FILE_LIMIT: Final = 1 << 20
"""Bytes of a settings file that we are willing to read."""


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table of a TOML file; ``LocalError`` names the file and the line that is wrong."""
    try:
        data = read_small(path, FILE_LIMIT + 1)
    except OSError as error:
        raise LocalError(f"cannot read the {what} {path}: {error.strerror}; check the path") from error
    if len(data) > FILE_LIMIT:
        raise LocalError(f"the {what} {path} is larger than {FILE_LIMIT} bytes")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise LocalError(f"the {what} {path} is not valid TOML: it is not text; check the path") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise LocalError(f"the {what} {path} is not valid TOML: {error}; correct it there") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def structure(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """An instance of the attrs class ``cls`` from ``table``; ``where`` prefixes names in errors."""
    fields = fields_of(cls)
    for key in table:
        if key not in fields:
            raise LocalError(f"unknown setting {_join(where, key)!r}; {nearest(key, fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(field.type, table[name], _join(where, name))
        elif field.default is attrs.NOTHING:
            raise LocalError(f"the setting {_join(where, name)!r} is missing; add it")
    return cls(**values)


def unstructure(value: Any) -> Any:
    """The table that ``structure`` reads back as ``value``; settings that are None are left out."""
    if attrs.has(type(value)):
        plain = {name: getattr(value, name) for name in fields_of(type(value))}
        return {name: unstructure(item) for name, item in plain.items() if item is not None}
    if isinstance(value, tuple):
        return [unstructure(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def override(cls: type[Any], table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of ``table`` with each ``section.key=value`` put in; a later one wins."""
    result = _copy(table)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise LocalError(f"{assignment!r} is not of the form section.key=value")
        kind: Any = cls
        target = result
        for depth, part in enumerate(parts):
            known = fields_of(kind) if _is_section(kind) else {}
            if part not in known:
                name = ".".join(parts[: depth + 1])
                hint = nearest(part, known) if known else "it has no settings inside: set it itself"
                raise LocalError(f"unknown setting {name!r}; {hint}")
            kind = _without_none(known[part].type)
            if depth < len(parts) - 1:
                target = target.setdefault(part, {})
        if _is_section(kind):
            raise LocalError(f"{path!r} is a section; name one of its settings: {', '.join(fields_of(kind))}")
        target[parts[-1]] = _from_text(kind, text.strip())
    return result


def fields_of(cls: type[Any]) -> dict[str, attrs.Attribute[Any]]:
    """Settings of an attrs class by name, types resolved; private and derived ones left out."""
    attrs.resolve_types(cls)
    return {field.name: field for field in attrs.fields(cls) if field.init and field.name[0] != "_"}


def _value(kind: Any, value: Any, where: str) -> Any:
    kind = _without_none(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        words = typing.get_args(kind)
        if value not in words:
            raise LocalError(f"{where} = {value!r} is none of {', '.join(repr(word) for word in words)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise LocalError(f"{where} must be a list, not {_described(value)}")
        item = typing.get_args(kind)[0]
        return tuple(_value(item, element, f"{where}[{index}]") for index, element in enumerate(value))
    if _is_section(kind):
        if not isinstance(value, Mapping):
            raise LocalError(f"{where} must be a section, not {_described(value)}")
        return structure(kind, value, where)
    kind = getattr(kind, "__supertype__", kind)
    if kind is float and type(value) is int:
        return float(value)
    wanted = str if kind is Path else kind
    if type(value) is not wanted:
        raise LocalError(f"{where} must be {_NOUNS[kind]}, not {_described(value)}")
    return Path(value) if kind is Path else value


def _from_text(kind: Any, text: str) -> Any:
    plain = getattr(kind, "__supertype__", kind)
    if plain in (str, Path) or typing.get_origin(kind) is typing.Literal:
        return text
    if typing.get_origin(kind) is tuple and not text.startswith("["):
        text = f"[{text}]" if typing.get_args(kind)[0] in (int, float) else f"[{text!r}]"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # ``structure`` says what it should have been


def _without_none(kind: Any) -> Any:
    """``X`` of ``X | None``; TOML has no null, so None is only ever a default."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(arm for arm in typing.get_args(kind) if arm is not type(None))
    return kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and attrs.has(kind)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _described(value: Any) -> str:
    return _NOUNS.get(type(value), type(value).__name__) + f" ({value!r})"[:60]


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


_NOUNS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    list: "a list",
    dict: "a section",
}
