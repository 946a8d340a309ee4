"""Newer versions of a manifest in a live run: what they may change, how they travel, what is kept.

The operator signs version n+1 of the manifest and gives it to a running authority (``agoractl authority
publish``), which keeps it in the hash table as records of its own: ``manifest/<run>/<page>``, each page a map
``{version, pages, hash, signature, part}``. ``part`` is a piece of the signed content, ``signature`` the
operator's over all of it. Pages of different versions do not go together. Readers believe the operator's
signature, not the authority's, and judge by themselves whether the version may follow theirs (``follow``).

In the state folder ``manifest.json`` holds the newest manifest and the hashes of those before it, which hello
goes on to accept: during a change-over not everybody has heard. Limits: ``PAGES`` pages of ``PAGE`` bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.run import Manifest, Signature, from_table
from p2p.errors import LocalError, RemoteError
from p2p.files import read_small, write_whole
from p2p.membership import KNOWN_LIMIT

PAGE: Final = 3072
"""With its head it fits a record."""
PAGES: Final = 16
CONTENT_LIMIT: Final = PAGE * PAGES
FILE: Final = "manifest.json"
FILE_LIMIT: Final = 8 << 20

LIVE_TRAINING: Final = frozenset(
    {
        "min_step_samples",
        "average_every",
        "max_stale_steps",
        "warm_steps",
        "merge",
        "lr",
        "warmup_steps",
        "total_steps",
        "min_lr_ratio",
        "schedule",
        "beta1",
        "beta2",
        "weight_decay",
        "max_norm",
        "eval_every",
    }
)
"""What replicas may take up one after the other, each at a step of its own. The rest of ``[training]`` is
what they agree in to the bit: the step clock's unit, slices, the form of what crosses the wire, the seed."""


def follow(known: Manifest, newer: Manifest) -> None:
    """``LocalError`` unless ``newer`` is a sound next version of ``known`` that a live run can take up."""
    newer.check_signature()
    for name in ("id", "operator"):
        ours, theirs = getattr(known.run, name), getattr(newer.run, name)
        if ours != theirs:
            raise LocalError(f"run.{name} is {theirs}, not {ours}: this is the manifest of another run")
    if newer.run.version <= known.run.version:
        raise LocalError(
            f"version {newer.run.version} of the manifest is not newer than {known.run.version}, which is "
            "in force; sign the edited file with `agoractl run sign`"
        )
    for name in changed(known, newer):
        section, _, field = name.partition(".")
        if section in ("model", "data") or name == "admission.accounts":
            raise LocalError(f"{name} cannot change in a live run; start a new run for that")
        if section == "training" and field not in LIVE_TRAINING:
            raise LocalError(
                f"{name} cannot change in a live run, since all nodes have to agree in it at every moment; "
                "start a new run for that"
            )
    before, after = known.training.average_every, newer.training.average_every
    if after > before:
        raise LocalError(
            f"training.average_every may only become smaller in a live run ({before} is in force), since "
            "rounds are numbered by it"
        )
    if [ref.peer_id for ref in known.trainers] != [ref.peer_id for ref in newer.trainers]:
        raise LocalError(
            "the list of trainers cannot change in a live run, since their shares of the data follow from it"
        )
    if newer.checkpoint.generation < known.checkpoint.generation:
        raise LocalError(
            f"checkpoint.generation may only grow ({known.checkpoint.generation} is in force); go back to an "
            "earlier step with `agoractl run rollback`"
        )
    if known.authorities and not newer.authorities:
        raise LocalError("the newer manifest lists no authority; keep one at least")


def changed(known: Manifest, newer: Manifest) -> list[str]:
    """Names of the settings that differ, sorted; lists of nodes count as one setting each."""
    names = []
    for section in ("model", "training", "admission", "data", "checkpoint"):
        ours, theirs = getattr(known, section), getattr(newer, section)
        names += [
            f"{section}.{field.name}"
            for field in attrs.fields(type(ours))
            if getattr(ours, field.name) != getattr(theirs, field.name)
        ]
    names += [
        name for name in ("authorities", "seeds", "trainers") if getattr(known, name) != getattr(newer, name)
    ]
    if known.run.revoked != newer.run.revoked:
        names.append("run.revoked")
    return sorted(names)


# As records


def key(run: str, page: int) -> str:
    """Where a page lies."""
    return f"manifest/{run}/{page}"


def pages(manifest: Manifest) -> list[dict[str, Any]]:
    """The signed manifest as values of records; ``LocalError`` if it is not signed or too large."""
    manifest.check_signature()
    assert manifest.signature is not None
    content = manifest.content
    if len(content) > CONTENT_LIMIT:
        raise LocalError(
            f"the manifest has {len(content)} bytes; a live run takes up at most {CONTENT_LIMIT}: "
            "list fewer nodes"
        )
    parts = [content[start : start + PAGE] for start in range(0, len(content), PAGE)]
    head = {
        "version": manifest.run.version,
        "pages": len(parts),
        "hash": manifest.hash,
        "signature": bytes.fromhex(manifest.signature.ed25519),
    }
    return [{**head, "part": part} for part in parts]


def version_of(value: object) -> int:
    """Of the manifest that a page belongs to; ``RemoteError`` if it is no page."""
    return int(_page(value)["version"])


def page_count(value: object) -> int:
    """Of the manifest, by one of its pages."""
    return int(_page(value)["pages"])


def read(values: Sequence[object]) -> Manifest:
    """The manifest from all its pages; its signature is not judged. ``RemoteError`` unless they fit."""
    read_pages = [_page(value) for value in values]
    first = read_pages[0]
    if first["pages"] != len(read_pages) or any(
        page[name] != first[name] for page in read_pages for name in ("version", "pages", "hash", "signature")
    ):
        raise RemoteError("pages of different manifests, or one missing")
    content = b"".join(page["part"] for page in read_pages)
    if hashlib.sha256(content).digest() != first["hash"]:
        raise RemoteError("a manifest that is not what its pages promise")
    manifest = parse(content, first["signature"].hex())
    if manifest.run.version != first["version"]:
        raise RemoteError("a manifest of another version than its pages promise")
    return manifest


def parse(content: bytes, signature: str) -> Manifest:
    """A manifest from its signed content; ``RemoteError`` with the reason if it is none."""
    try:
        table = json.loads(content)
        if not isinstance(table, dict):
            raise LocalError("it is no table")
        manifest = attrs.evolve(from_table(table), signature=Signature(ed25519=signature))
    except (ValueError, RecursionError, LocalError) as error:
        raise RemoteError(f"a manifest that this version cannot read: {error}") from error
    if manifest.content != content:
        raise RemoteError("a manifest that is not in canonical form")
    return manifest


def _page(value: object) -> Mapping[str, Any]:
    if not (
        isinstance(value, Mapping)
        and type(value.get("version")) is int
        and 1 <= value["version"] < 1 << 32
        and type(value.get("pages")) is int
        and 1 <= value["pages"] <= PAGES
        and _is_bytes(value.get("hash"), 32)
        and _is_bytes(value.get("signature"), 64)
        and isinstance(value.get("part"), bytes)
        and 0 < len(value["part"]) <= PAGE
    ):
        raise RemoteError("a page of a manifest that is none")
    return value


def _is_bytes(value: object, length: int) -> bool:
    return isinstance(value, bytes) and len(value) == length


# In the state folder


def keep(state: Path, manifest: Manifest, known: Sequence[bytes]) -> None:
    """Write the manifest in force and the hashes of earlier ones; ``LocalError`` if the disk says no."""
    signature = "" if manifest.signature is None else manifest.signature.ed25519
    document = {
        "content": manifest.content.decode(),
        "signature": signature,
        "known": [one.hex() for one in known],
    }
    path = state / FILE
    try:
        write_whole(path, json.dumps(document).encode())
    except OSError as error:
        raise LocalError(f"cannot keep the manifest in {path}: {error.strerror}") from error


def restore(state: Path, given: Manifest) -> tuple[Manifest, tuple[bytes, ...]]:
    """The manifest to begin with, and the hashes of others that hello accepts.

    It is the one that was kept if that may follow the ``given`` one (the file of ``node.run``); a kept file
    that cannot be read counts as none.
    """
    try:
        document = json.loads(read_small(state / FILE, FILE_LIMIT))
        kept = parse(document["content"].encode(), document["signature"])
        known = [bytes.fromhex(one) for one in document["known"]]
        if kept.run.id != given.run.id or kept.run.operator != given.run.operator:
            return given, ()
        kept.check_signature()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RemoteError, LocalError):
        return given, ()
    manifest = given
    try:
        follow(given, kept)
        manifest = kept
    except LocalError:
        pass  # the file is as new, or of another kind: what the operator wrote there counts
    others = dict.fromkeys([*known, given.hash, kept.hash])
    others.pop(manifest.hash, None)
    return manifest, tuple(others)[-KNOWN_LIMIT:]
