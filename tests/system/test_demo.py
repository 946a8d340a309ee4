"""The main job, end to end: real processes, real TCP, real training, and a worker that is killed."""

from __future__ import annotations

import math
from pathlib import Path

from agorad.ask import follow
from agorad.authority.ledger import Rules
from agorad.authority.store import Store
from agorad.run import load
from tests.system.swarms import Demo, demo, processes_under

SMALL = (
    "--set", "training.eval_every=4",
    "--set", "model.seq=64",
    "--set", "training.target_batch=8",
)  # fmt: skip


def boundary_bytes(report: dict, tokens: int, k: int) -> int:
    forward, backward = report["hops"]["forward_hops"], report["hops"]["backward_hops"]
    return forward * (tokens * k * 4 + (tokens + 1) * 4) + backward * tokens * k * 4


def check_points(folder: Path, nodes: list[dict], completed: int, events: list[dict]) -> None:
    """Every worker earned what receipts say; all that the trainer had answered is among them."""
    store = Store(folder / "authority" / "authority.sqlite")
    try:
        rules = Rules.of(load(folder / "run.toml"))
        found = store.books.recompute(rules)
        earned = {balance.peer_id: balance.compute for balance in store.books.balances()}
    finally:
        store.close()
    evaluated = sum(2 * event["rows"] for event in events if event["event"] == "evaluated")
    assert (found.receipts, found.troubles) == (completed + evaluated, ())
    for stage in range(rules.model.stages):
        of_stage = [earned[node["peer_id"]] for node in nodes if node["stage"] == stage]
        assert all(of_stage)
        train, forward = rules.mflop(stage, "train"), rules.mflop(stage, "eval")
        assert sum(of_stage) == completed * train + evaluated * forward
    assert not any(e["refused"] for e in events if e["event"] == "receipts_submitted")


def check_text(swarm: Demo) -> None:
    """A swarm that trains says what its weights would; nothing below counts it."""
    wish = {"prompt": "def ", "most": 3, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1}
    trainer = Path(swarm.node("trainer-0")["control"])
    *pieces, last = follow(trainer, "generate", timeout=90.0, **wish)
    assert last["tokens"] == len(pieces)
    assert last["tokens"] == 3 or last["end"] == "document"


def test_a_swarm_trains_and_ends_cleanly(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    before = set(tmp_path.iterdir())
    with demo(folder, "--stages", "3", "--workers", "2", "--steps", "12", *SMALL) as swarm:
        names = {node["name"] for node in swarm.swarm()["nodes"]}
        assert names == {"seed", "authority", "trainer-0"} | {
            f"worker-{stage}-{replica}" for stage in range(3) for replica in range(2)
        }
        check_text(swarm)
        report = swarm.finish()
    assert report["steps"] == 12
    work = report["microbatches"]
    assert work["issued"] == work["completed"] == 12 * 8
    assert (work["lost"], work["failed"], work["twice"], work["gone_with_replica"]) == (0, 0, 0, 0)
    assert report["tokens"] == 12 * 8 * 64
    assert report["loss"]["uniform"] == math.log(256)
    assert report["loss"]["last"] < report["loss"]["first"] < 1.1 * report["loss"]["uniform"]
    assert report["eval_loss"][0][0] == 0
    assert report["eval_loss"][-1][1] < report["eval_loss"][0][1]
    assert report["rounds"]["completed"] >= 3
    assert set(report["exit"].values()) == {0}
    assert all(r["step"] == 12 for stage in report["stages"] for r in stage["replicas"])
    added = sum(r["microbatches"] for stage in report["stages"] for r in stage["replicas"])
    assert added == 3 * work["completed"]
    import tomllib

    k = tomllib.loads((folder / "run.toml").read_text())["model"]["k"]
    assert report["hops"]["backward_hops"] == 2 * work["completed"]
    assert report["bytes"]["boundary"] == boundary_bytes(report, 64, k)
    for name in names:
        if name.startswith("worker"):  # genesis makes everybody ACTIVE, and nothing disturbs that
            assert [e["to"] for e in swarm.events(name) if e["event"] == "phase"] == ["active"]
    checksums: dict[tuple[int, int], set[str]] = {}
    for name in names:
        for event in swarm.events(name):
            if event["event"] == "round_finished":
                checksums.setdefault((event["stage"], event["round"]), set()).add(event["checksum"])
    check_points(folder, swarm.swarm()["nodes"], work["completed"], swarm.events("trainer-0"))
    assert checksums
    assert all(len(seen) == 1 for seen in checksums.values())
    assert processes_under(folder) == []
    assert set(tmp_path.iterdir()) - before == {folder}


def test_training_goes_on_when_a_worker_is_killed_and_it_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    options = ("--stages", "2", "--workers", "2", "--steps", "60", *SMALL)
    with demo(folder, *options, "--set", "worker.snapshot_every=2") as swarm:
        swarm.swarm()
        swarm.wait_for(lambda: swarm.count("worker-1-0", "saved") > 0, 60, "snapshot")
        killed_at = swarm.kill("worker-1-0")
        swarm.wait_for(
            lambda: any(
                event["event"] == "microbatch_completed" and event["at"] > killed_at
                for event in swarm.events("trainer-0")
            ),
            5.0,
            "completed microbatch after the kill",
        )
        again = swarm.restart("worker-1-0")
        swarm.wait_for(
            lambda: (
                [e for e in swarm.events("worker-1-0") if e["event"] == "phase"][-1]["to"] == "active"
                and len([e for e in swarm.events("worker-1-0") if e["event"] == "started"]) == 2
            ),
            60,
            "restarted worker ACTIVE",
        )
        report = swarm.finish()
        assert again.wait(30) == 0
    work = report["microbatches"]
    assert (work["lost"], work["failed"]) == (0, 0)
    assert report["exit"]["worker-1-0"] == -9
    assert {code for name, code in report["exit"].items() if name != "worker-1-0"} == {0}
    assert processes_under(folder) == []
