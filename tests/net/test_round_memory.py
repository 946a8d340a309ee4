"""What rounds cost the host beside weights and optimizer: bytes a parameter at the peak, network included."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import trio

MEMBERS = 3
LIMIT = 8.0


def resident() -> tuple[int, int]:
    """Bytes of this process in memory now, and at most since the last ``forget_peak``."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(merge: str, robust: str) -> dict[str, float]:
    """A whole cycle of rounds of replicas with weights of their own, over loopback; for a fresh process."""
    import torch

    from p2p.averaging import RoundConfig
    from stage.compute import StageCompute
    from stage.config import ModelConfig, TrainingConfig
    from stage.robust import reducer
    from tests.net.test_averager import members

    torch.set_num_threads(1)
    model = ModelConfig(
        d=512, k=64, heads=8, kv_heads=8, head_dim=64, ffn=2048, seq=32, layers=(3,), full_rank_tail=True
    )
    training = TrainingConfig(seed=1, merge=merge, robust=robust)  # type: ignore[arg-type]

    async def main() -> dict[str, float]:
        replicas = [StageCompute(model, training, 0) for _ in range(MEMBERS)]
        for i, replica in enumerate(replicas):
            replica.weights.flat.mul_(1.0 + i / 100)
        async with members(MEMBERS, config=RoundConfig(part_bytes=1 << 20), reducer=reducer(robust)) as group:
            peers = [member.host.peer_id for member in group]

            async def take_part(i: int, number: int) -> None:
                packed = replicas[i].pack(number)
                outcome = await group[i].averager.average(
                    number, packed.index, packed.buffer(), 1.0, expected=peers, deadline=60.0
                )
                assert outcome.fraction == 1.0
                replicas[i].merge(packed, outcome)

            forget_peak()
            before, _ = resident()
            for number in range(training.slices):
                async with trio.open_nursery() as nursery:
                    for i in range(MEMBERS):
                        nursery.start_soon(take_part, i, number)
            _, peak = resident()
        drifts = [replica._merger.drift for replica in replicas]
        peak += sum(drift.nbytes for drift in drifts if drift is not None)  # there since before the rounds
        spread = max(float((r.weights.flat - replicas[0].weights.flat).abs().max()) for r in replicas)
        params = replicas[0].weights.flat.numel()
        return {"bytes": (peak - before) / MEMBERS / params, "params": params, "spread": spread}

    return trio.run(main)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("merge", "robust"), [("delta", "none"), ("ema", "clip")])
def test_a_cycle_of_rounds_needs_few_bytes_a_parameter(merge: str, robust: str) -> None:
    code = (
        "import json; from tests.net.test_round_memory import measure; print(json.dumps(measure({!r}, {!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(merge, robust)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["params"] > 5e6
    assert found["spread"] < 1e-5  # the rounds did average
    assert found["bytes"] <= LIMIT, found


def test_what_a_round_held_is_free_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors are the largest thing that a host holds: they must not wait for the garbage collector."""
    from p2p.averaging import averager
    from p2p.averaging.butterfly import Exchange
    from tests.net.test_averager import agree, members, numbers, run_round

    exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()
    made = 0

    def remembered(*arguments: object) -> Exchange:
        nonlocal made
        made += 1
        exchange = Exchange(*arguments)  # type: ignore[arg-type]
        exchanges.add(exchange)
        return exchange

    monkeypatch.setattr(averager, "Exchange", remembered)

    async def main() -> None:
        vectors = [numbers(300_000, seed) for seed in range(MEMBERS)]
        async with members(MEMBERS) as group:
            gc.collect()
            gc.disable()
            try:
                for number in range(1, 4):
                    results = await run_round(group, vectors, [1.0] * MEMBERS, number=number)
                    assert len(agree(results)) == MEMBERS
                    del results
                    for _ in range(100):  # calls that the mates end
                        if exchanges:
                            await trio.sleep(0.05)
                    assert (made, len(exchanges)) == (number * MEMBERS, 0)
            finally:
                gc.enable()

    trio.run(main)
