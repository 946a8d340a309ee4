"""One archive that says what a developer needs to know of this machine's nodes, and none of their secrets.

Every file in it goes through ``agorad.redact``; keys, certificates, snapshots and data are never read into
it. When it is whole it is searched once more for each known secret; if one is there, nothing is written.
Limits: 1 MiB a file, 32 nodes.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import attrs

from agorad import __version__
from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.cli.targets import Target
from agorad.config import Config
from agorad.doctor.diagnose import diagnose
from agorad.doctor.patient import Patient, examine
from agorad.redact import Redactor
from p2p.errors import LocalError

MOST: Final = 1 << 20
NODES: Final = 32
_PACKAGES: Final = (
    "torch", "numpy", "trio", "cryptography", "msgpack", "attrs", "click", "SQLAlchemy", "huggingface_hub",
    "prometheus_client", "psycopg", "rich",
)  # fmt: skip
_SECRET_WORDS: Final = ("TOKEN", "SECRET", "PASSWORD", "DATABASE_URL", "API_KEY")
_SECRET_LEAST: Final = 8
"""TOKENIZERS_PARALLELISM=false is none."""
_SHOWN: Final = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LANG")


@attrs.frozen
class Report:
    """What was written."""

    path: Path
    files: dict[str, int]
    """Bytes by name."""
    hidden: int
    addresses: int


def write(targets: list[Target], path: Path, *, over_the_net: bool = True) -> Report:
    """Make the archive, readable by its owner alone. LocalError if it cannot be, or would not be clean."""
    redactor = Redactor()
    for name, value in os.environ.items():
        if any(word in name.upper() for word in _SECRET_WORDS) and len(value) >= _SECRET_LEAST:
            redactor.know(value)
    patients = [examine(target) for target in targets[:NODES]]
    for patient in patients:
        if patient.settings is not None:
            _learn(redactor, patient.settings)
    files = {"about.json": json.dumps(_about(), indent=1)}
    for patient in patients:
        for name, text in _of_node(patient, over_the_net):
            files[f"{patient.name}/{name}"] = text
    cleaned = {name: redactor.clean(text)[-MOST:].encode() for name, text in files.items()}
    cleaned["READ-ME-FIRST.txt"] = _letter(cleaned).encode()
    if any(redactor.leaks(data) for data in cleaned.values()):
        raise LocalError("a secret would have got into the report, so none was written; please tell us that")
    _archive(path, cleaned)
    sizes = {name: len(data) for name, data in cleaned.items()}
    return Report(path, sizes, redactor.hidden, redactor.addresses)


def _learn(redactor: Redactor, settings: Config) -> None:
    """What this node keeps to itself."""
    for path in (settings.worker.secret_file, settings.identity):
        try:
            if path is not None:
                data = path.read_bytes()
                redactor.know(data)
                redactor.know(data.strip())
                redactor.know(data[4:36])  # the seed within a key file
                if path == settings.worker.secret_file:
                    redactor.know(data.decode(errors="ignore").rpartition(":")[2].strip())
        except OSError:
            continue
    redactor.know(settings.authority.database)
    redactor.know(unquote(urlsplit(settings.authority.database).password or ""))


def _about() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "agorad": __version__,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version,
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "environment": {name: os.environ[name] for name in _SHOWN if name in os.environ},
        "also_set": sorted(name for name in os.environ if name.startswith(("AGORA_", "HF_"))),
    }


def _of_node(patient: Patient, over_the_net: bool) -> Iterator[tuple[str, str]]:
    settings = patient.settings
    found = diagnose(patient, over_the_net=over_the_net, measure=False)
    yield "doctor.json", json.dumps([one.to_json() for one in found], indent=1)
    yield "last_seen.json", json.dumps(attrs.asdict(patient.seen), indent=1)
    for command in ("status", "counters", "peers", "metrics", "stacks"):
        if patient.status is None:
            break
        try:
            answer = ask(patient.socket, command, timeout=5.0)
        except (Unreachable, NoAnswer, CommandFailed) as error:
            answer = {"error": str(error)}
        text = isinstance(answer, str)
        yield f"{command}.{'txt' if text else 'json'}", answer if text else json.dumps(answer, indent=1)
    if patient.path is not None:
        yield "agorad.toml", _tail(patient.path)
    if settings is not None:
        yield "run.toml", _tail(settings.node.run)
        yield "events.jsonl", _tail(settings.events)
        if settings.node.log is not None:
            yield "log.txt", _tail(settings.node.log)


def _tail(path: Path) -> str:
    """The end of a file, from the beginning of a line on."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - MOST))
            data = file.read(MOST)
    except OSError as error:
        return f"cannot read {path}: {error.strerror}\n"
    if end > MOST:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")


def _letter(files: dict[str, bytes]) -> str:
    listed = "".join(f"  {name}  {len(data)} bytes\n" for name, data in sorted(files.items()))
    return (
        "A report of agoractl bugreport. Secrets, tokens and mail addresses were taken out, internet\n"
        "addresses of others have names like ip-1. Names of nodes, accounts and peers are in it.\n"
        f"Look through it before you send it.\n\n{listed}"
    )


def _archive(path: Path, files: dict[str, bytes]) -> None:
    root = path.name.partition(".")[0]
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, data in sorted(files.items()):
                entry = tarfile.TarInfo(f"{root}/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(data))
    except FileExistsError as error:
        raise LocalError(f"{path} is there already; name another with --output") from error
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror}") from error
