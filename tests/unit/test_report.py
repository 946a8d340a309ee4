"""The report is counted from event logs: each number from a ledger written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from agorad.demo.report import NodeLog, build
from agorad.events import Bus, Started
from stage.events import MicrobatchAdded, MicrobatchCompleted, MicrobatchIssued

Entry = dict[str, Any]


def log(role: str, *events: Entry, name: str = "node", stage: int | None = None) -> NodeLog:
    return NodeLog(name, role, stage, f"peer of {name}", [{"at": 0.0} | event for event in events])


def issued(ticket: str, at: float = 0.0) -> Entry:
    return {"event": "microbatch_issued", "ticket": ticket, "at": at}


def completed(ticket: str, at: float, loss: float = 1.0) -> Entry:
    return {"event": "microbatch_completed", "ticket": ticket, "at": at, "loss": loss, "path": []}


def failed(ticket: str) -> Entry:
    return {"event": "microbatch_failed", "ticket": ticket, "why": "stopped"}


def added(ticket: str, stage: int = 0) -> Entry:
    return {"event": "microbatch_added", "ticket": ticket, "stage": stage}


def step(number: int, samples: int) -> Entry:
    return {"event": "step", "step": number, "samples": samples}


def finished(number: int, fraction: float, stage: int = 0) -> Entry:
    return {"event": "round_finished", "round": number, "stage": stage, "fraction": fraction}


def abandoned(number: int, stage: int = 0) -> Entry:
    return {"event": "round_abandoned", "round": number, "stage": stage, "why": "nobody came"}


STARTED, STOPPED = {"event": "started"}, {"event": "stopped"}


def report(*logs: NodeLog, **more: Any) -> dict[str, Any]:
    basic: dict[str, Any] = {
        "tokens_a_sample": 128, "target_batch": 2, "vocab": 256, "steps": 3, "disagreement": None,
        "exits": {}, "states": {},
    }  # fmt: skip
    return build(list(logs), **(basic | more))


def test_a_swarm_that_did_nothing_divides_by_nothing() -> None:
    empty = report()
    assert empty["tokens_per_second"] == 0.0
    assert empty["loss"] == {"first": None, "last": None, "uniform": math.log(256)}
    assert empty["rounds"] == {"completed": 0, "partial": 0, "failed": 0, "mean_fraction": None}
    assert empty["microbatches"] == dict.fromkeys(empty["microbatches"], 0)
    assert empty["stages"] == []
    json.dumps(empty, allow_nan=False)


def test_every_key_of_the_contract_is_there() -> None:
    whole = report(log("worker", name="worker-0-0", stage=0), exits={"worker-0-0": 0})
    assert {
        "steps", "seconds", "tokens", "tokens_per_second", "loss", "eval_loss", "microbatches", "rounds",
        "disagreement", "bytes", "stages", "exit",
    } <= whole.keys()  # fmt: skip
    assert set(whole["microbatches"]) == {
        "issued", "completed", "failed", "lost", "rerouted", "busy", "twice", "reused_stale",
        "gone_with_replica",
    }  # fmt: skip
    assert set(whole["bytes"]) == {"boundary", "averaging", "control"}
    assert set(whole["stages"][0]["replicas"][0]) == {"peer_id", "step", "phase", "microbatches"}
    assert whole["exit"] == {"worker-0-0": 0}


def test_issued_ends_as_completed_failed_or_lost() -> None:
    trainer = log(
        "trainer", issued("a", 10.0), issued("b", 11.0), issued("c", 12.0), issued("d", 13.0),
        completed("b", 14.0), failed("c"), completed("a", 15.0), failed("b"),
    )  # fmt: skip
    counts = report(trainer)["microbatches"]
    assert {key: counts[key] for key in ("issued", "completed", "failed", "lost")} == {
        "issued": 4, "completed": 2, "failed": 1, "lost": 1,
    }  # fmt: skip


def test_speed_and_loss_over_several_trainers_in_order_of_time() -> None:
    one = log(
        "trainer",
        issued("a", 100.0),
        completed("a", 101.0, 5.0),
        issued("c", 101.0),
        completed("c", 103.0, 3.0),
    )
    two = log(
        "trainer",
        issued("b", 100.5),
        completed("b", 102.0, 4.0),
        issued("d", 102.0),
        completed("d", 104.0, 2.0),
    )
    whole = report(one, two)
    assert (whole["seconds"], whole["tokens"], whole["tokens_per_second"]) == (4.0, 512, 128.0)
    assert (whole["loss"]["first"], whole["loss"]["last"]) == (4.5, 2.5)


def test_what_a_restarted_trainer_hears_again_counts_once() -> None:
    trainer = log(
        "trainer", issued("a", 1.0), completed("a", 2.0, 5.0), issued("a", 3.0), completed("a", 4.0, 5.0),
        issued("b", 4.0), completed("b", 5.0, 3.0),
    )  # fmt: skip
    whole = report(trainer)
    assert (whole["microbatches"]["issued"], whole["microbatches"]["completed"], whole["tokens"]) == (
        2,
        2,
        256,
    )
    assert whole["loss"]["last"] == 4.0


def test_twice_is_what_a_stage_added_beyond_the_first() -> None:
    logs = [
        log("worker", added("a"), added("b"), stage=0),
        log("worker", added("a"), added("a"), stage=0),
        log("worker", added("a", 1), added("b", 1), stage=1),
    ]
    assert report(*logs)["microbatches"]["twice"] == 2


def test_gone_is_what_a_killed_process_had_not_used_yet() -> None:
    killed = [STARTED, added("a"), step(1, 1), added("b"), step(2, 0), added("c")]
    ended = [STARTED, added("d"), STOPPED]
    spoiled = [STARTED, added("e"), {"event": "bad_gradient", "stage": 0, "step": 3, "samples": 1}]
    whole = report(log("worker", *killed, *ended, *spoiled, stage=0))
    assert whole["microbatches"]["gone_with_replica"] == 2
    assert whole["stages"][0]["replicas"][0]["microbatches"] == 5


def test_gone_too_is_what_a_replica_had_when_it_gave_its_state_up() -> None:
    syncing = {"event": "phase", "from": "active", "to": "syncing", "why": "9 steps behind the clock"}
    back = {**syncing, "from": "syncing", "to": "warming"}
    thawed = [STARTED, added("a"), step(1, 1), added("b"), added("c"), syncing, back, added("d"), step(9, 1)]
    counts = [report(log("worker", *thawed, *end, stage=0))["microbatches"] for end in ([], [STOPPED])]
    assert [each["gone_with_replica"] for each in counts] == [2, 2]


def test_a_round_is_worth_what_its_poorest_member_got() -> None:
    logs = [
        log("worker", finished(1, 1.0), finished(2, 1.0), abandoned(3), abandoned(4), stage=0),
        log("worker", finished(1, 1.0), finished(2, 0.5), finished(3, 1.0), abandoned(4), stage=0),
        log("worker", finished(1, 1.0, 1), abandoned(4, 1), stage=1),
    ]
    assert report(*logs)["rounds"] == {
        "completed": 3, "partial": 1, "failed": 2, "mean_fraction": pytest.approx(3.5 / 4),
    }  # fmt: skip


def test_traffic_is_the_last_word_of_each_process() -> None:
    def traffic(boundary: int) -> Entry:
        return {
            "event": "traffic", "boundary": boundary, "averaging": 1, "control": 2, "forward_hops": 3,
            "backward_hops": 4,
        }  # fmt: skip

    logs = [
        log("worker", STARTED, traffic(5), traffic(10), STARTED, traffic(100), stage=0),
        log("seed", STARTED),
        log("trainer", STARTED, traffic(1000)),
    ]
    whole = report(*logs)
    assert whole["bytes"] == {"boundary": 1110, "averaging": 3, "control": 6}
    assert whole["hops"] == {"forward_hops": 9, "backward_hops": 12}


def test_stages_show_the_last_state_and_who_is_gone() -> None:
    logs = [
        log("worker", step(7, 2), name="worker-1-0", stage=1),
        log("worker", step(5, 2), name="worker-0-0", stage=0),
        log("worker", name="worker-0-1", stage=0),
    ]
    states = {"worker-1-0": {"step": 8, "phase": "active"}}
    whole = report(*logs, states=states)["stages"]
    assert [stage["stage"] for stage in whole] == [0, 1]
    assert [(r["step"], r["phase"]) for r in whole[0]["replicas"]] == [(5, "gone"), (0, "gone")]
    assert [(r["step"], r["phase"]) for r in whole[1]["replicas"]] == [(8, "active")]


def test_evaluations_come_in_order_of_step() -> None:
    def evaluated(number: int, loss: float) -> Entry:
        return {"event": "evaluated", "step": number, "loss": loss, "rows": 8}

    trainer = log("trainer", evaluated(0, 5.5), evaluated(20, 4.0), evaluated(10, 4.5))
    assert report(trainer)["eval_loss"] == [[0, 5.5], [10, 4.5], [20, 4.0]]


def test_reroutes_and_refusals_count_wherever_they_happened() -> None:
    rerouted, busy = {"event": "rerouted"}, {"event": "busy"}
    logs = [
        log("trainer", rerouted, busy),
        log("worker", rerouted, busy, busy, {"event": "reused_stale"}, stage=0),
    ]
    counts = report(*logs)["microbatches"]
    assert (counts["rerouted"], counts["busy"], counts["reused_stale"]) == (2, 3, 1)


def test_logs_are_read_as_the_bus_writes_them_a_cut_line_aside(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    bus = Bus(path)
    bus.emit(Started(name="n", role="trainer", run="r", peer_id="p", version="1"))
    bus.emit(MicrobatchIssued(ticket="train:0:0"))
    bus.close()
    path.rename(path.with_name("events.jsonl.1"))
    bus = Bus(path)
    bus.emit(MicrobatchCompleted(ticket="train:0:0", path=["a"], loss=2.0))
    bus.emit(MicrobatchAdded(ticket="train:0:0", stage=0, replica="a", step=0))
    bus.close()
    with path.open("ab") as file:
        file.write(b'17\n[]\n"x"\n{}\n\xff\n{"event": "microbatch_comp')
    read = NodeLog.read("n", "trainer", None, "p", path)
    assert [event["event"] for event in read.events] == [
        "started", "microbatch_issued", "microbatch_completed", "microbatch_added",
    ]  # fmt: skip
    counts = report(read)["microbatches"]
    assert (counts["issued"], counts["completed"], counts["lost"]) == (1, 1, 0)


def test_a_node_without_a_log_has_no_events(tmp_path: Path) -> None:
    assert NodeLog.read("n", "seed", None, "p", tmp_path / "none.jsonl").events == []
