"""Files of a checkpoint in a dataset of the Hugging Face hub: those that belong together are one commit.

The writers of all stages commit to one dataset at about the same time, and the hub takes one commit at a
time; who comes second is refused and tries again. Large files are read from where they lie: written through
the file system, the hub's client would copy them first, and leave the copy where the upload fails.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

BUSY: Final = frozenset({409, 412, 429, 503})
"""Statuses of a refusal that says: not now."""
TRIES: Final = 5
WAIT_S: Final = 1.0
"""Before the second try, about; twice as long before each one after it."""


def commit(fs: Any, writes: Mapping[str, bytes | Path], removes: Collection[str], words: str) -> None:
    """All of it or nothing; ``fs``: an ``HfFileSystem``. Blocks; raises what its client raises.

    What is to be removed and is not there (somebody tidied up by hand) is passed over.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    removes = [path for path in removes if fs.exists(path)]
    places = {path: fs.resolve_path(path) for path in [*writes, *removes]}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path, content in writes.items():
        source = content if isinstance(content, bytes) else str(content)
        operations.append(CommitOperationAdd(path_in_repo=places[path].path_in_repo, path_or_fileobj=source))
    operations += [CommitOperationDelete(path_in_repo=places[path].path_in_repo) for path in removes]
    where = next(iter(places.values()))
    api = HfApi(endpoint=fs.endpoint, token=fs.token)
    for again in range(TRIES):
        try:
            api.create_commit(
                where.repo_id,
                operations,
                commit_message=words,
                repo_type=where.repo_type,
                revision=where.revision,
            )
            break
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY or again == TRIES - 1:
                raise
            time.sleep(WAIT_S * 2**again * random.uniform(0.5, 1.5))
    fs.invalidate_cache()
