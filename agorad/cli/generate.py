"""``agoractl generate``: text from an exported model, as it comes."""

from __future__ import annotations

import codecs
import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from agorad.usage import NamedPath
from p2p.errors import LocalError

HELD_BACK = 64
"""Tokens that may wait for the rest of a character."""


@click.command()
@click.argument("prompt")
@click.option("--model", "folder", type=NamedPath(), required=True, help="What agoractl export has written.")
@click.option(
    "--max-tokens", type=click.IntRange(1, 1 << 20), default=200, show_default=True, help="At most so many."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=1.0, show_default=True,
    help="Lower is likelier; 0 takes the likeliest token.",
)  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the likeliest K tokens only.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
    help="Draw from the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="The same seed draws the same text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def generate(
    prompt: str,
    folder: Path,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Go on from PROMPT with an exported model, until its document ends.

    Ctrl-C ends it; what has come stays.

    Example: agoractl generate "def main" --model my-model --temperature 0.8
    """
    from stage.exported import BadModel, Model

    seed = secrets.randbits(63) if seed is None else seed
    prompt = prompt.encode(errors="replace").decode()
    try:
        model = Model.load(folder)
        encode, decode = text_of(str(model.config.get("tokens")), folder / "tokenizer.json")
        ids = encode(prompt)
        if not ids and model.end is not None:
            ids = [model.end]  # what follows the end of a document is the beginning of another
        if not as_json:
            _say(prompt)
        pieces: list[str] = []
        count, began = 0, time.perf_counter()
        for token in model.generate(
            ids, most=max_tokens, temperature=temperature, top_k=top_k or 0, top_p=top_p, seed=seed
        ):
            count += 1
            pieces.append(decode(token))
            if not as_json:
                _say(pieces[-1])
        pieces.append(decode(None))
    except BadModel as error:
        raise LocalError(str(error)) from None
    except KeyboardInterrupt:
        if not as_json:
            click.echo()
        raise SystemExit(130) from None
    seconds = time.perf_counter() - began
    if as_json:
        document = {
            "prompt": prompt, "text": "".join(pieces), "tokens": count, "seconds": seconds, "seed": seed,
            "end": "length" if count == max_tokens else "document", "run": model.config.get("run"),
            "steps": model.config.get("steps"),
        }  # fmt: skip
        click.echo(json.dumps(document))
        return
    click.echo(pieces[-1])
    click.echo(f"{count} tokens, {count / max(seconds, 1e-9):.1f} a second, seed {seed}", err=True)


def _say(text: str) -> None:
    """To stdout, at once; on a terminal without what would steer it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def text_of(kind: str, tokenizer: Path) -> tuple[Callable[[str], list[int]], Callable[[int | None], str]]:
    """From text to ids, and from one id after the other to text: whole characters; None: what is left.

    ``kind``: ``bytes``, or else what the file makes.
    """
    if kind == "bytes":
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def byte(token: int | None) -> str:
            if token is None:
                return utf8.decode(b"", final=True)
            return utf8.decode(bytes([token])) if token < 256 else ""

        return lambda text: list(text.encode()), byte

    from stage.data.tokens import Tokenizer

    codec: Any = Tokenizer(tokenizer).codec
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
