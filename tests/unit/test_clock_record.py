"""The clock record in the hash table: there for newcomers as long as the trainer is, work or no work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from agorad.node import Node
from agorad.roles.trainer import CLOCK_TTL_S, _publish_clock
from p2p.identity import Identity
from stage.clock import Reading, StepClock
from stage.trainer import Trainer

TRAINER = Identity.generate(bytes([1]) * 32)


def test_a_clock_that_stands_still_does_not_run_out() -> None:
    ends: list[float] = []

    class Table:
        async def store(self, _key: str, _subkey: str, _value: Any, *, ttl: float, deadline: float) -> int:
            now = trio.current_time()
            assert not ends or now < ends[-1]
            ends.append(now + ttl)
            return 1

    async def main() -> None:
        manifest = SimpleNamespace(run=SimpleNamespace(id="run"))
        node = SimpleNamespace(dht=Table(), identity=TRAINER, manifest=manifest, clock=trio.current_time)
        trainer = SimpleNamespace(clock_changed=trio.Event(), loss=None, evaluated=None)
        clock = StepClock("run", frozenset({TRAINER.peer_id}), 4)
        clock.observe([Reading.signed(TRAINER, "run", 8)])
        began = trio.current_time()
        with trio.move_on_after(5 * CLOCK_TTL_S):
            await _publish_clock(cast(Node, node), clock, cast(Trainer, trainer))
        assert ends[0] == began + CLOCK_TTL_S
        assert trio.current_time() < ends[-1]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(ends) < 30
