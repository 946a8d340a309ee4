"""A real tokenizer's file, trained in a moment."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers


def trained(path: Path) -> Path:
    """The path, with the file there: at most 400 ids; it asks for truncation and padding, as some do."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(["It was a dark and stormy night; the rain fell in torrents."] * 9, trainer)
    library.enable_truncation(5)
    library.enable_padding(length=9)
    library.save(str(path))
    return path
