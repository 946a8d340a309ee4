"""``agoractl generate``: text from a run as it trains, or from an exported model, as it comes."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click

from agorad.ask import follow
from agorad.cli.targets import Where, of_role, target_options
from agorad.control import REQUEST_LIMIT, encode
from agorad.usage import NamedPath
from p2p.errors import LocalError

ANSWER_S = 600.0
"""Longest silence between two pieces of text: a trainer gives a token up long before."""


@attrs.define
class Said:
    """What is known of a text when it has ended."""

    tokens: int = 0
    end: str = "length"
    run: str | None = None
    steps: list[int] | None = None


@attrs.frozen
class Choice:
    """How tokens are chosen, and how many at most."""

    most: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


@click.command()
@click.argument("prompt")
@click.option(
    "--model",
    type=NamedPath(),
    help="What agoractl export has written. Else the run itself is asked.",
)
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
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def generate(
    prompt: str,
    model: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    where: Where,
    as_json: bool,
) -> None:
    """Go on from PROMPT, until its document ends.

    Without --model a trainer of this machine asks the run as it is now, a whole pass through the pipeline for
    each token. Ctrl-C ends it; what has come stays.

    Example: agoractl generate "def main" --temperature 0.8
    """
    choice = Choice(
        max_tokens, temperature, top_k or 0, top_p, secrets.randbits(63) if seed is None else seed
    )
    prompt = prompt.encode(errors="replace").decode()
    said, pieces, began = Said(), list[str](), time.perf_counter()
    source = _live(where, prompt, choice, said) if model is None else _exported(model, prompt, choice, said)
    try:
        for piece in source:
            if not as_json:
                _say(piece if pieces else prompt + piece)
            pieces.append(piece)
    except KeyboardInterrupt:
        if not as_json:
            click.echo()
        raise SystemExit(130) from None
    except BaseException:
        if pieces and not as_json:
            click.echo()
        raise
    seconds = time.perf_counter() - began
    if as_json:
        document = {
            "prompt": prompt, "text": "".join(pieces), "seconds": seconds, "seed": choice.seed,
            **attrs.asdict(said),
        }  # fmt: skip
        click.echo(json.dumps(document))
        return
    click.echo()
    rate = said.tokens / max(seconds, 1e-9)
    click.echo(f"{said.tokens} tokens, {rate:.1f} a second, seed {choice.seed}", err=True)


def _exported(folder: Path, prompt: str, choice: Choice, said: Said) -> Iterator[str]:
    """Pieces of text from an exported model, the first of them empty."""
    from agorad.text import text_of
    from stage.data.tokens import Tokenizer, Tokens
    from stage.exported import BadModel, Model

    try:
        model = Model.load(folder)
        said.run, said.steps = model.config.get("run"), model.config.get("steps")
        bytewise = model.config.get("tokens") == "bytes"
        encode, decode = text_of(Tokens() if bytewise else Tokenizer(folder / "tokenizer.json"))
        ids = encode(prompt)
        if not ids and model.end is not None:
            ids = [model.end]  # what follows the end of a document is the beginning of another
        yield ""
        for token in model.generate(
            ids, most=choice.most, temperature=choice.temperature, top_k=choice.top_k, top_p=choice.top_p,
            seed=choice.seed,
        ):  # fmt: skip
            said.tokens += 1
            yield decode(token)
        yield decode(None)
    except BadModel as error:
        raise LocalError(str(error)) from None
    said.end = "length" if said.tokens == choice.most else "document"


def _live(where: Where, prompt: str, choice: Choice, said: Said) -> Iterator[str]:
    """Pieces of text from the run of a trainer."""
    request: dict[str, Any] = {"prompt": prompt, **attrs.asdict(choice)}
    if len(encode(request)) > REQUEST_LIMIT - 64:
        raise LocalError(
            f"the prompt is longer than the {REQUEST_LIMIT >> 10} KiB that a node takes; shorten it, since a "
            "run looks at one sequence of its training only"
        )
    trainer = of_role(where, "trainer")
    if trainer is None:
        raise LocalError(
            "none of these nodes is a trainer, and a run answers nobody else; ask where a trainer runs, or "
            "name an exported model with --model"
        )
    with trainer.advised():
        for item in follow(trainer.socket, "generate", timeout=ANSWER_S, **request):
            if "end" in item:
                said.tokens, said.end, said.run = item["tokens"], item["end"], item["run"]
                said.steps = [item["step"]]
                yield item["text"]
                return
            yield item["text"]
    raise LocalError(f"{trainer.name} ended before the text did; agoractl status says why")


def _say(text: str) -> None:
    """To stdout, at once; on a terminal without what would steer it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
