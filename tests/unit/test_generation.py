"""Text from a run: what the tail may answer, how tokens are drawn of it, what is asked in which order.

A next hop that stands for the pipeline answers by a rule; time is virtual.
"""

from __future__ import annotations

import math
import random
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

import attrs
import pytest
import trio
import trio.testing

from agorad import generating
from agorad.control import BadRequest
from p2p.errors import LocalError, RemoteError
from p2p.identity import Identity
from stage import likeliest
from stage.clock import StepClock
from stage.config import ModelConfig, TrainingConfig
from stage.generation import TOKEN_S, Generation, Wish
from stage.messages import Answer, Load, Request
from stage.nexthop import NextHop, NoReplicaError, Passed

TRAINER, WORKER = (Identity.generate(bytes([number]) * 32) for number in (1, 2))
LISTED = frozenset({TRAINER.peer_id})
VOCAB, SEQ = 12, 8
MODEL = ModelConfig(d=16, k=4, layers=(1, 1), heads=2, kv_heads=1, head_dim=8, ffn=16, seq=SEQ, vocab=VOCAB)
GREEDY = Wish(most=5, temperature=0.0, top_k=0, top_p=1.0, seed=1)


def answer_of(tokens: list[int]) -> bytes:
    return likeliest.pack(tokens, [-0.5 * place for place in range(len(tokens))])


class Pipeline:
    """Stands for ``NextHop``: behind a token the next number is the likeliest, and then the one after it."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.tickets: list[str] = []
        self.at_work = self.most_at_work = 0
        self.trouble: Callable[[], Exception | None] = lambda: None
        self.payload: Callable[[int], bytes] = lambda last: answer_of(
            [(last + 1 + by) % VOCAB for by in range(VOCAB)]
        )

    async def send(self, request: Request, payload: list[bytes], *, back_bytes: int) -> Passed:
        request.ticket.check("run", LISTED, payload[0])
        assert Request.from_wire(request.to_wire()) == request
        assert (request.ticket.kind, request.tokens, back_bytes) == ("generate", SEQ, 8 * VOCAB)
        assert request.place is not None
        ids = list(struct.unpack(f"<{SEQ + 1}I", payload[0]))
        assert ids[request.place + 1 :] == [0] * (SEQ - request.place)
        self.asked.append((ids, request.place))
        self.tickets.append(request.ticket.id)
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            await trio.sleep(0.2)
        finally:
            self.at_work -= 1
        trouble = self.trouble()
        if trouble is not None:
            raise trouble
        answer = Answer(loss=0.0, c_hash=b"", path=[WORKER.peer_id], load=Load(1), stale=False)
        return Passed(answer, memoryview(self.payload(ids[request.place])), WORKER.peer_id)


def generation(pipeline: Pipeline) -> Generation:
    return Generation(
        identity=TRAINER,
        run="run",
        model=MODEL,
        training=lambda: TrainingConfig(seed=1),
        clock=StepClock("run", LISTED, 4),
        next_hop=cast(NextHop, pipeline),
        shard=0,
        first=7,
    )


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def made(pipeline: Pipeline, ids: list[int], wish: Wish = GREEDY, end: int | None = None) -> list[int]:
    async def main() -> list[int]:
        return [token async for token in generation(pipeline).tokens(ids, wish, end)]

    found: list[int] = run(main)
    return found


def test_each_token_is_asked_behind_those_before_it() -> None:
    pipeline = Pipeline()
    assert made(pipeline, [3, 4]) == [5, 6, 7, 8, 9]
    assert [(ids[: place + 1], place) for ids, place in pipeline.asked] == [
        ([3, 4, *range(5, 5 + more)], 1 + more) for more in range(5)
    ]
    assert pipeline.tickets == [f"generate:0:{7 + number}" for number in range(5)]


def test_it_ends_with_the_document() -> None:
    assert made(Pipeline(), [3], end=6) == [4, 5]


def test_a_full_sequence_goes_on_with_its_second_half() -> None:
    pipeline = Pipeline()
    made(pipeline, list(range(SEQ + 2)), attrs.evolve(GREEDY, most=SEQ))
    lengths = [place + 1 for _, place in pipeline.asked]
    assert lengths == [4, 5, 6, 7, 8, 4, 5, 6]
    assert pipeline.asked[0][0][:4] == [6, 7, 8, 9]


@pytest.mark.parametrize("ids", [[], [VOCAB], [1, -1]])
def test_ids_that_the_run_does_not_have_are_refused(ids: list[int]) -> None:
    pipeline = Pipeline()
    with pytest.raises(LocalError, match="prompt"):
        made(pipeline, ids)
    assert pipeline.asked == []


def test_askers_take_turns() -> None:
    pipeline = Pipeline()
    texts: list[list[int]] = []

    async def main() -> None:
        one = generation(pipeline)

        async def ask(first: int) -> None:
            texts.append([token async for token in one.tokens([first], GREEDY, None)])

        async with trio.open_nursery() as nursery:
            for first in (1, 2, 3):
                nursery.start_soon(ask, first)

    run(main)
    assert sorted(texts) == [[n, n + 1, n + 2, n + 3, n + 4] for n in (2, 3, 4)]
    assert pipeline.most_at_work == 1
    assert len(set(pipeline.tickets)) == 15


def test_a_stage_that_comes_back_costs_time_and_one_that_does_not_is_named() -> None:
    pipeline = Pipeline()
    troubles = [NoReplicaError(1)] * 3
    pipeline.trouble = lambda: troubles.pop() if troubles else None
    assert made(pipeline, [1]) == [2, 3, 4, 5, 6]
    pipeline.trouble = lambda: NoReplicaError(1)

    async def main() -> float:
        began = trio.current_time()
        with pytest.raises(LocalError, match="stage 1 has no live replica"):
            await generation(pipeline).tokens([1], GREEDY, None).__anext__()
        return trio.current_time() - began

    assert run(main) == pytest.approx(TOKEN_S)


def test_an_answer_that_is_none_is_an_error() -> None:
    pipeline = Pipeline()
    pipeline.payload = lambda _last: bytes(8 * VOCAB)
    with pytest.raises(RemoteError):
        made(pipeline, [1])


# What the tail answers


def test_the_likeliest_survive_the_wire() -> None:
    tokens, logits = [3, 1, 2, 0], [2.5, 0.0, 0.0, -8.0]
    packed = likeliest.pack(tokens, logits)
    assert len(packed) == likeliest.wire_bytes(4)
    assert likeliest.unpack(packed, 4) == list(zip(tokens, logits, strict=True))
    assert likeliest.wire_bytes(128_256) == 8 * likeliest.MOST


@pytest.mark.parametrize(
    ("tokens", "logits"),
    [
        ([0, 1, 2], [3.0, 2.0, 1.0]), ([0, 1, 2, 3, 4], [3.0, 2.0, 1.0, 0.0, 0.0]),
        ([0, 1, 2, 4], [3.0, 2.0, 1.0, 0.0]), ([0, 1, 2, 2], [3.0, 2.0, 1.0, 0.0]),
        ([0, 1, 2, 3], [3.0, 2.0, 2.5, 0.0]), ([0, 1, 2, 3], [math.inf, 2.0, 1.0, 0.0]),
        ([0, 1, 2, 3], [3.0, 2.0, 1.0, -math.inf]), ([0, 1, 2, 3], [3.0, math.nan, 1.0, 0.0]),
    ],
)  # fmt: skip
def test_other_answers_are_remote_errors(tokens: list[int], logits: list[float]) -> None:
    with pytest.raises(RemoteError, match="generate"):
        likeliest.unpack(likeliest.pack(tokens, logits), 4)


# Drawing

PAIRS = [(7, 2.0), (3, 1.0), (5, 0.0), (1, -1.0)]


def shares(temperature: float, top_k: int = 0, top_p: float = 1.0) -> dict[int, float]:
    rng = random.Random(5)
    drawn = Counter(likeliest.draw(PAIRS, temperature, top_k, top_p, rng) for _ in range(20_000))
    return {token: count / 20_000 for token, count in drawn.items()}


def chances(temperature: float, kept: int) -> dict[int, float]:
    weights = {token: math.exp(logit / temperature) for token, logit in PAIRS[:kept]}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ((1.0, 0, 1.0), 4), ((0.5, 0, 1.0), 4), ((1.0, 2, 1.0), 2), ((1.0, 9, 1.0), 4), ((1.0, 0, 0.5), 1),
        ((1.0, 0, 0.7), 2), ((1.0, 3, 0.9), 3), ((1.0, 1, 0.9), 1),
    ],
)  # fmt: skip
def test_tokens_come_as_often_as_their_chance(how: tuple[float, int, float], kept: int) -> None:
    assert shares(*how) == pytest.approx(chances(how[0], kept), abs=0.015)


def test_no_temperature_takes_the_likeliest_and_a_seed_draws_again() -> None:
    assert likeliest.draw(PAIRS, 0.0, 0, 1.0, random.Random(1)) == 7
    assert likeliest.draw(PAIRS, 1e-300, 0, 1.0, random.Random(1)) == 7
    wish = Wish(most=9, temperature=3.0, top_k=0, top_p=1.0, seed=4)
    assert made(Pipeline(), [1], wish) == made(Pipeline(), [1], wish)
    assert made(Pipeline(), [1], wish) != made(Pipeline(), [1], attrs.evolve(wish, seed=5))


# Who asks at the control socket

ASKED = {"prompt": "x", "most": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1}


def test_a_request_is_read() -> None:
    assert generating.read(ASKED) == ("x", Wish(most=3, temperature=1.0, top_k=0, top_p=1.0, seed=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 1}, {"prompt": None}, {"most": 0}, {"most": generating.MOST_TOKENS + 1}, {"most": 1.5},
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": "hot"}, {"temperature": 101},
        {"top_k": -1}, {"top_k": None}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}, {"seed": "x"},
    ],
)  # fmt: skip
def test_other_requests_are_refused_with_what_it_takes(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=str(generating.MOST_TOKENS)):
        generating.read(ASKED | changes)
