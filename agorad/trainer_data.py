"""A trainer's data by its settings and the run's: which rows there are, and what can be known to be wrong."""

from __future__ import annotations

from pathlib import Path

from agorad.config import TrainerSection
from agorad.run import Manifest
from p2p.errors import LocalError
from stage.data import Source, Tokens
from stage.data.catalog import Catalog, LocalFiles, require_readable
from stage.data.hub import Dataset, HubFiles
from stage.data.tokens import Tokenizer


def source(settings: TrainerSection, manifest: Manifest, *, shards: int, kept: Path) -> Source:
    """The run's rows; files of the hub go to the folder ``kept``.

    Reads some of them; LocalError with one sentence if there are none, Unavailable for a hub that is away.
    """
    catalog: Catalog
    if settings.dataset:
        catalog = HubFiles(settings.dataset, kept, settings.field)
    else:
        catalog = LocalFiles(settings.data, settings.field)
    return Source(
        catalog,
        manifest.model.seq,
        manifest.training.seed,
        shards=shards,
        tokens=tokens(settings.tokenizer, manifest),
    )


def check(settings: TrainerSection, manifest: Manifest) -> None:
    """``LocalError`` for what is wrong at the first look; cheap, unlike ``source``."""
    tokens(settings.tokenizer, manifest)
    if settings.dataset:
        Dataset.parse(settings.dataset)
        if settings.data is not None:
            raise LocalError("trainer.data and trainer.dataset are both set; leave one of them out")
    if settings.data is not None:
        require_readable(settings.data, settings.field)


def tokens(tokenizer: Path | None, manifest: Manifest, named: str = "trainer.tokenizer") -> Tokens:
    """What makes the run's ids, with the file that ``named`` gives; ``LocalError`` if it is not the run's."""
    if manifest.data.tokens == "bytes":
        if tokenizer is not None:
            raise LocalError(f"{named} is set, but this run's data.tokens is 'bytes'; leave one of them out")
        return Tokens()
    if tokenizer is None:
        raise LocalError(f"this run's data.tokens is 'tokenizer': name the run's tokenizer.json in {named}")
    found, wanted = Tokenizer(tokenizer), manifest.data.tokenizer_sha256
    if wanted and found.sha256 != wanted:
        raise LocalError(
            f"data: {tokenizer} is not this run's tokenizer (its SHA-256 is {found.sha256}); "
            "get the one that the run's operator has"
        )
    if found.vocab > manifest.model.vocab:
        raise LocalError(
            f"data: {tokenizer} makes ids up to {found.vocab - 1}, and model.vocab is "
            f"{manifest.model.vocab}; the run needs a larger one, or another tokenizer"
        )
    return found
