"""The likeliest next tokens: what the tail answers to a ticket of generation, and how one is drawn of them.

On the wire, likeliest first: their ids as little-endian uint32, then their logits as fp32. They are the whole
vocabulary where it has up to ``MOST`` tokens, and else ``MOST`` of it, so that an answer has at most 8 KiB.
Torch-free: trainers read them.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence

from p2p.errors import RemoteError

MOST = 1024


def wire_bytes(vocab: int) -> int:
    """Exact size of an answer for a vocabulary of this size."""
    return 8 * min(vocab, MOST)


def pack(tokens: Sequence[int], logits: Sequence[float]) -> bytes:
    """Tokens and their logits, likeliest first, in wire form."""
    return struct.pack(f"<{len(tokens)}I{len(logits)}f", *tokens, *logits)


def unpack(payload: bytes | bytearray | memoryview, vocab: int) -> list[tuple[int, float]]:
    """Pairs of token and logit, likeliest first. RemoteError unless they are what they should be."""
    count = min(vocab, MOST)
    if len(payload) != 8 * count:
        raise RemoteError(f"generate: {len(payload)} bytes, where {count} tokens take {8 * count}")
    values = struct.unpack(f"<{count}I{count}f", payload)
    tokens, logits = values[:count], values[count:]
    if max(tokens) >= vocab or len(set(tokens)) != count:
        raise RemoteError("generate: a token is outside the vocabulary, or there twice")
    falling = all(logits[at] >= logits[at + 1] for at in range(count - 1))
    if not falling or not (math.isfinite(logits[0]) and math.isfinite(logits[-1])):
        raise RemoteError("generate: the logits are not finite numbers that fall")
    return list(zip(tokens, logits, strict=True))


def draw(
    likeliest: Sequence[tuple[int, float]], temperature: float, top_k: int, top_p: float, rng: random.Random
) -> int:
    """One token: the likeliest at ``temperature`` 0, else drawn by its chance at that temperature.

    ``top_k`` (0: no bound) and ``top_p`` as in ``stage.exported``: of the likeliest so many, or as many as
    together have that probability among those that were answered.
    """
    if temperature <= 0:
        return likeliest[0][0]
    most = likeliest[0][1]
    weights = [math.exp((logit - most) / temperature) for _, logit in likeliest]
    kept = min(top_k or len(weights), len(weights))
    if top_p < 1:
        wanted, sum_before = top_p * math.fsum(weights), 0.0
        for place in range(kept):
            if place and sum_before >= wanted:
                kept = place
                break
            sum_before += weights[place]
    tokens = [token for token, _ in likeliest[:kept]]
    return rng.choices(tokens, weights[:kept])[0]
