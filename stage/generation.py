"""Text from the run as it trains: a trainer asks the pipeline for one next token after the other.

Each token is one microbatch of kind ``generate``, forward only: the tokens so far, padded to the run's
sequence length, and the place whose next token is asked. The tail answers the likeliest ones
(``stage.likeliest``), and the trainer draws. Nothing is added to any gradient, nothing counts as a sample,
and no receipt is kept. The call is the one that trains (``stage.nexthop``): it waits where replicas are busy,
and goes to another replica where one fails.

Attention is causal, so what stands behind the place changes nothing. A run's replicas know sequences of its
length; when they are full, it goes on with the second half of them, as an exported model does.

Limits: one such microbatch in flight a trainer, whoever asks, so that training loses one place of many;
``TOKEN_S`` a token. Torch-free.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from collections.abc import AsyncGenerator, Callable, Sequence

import attrs
import trio

from p2p.errors import LocalError
from p2p.identity import Identity
from stage.clock import StepClock
from stage.config import ModelConfig, TrainingConfig
from stage.likeliest import draw, unpack, wire_bytes
from stage.messages import BASIS, Request
from stage.nexthop import NextHop, NoReplicaError
from stage.ticket import Ticket

TOKEN_S = 60.0
"""For one token, the wait for a place and for replicas that come back included."""
RETRY_S = 0.5
"""Pause after a stage was found empty."""


@attrs.frozen(kw_only=True)
class Wish:
    """How tokens are chosen, and how many at most."""

    most: int
    temperature: float
    """0 takes the likeliest."""
    top_k: int
    """0: no bound."""
    top_p: float
    seed: int


class Generation:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        identity: Identity,
        run: str,
        model: ModelConfig,
        training: Callable[[], TrainingConfig],
        clock: StepClock,
        next_hop: NextHop,
        shard: int,
        first: int,
    ) -> None:
        """``shard``: this trainer's place among the run's; ``first``: number of its first ticket, above all
        that it ever gave."""
        self._identity = identity
        self._run = run
        self._model = model
        self._training = training
        self._clock = clock
        self._next_hop = next_hop
        self._shard = shard
        self._numbers = itertools.count(first)
        self._turn = trio.Lock()

    async def tokens(self, ids: Sequence[int], wish: Wish, end: int | None) -> AsyncGenerator[int, None]:
        """What goes on behind ``ids``, until token ``end`` or ``wish.most`` of them; the same ``seed`` draws
        the same from the same answers. Raises P2PError."""
        if not ids or min(ids) < 0 or max(ids) >= self._model.vocab:
            raise LocalError("the prompt has no token, or one that this run does not have")
        rng = random.Random(wish.seed)
        known, window = list(ids), self._model.seq
        for _ in range(wish.most):
            if len(known) > window:
                known = known[-max(1, window // 2) :]
            token = draw(await self._likeliest(known), wish.temperature, wish.top_k, wish.top_p, rng)
            if token == end:
                return
            yield token
            known.append(token)

    async def _likeliest(self, known: Sequence[int]) -> list[tuple[int, float]]:
        """The likeliest tokens behind ``known``, 1 to seq of them."""
        padded = [*known, *[0] * (self._model.seq + 1 - len(known))]
        ids = struct.pack(f"<{len(padded)}I", *padded)
        why = "its replicas are busy, or do not answer"
        with trio.move_on_after(TOKEN_S):
            async with self._turn:
                request = self._request(ids, len(known) - 1)
                while True:
                    try:
                        passed = await self._next_hop.send(
                            request, [ids], back_bytes=wire_bytes(self._model.vocab)
                        )
                    except NoReplicaError as error:
                        why = str(error)
                        await trio.sleep(RETRY_S)
                    else:
                        return unpack(passed.dc, self._model.vocab)
        raise LocalError(f"the run gave no token within {TOKEN_S:.0f} s: {why}; agoractl swarm shows it")

    def _request(self, ids: bytes, place: int) -> Request:
        training = self._training()
        ticket = Ticket(
            run=self._run,
            trainer=self._identity.peer_id,
            kind="generate",
            shard=self._shard,
            position=next(self._numbers),
            ids_hash=hashlib.sha256(ids).digest(),
            weight=1.0,
        ).signed_by(self._identity)
        return Request(
            ticket=ticket,
            clock=self._clock.readings,
            basis=BASIS,
            path=[self._identity.peer_id],
            tokens=self._model.seq,
            documents=[],
            dtype=training.wire_dtype,
            dtype_back=training.wire_dtype_backward,
            inline=False,
            deadline_s=2 * TOKEN_S,
            place=place,
        )
