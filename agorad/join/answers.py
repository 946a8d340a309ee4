"""What a contributor answered, kept for the next time: ``join.json`` in the settings folder, 0600.

By run id, the run joined last at the end. Never the account's secret (``agorad.join.secret``). A file that
is damaged is as good as none: everything in it can be asked again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.config import SYSTEM_STATE
from agorad.service.running import is_ours
from p2p.errors import LocalError

LIMIT: Final = 256 << 10


@attrs.frozen(kw_only=True)
class NodeAnswers:
    """For the node of one GPU; 0 and empty where nothing was said."""

    port: int = 0
    announce_port: int = 0
    identity: str = ""
    log: str = ""


@attrs.frozen(kw_only=True)
class Answers:
    """For one run."""

    operator: str = ""
    """Who signed the manifest when this run was joined first."""
    account: str = ""
    email: str = ""
    gpus: tuple[int, ...] = ()
    """Of the last join; empty until chosen."""
    announce_ip: str = ""
    slots: int = 0
    """Microbatches at a time; 0 leaves it to the node."""
    nodes: dict[int, NodeAnswers] = attrs.field(factory=dict)
    """By GPU."""

    def node(self, gpu: int) -> NodeAnswers:
        """What was said of one GPU."""
        return self.nodes.get(gpu, NodeAnswers())


def folder(kind: str, fallback: str) -> Path:
    """The user's ``CONFIG`` or ``STATE`` folder for agora, by the XDG rules (relative paths do not count)."""
    root = os.environ.get(f"XDG_{kind}_HOME", "")
    return (Path(root) if root.startswith("/") else Path.home() / fallback) / "agora"


def states() -> Path:
    """Holds a folder a run: the system's where nodes are its services, else the user's."""
    if is_ours() and not os.environ.get("XDG_STATE_HOME"):
        return SYSTEM_STATE
    return folder("STATE", ".local/state")


def path() -> Path:
    """Where answers are kept."""
    return folder("CONFIG", ".config") / "join.json"


def recall() -> dict[str, Answers]:
    """Kept answers by run id, the last run last."""
    try:
        with path().open("rb") as file:
            kept = json.loads(file.read(LIMIT))
        return {str(run): _read(entry) for run, entry in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def configs() -> list[Path]:
    """Settings of the nodes of the run that was joined last."""
    runs = list(recall())
    return sorted(states().joinpath(runs[-1]).glob("gpu*/agorad.toml")) if runs else []


def keep(run: str, answers: Answers) -> Path:
    """Write them, this run last; returns the file."""
    kept = recall()
    kept.pop(run, None)
    kept[run] = answers
    file = path()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            os.fchmod(out.fileno(), 0o600)
            json.dump({name: attrs.asdict(entry) for name, entry in kept.items()}, out, indent=1)
        fresh.replace(file)
    except OSError as error:
        raise LocalError(f"cannot keep the answers in {file}: {error.strerror}") from error
    return file


def _read(entry: dict[str, Any]) -> Answers:
    gpus, nodes = entry.pop("gpus", []), entry.pop("nodes", {})
    if not isinstance(gpus, list) or not all(type(gpu) is int for gpu in gpus):
        raise TypeError("gpus")
    by_gpu = {int(gpu): NodeAnswers(**_plain(NodeAnswers, said)) for gpu, said in nodes.items()}
    return Answers(gpus=tuple(gpus), nodes=by_gpu, **_plain(Answers, entry))


def _plain(cls: type, entry: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts that ``cls`` knows, of the right type; a later version's others are left out."""
    kinds = {field.name: type(field.default) for field in attrs.fields(cls)}
    fit = {key: value for key, value in entry.items() if kinds.get(key) in (int, str)}
    for key, value in fit.items():
        if type(value) is not kinds[key]:
            raise TypeError(key)
    return fit
