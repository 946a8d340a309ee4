"""Between text and token ids, for people who read what a model writes as it writes it."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

from stage.data.tokens import Tokenizer, Tokens

HELD_BACK = 64
"""Tokens that may wait for the rest of a character."""


def text_of(tokens: Tokens) -> tuple[Callable[[str], list[int]], Callable[[int | None], str]]:
    """From text to ids, and from one id after the other to text: whole characters; None: what is left."""
    if not isinstance(tokens, Tokenizer):
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def byte(token: int | None) -> str:
            if token is None:
                return utf8.decode(b"", final=True)
            return utf8.decode(bytes([token])) if token < 256 else ""

        return lambda text: list(text.encode()), byte

    codec: Any = tokens.codec
    waiting: list[int] = []
    before: list[int] = []

    def encode(text: str) -> list[int]:
        nonlocal before
        ids: list[int] = codec.encode(text, add_special_tokens=False).ids
        before = ids[-1:]
        return ids

    def word(token: int | None) -> str:
        """A token's text depends on the one before, and a character may take several tokens."""
        nonlocal before
        if token is not None:
            waiting.append(token)
        head = codec.decode(before, skip_special_tokens=False)
        text: str = codec.decode(before + waiting, skip_special_tokens=False)
        broken = text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < HELD_BACK
        if token is not None and broken:
            return ""
        before = waiting[-1:] or before
        waiting.clear()
        return text[len(head) :]

    return encode, word
