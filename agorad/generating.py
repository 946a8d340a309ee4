"""A trainer's command ``generate``: text from the run that it feeds, for whoever may command the node.

Only a trainer's key makes tickets that the run's workers accept, so who has no trainer's control socket asks
nothing of the swarm. Items of the answer are pieces of text, as they come; the last says why there are no
more.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from agorad.control import BadRequest
from agorad.text import text_of
from stage.clock import StepClock
from stage.data.tokens import Tokens
from stage.generation import Generation, Wish

if TYPE_CHECKING:
    from agorad.node import Node

MOST_TOKENS = 4096
"""Of one request: the run has better to do."""


def install(node: Node, generation: Generation, tokens: Tokens, clock: StepClock) -> None:
    """Answer it."""

    async def generate(request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        prompt, wish = read(request)
        encode, decode = text_of(tokens)
        ids = encode(prompt)
        if not ids and tokens.end is not None:
            ids = [tokens.end]  # what follows the end of a document is the beginning of another

        async def items() -> AsyncIterator[dict[str, Any]]:
            count = 0
            async with contextlib.aclosing(generation.tokens(ids, wish, tokens.end)) as made:
                async for token in made:
                    count += 1
                    yield {"text": decode(token)}
            yield {
                "text": decode(None),
                "tokens": count,
                "end": "length" if count == wish.most else "document",
                "run": node.manifest.run.id,
                "step": clock.step,
            }

        return items()

    node.commands["generate"] = generate


def read(request: Mapping[str, Any]) -> tuple[str, Wish]:
    """The prompt and how to go on from it. Raises BadRequest."""
    match request:
        case {
            "prompt": str(prompt),
            "most": int(most),
            "temperature": int() | float() as temperature,
            "top_k": int(top_k),
            "top_p": int() | float() as top_p,
            "seed": int(seed),
        } if 1 <= most <= MOST_TOKENS and 0 <= temperature <= 100 and top_k >= 0 and 0 < top_p <= 1:
            return prompt, Wish(most=most, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    raise BadRequest(
        f"generate takes a prompt, at most {MOST_TOKENS} tokens, a temperature of 0 to 100, top_k, top_p in "
        "(0, 1] and a seed"
    )
