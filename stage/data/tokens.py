"""Documents become token ids: their bytes, or what a file of the ``tokenizers`` library makes of them.

Bytes: each is an id, and a NUL follows every document. A tokenizer: its ids without any that it would add
by itself, and behind every document its own token for the end of one, where it has one of ``ENDS``. Where
documents begin is known in either case: it travels with each row.

Limits: a tokenizer's file has at most ``FILE_LIMIT`` bytes. ``tokenizers`` is imported with it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from p2p.errors import LocalError
from p2p.files import read_small
from stage.data.rows import Packed

FILE_LIMIT = 64 << 20
BATCH_BYTES = 1 << 18
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_REMEDY = "name a tokenizer.json of the tokenizers library in trainer.tokenizer"


@attrs.frozen
class Document:
    """Some text in UTF-8, and whether its document ends with it: long ones come in pieces."""

    text: bytes
    begins: bool = True
    ends: bool = True


class Tokens:
    """Ids of documents. ``Tokens()`` takes bytes, ``Tokenizer`` what is trained."""

    name = "bytes"
    vocab = 256
    """Ids are below it."""
    end: int | None = 0
    """Stands behind every document; None where nothing does."""

    def pack(self, documents: Iterable[Document]) -> Packed:
        """All of their ids."""
        ids, begins = bytearray(), array("Q")
        for document in documents:
            if document.begins:
                begins.append(len(ids))
            ids += document.text
            if document.ends:
                ids.append(0)
        return Packed(ids, begins)


class Tokenizer(Tokens):
    """Ids by a tokenizer's file."""

    def __init__(self, path: Path) -> None:
        try:
            content = read_small(path, FILE_LIMIT + 1)
        except OSError as error:
            raise LocalError(f"data: cannot read {path}: {error.strerror or error}; {_REMEDY}") from None
        if len(content) > FILE_LIMIT:
            raise LocalError(f"data: {path} has more than {FILE_LIMIT} bytes; {_REMEDY}")
        self.codec = _load(content, path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = f"tokenizer {self.sha256}"
        self.vocab = 1 + max(self.codec.get_vocab(with_added_tokens=True).values(), default=0)
        ends = (self.codec.token_to_id(word) for word in ENDS)
        self.end = next((end for end in ends if end is not None), None)

    def pack(self, documents: Iterable[Document]) -> Packed:
        ids, begins = array("I"), array("Q")
        for batch in _batches(documents):
            texts = [document.text.decode(errors="replace") for document in batch]
            encoded = self.codec.encode_batch_fast(texts, add_special_tokens=False)
            for document, encoding in zip(batch, encoded, strict=True):
                if document.begins:
                    begins.append(len(ids))
                ids.extend(encoding.ids)
                if document.ends and self.end is not None:
                    ids.append(self.end)
        return Packed(ids, begins)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Several at a time are faster than one by one."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load(content: bytes, path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise LocalError(f"data: a tokenizer needs the package tokenizers ({error}); install it") from None
    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more exact
        raise LocalError(f"data: {path} is no tokenizer: {str(error)[:120]}; {_REMEDY}") from None
    library.no_truncation()
    library.no_padding()
    return library
