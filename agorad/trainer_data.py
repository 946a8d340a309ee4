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
        tokens=_tokens(settings, manifest),
    )


def check(settings: TrainerSection, manifest: Manifest) -> None:
    """``LocalError`` for what is wrong at the first look; cheap, unlike ``source``."""
    _tokens(settings, manifest)
    if settings.dataset:
        Dataset.parse(settings.dataset)
        if settings.data is not None:
            raise LocalError("trainer.data and trainer.dataset are both set; leave one of them out")
    if settings.data is not None:
        require_readable(settings.data, settings.field)


def _tokens(settings: TrainerSection, manifest: Manifest) -> Tokens:
    if manifest.data.tokens == "bytes":
        if settings.tokenizer is not None:
            raise LocalError(
                "trainer.tokenizer is set, but this run's data.tokens is 'bytes'; leave one of them out"
            )
        return Tokens()
    if settings.tokenizer is None:
        raise LocalError(
            "this run's data.tokens is 'tokenizer': name the run's tokenizer.json in trainer.tokenizer"
        )
    tokens, wanted = Tokenizer(settings.tokenizer), manifest.data.tokenizer_sha256
    if wanted and tokens.sha256 != wanted:
        raise LocalError(
            f"data: {settings.tokenizer} is not this run's tokenizer (its SHA-256 is {tokens.sha256}); "
            "get the one that the run's operator has"
        )
    if tokens.vocab > manifest.model.vocab:
        raise LocalError(
            f"data: {settings.tokenizer} makes ids up to {tokens.vocab - 1}, and model.vocab is "
            f"{manifest.model.vocab}; the run needs a larger one, or another tokenizer"
        )
    return tokens
