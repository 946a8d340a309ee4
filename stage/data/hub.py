"""Parquet files of a data set of the Hugging Face hub, one at a time: the catalog of ``trainer.dataset``.

What the data set consists of is asked once and written down beside the files, with the commit it is of, so
that a trainer that starts again has the same rows, whatever happened to the data set and whether the hub
answers. A file is fetched when it is its turn, by ``huggingface_hub`` (which goes on where a transfer broke
off, and takes a token from ``HF_TOKEN``), and kept until ``KEPT`` others were needed. The endpoint is
``HF_ENDPOINT``'s.

What cannot be had right now is ``Unavailable`` after ``ATTEMPTS``; what can never be had is a ``LocalError``:
there is no such data set, it wants a token, its files have no such column.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs

from p2p.errors import LocalError
from p2p.files import write_whole
from stage.data.catalog import Section
from stage.data.files import Troubles, Unavailable, open_file

KEPT = 3
"""Files on the disk at the same time."""
ATTEMPTS = 4
PAUSE_S = 1.0
"""Before the second attempt; doubled before each further one."""
ANSWER_S = 10.0
MAX_FILES = 100_000
LISTING = "listing.json"
_REMEDY = "correct trainer.dataset: owner/name, owner/name/folder or owner/name@revision"
T = TypeVar("T")


@attrs.frozen
class Dataset:
    """What ``trainer.dataset`` names."""

    repo: str
    folder: str = ""
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Dataset:
        """LocalError for a name that cannot be one."""
        path, at, revision = text.partition("@")
        parts = path.strip("/").split("/")
        words = [*parts, *revision.split("/")] if at else parts
        if len(parts) < 2 or not all(re.fullmatch(r"(?!\.+$)[\w.=-]{1,200}", word) for word in words):
            raise LocalError(f"trainer.dataset = {text!r} names no data set; {_REMEDY}")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")


class HubFiles:
    """See the head of this file."""

    def __init__(self, text: str, folder: Path, field: str, *, endpoint: str | None = None) -> None:
        """``folder``: where files are kept. LocalError, Unavailable."""
        self.troubles = Troubles()
        self._text = text
        self._dataset = Dataset.parse(text)
        self._folder = folder
        self._field = field
        self._endpoint = endpoint
        self._commit, self._files = self._listing()
        self.sections = len(self._files)
        told = [self._dataset.repo, self._commit, self._field, self._files]
        self.name = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def section(self, index: int, block_bytes: int) -> Section:
        """One file; fetched if it is not here."""
        path, size = self._files[index]
        local = self._folder / path
        if not (local.is_file() and local.stat().st_size == size):
            self._make_room()
            self._ask(lambda hub: self._fetch(hub, path))
        local.touch()
        return Section([open_file(local, self._field)], block_bytes, self.troubles)

    def describe(self) -> str:
        size = sum(size for _path, size in self._files) / 1e6
        return f"{size:.1f} MB of parquet from the data set {self._text}: {len(self._files)} files"

    def _listing(self) -> tuple[str, list[tuple[str, int]]]:
        """The commit and its files, as they were found when this folder was begun."""
        path = self._folder / LISTING
        try:
            known = json.loads(path.read_text())
            if known["dataset"] == self._text:
                return str(known["commit"]), [(str(name), int(size)) for name, size in known["files"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LocalError(f"cannot read {path}: {error}; remove it to ask the hub again") from None
        commit, files = self._ask(self._look)
        if not files:
            raise LocalError(f"data: the data set {self._text} has no parquet files; {_REMEDY}")
        fields = {"dataset": self._text, "commit": commit, "files": files}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(fields).encode())
        except OSError as error:
            raise LocalError(f"cannot write {path}: {error.strerror or error}") from None
        return commit, files

    def _look(self, hub: Any) -> tuple[str, list[tuple[str, int]]]:
        dataset = self._dataset
        api = hub.HfApi(endpoint=self._endpoint)
        info = api.dataset_info(dataset.repo, revision=dataset.revision, timeout=ANSWER_S)
        tree = api.list_repo_tree(
            dataset.repo, dataset.folder or None, recursive=True, revision=info.sha, repo_type="dataset"
        )
        files = sorted(
            (entry.path, int(entry.size))
            for entry in tree
            if isinstance(entry, hub.hf_api.RepoFile) and entry.path.endswith(".parquet")
        )
        return str(info.sha), files[:MAX_FILES]

    def _fetch(self, hub: Any, path: str) -> None:
        hub.hf_hub_download(
            self._dataset.repo,
            path,
            repo_type="dataset",
            revision=self._commit,
            local_dir=self._folder,
            endpoint=self._endpoint,
            etag_timeout=ANSWER_S,
        )

    def _make_room(self) -> None:
        """Removes what was used longest ago."""
        here = [self._folder / path for path, _size in self._files]
        used = sorted((path.stat().st_mtime, path) for path in here if path.is_file())
        for _at, path in used[: max(0, len(used) - KEPT + 1)]:
            path.unlink()

    def _ask(self, question: Callable[[Any], T]) -> T:
        hub, errors = _library()
        for attempt in range(ATTEMPTS):
            try:
                return question(hub)
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
                raise LocalError(
                    f"data: the hub has no data set {self._text}, or not for this token; {_REMEDY}"
                ) from None
            except errors.HFValidationError as error:
                raise LocalError(f"trainer.dataset = {self._text!r}: {_short(error)}; {_REMEDY}") from None
            except Exception as error:  # the library lets those of its HTTP client through
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status in (401, 403):
                    raise LocalError(
                        f"data: the hub refuses the data set {self._text} ({status}); "
                        "set HF_TOKEN to a token that may read it"
                    ) from None
                if attempt == ATTEMPTS - 1:
                    raise Unavailable(f"the data set {self._text}: {_short(error)}") from None
            time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError


def _library() -> tuple[Any, Any]:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.hf_api
        import huggingface_hub.utils
    except ImportError as error:
        raise LocalError(f"a data set needs the package huggingface_hub ({error}); install it") from None
    tools: Any = huggingface_hub.utils
    tools.disable_progress_bars()
    return huggingface_hub, huggingface_hub.errors


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
