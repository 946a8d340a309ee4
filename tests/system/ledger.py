"""The ledger that the event logs of a swarm are: what must be in it whatever happened."""

from __future__ import annotations

from tests.system.swarms import Demo


def check_ledger(swarm: Demo, stages: int) -> None:
    """Every completed microbatch was added at every stage by the replica that the path names."""
    done = {
        event["ticket"]: event["path"]
        for event in swarm.events("trainer-0")
        if event["event"] == "microbatch_completed"
    }
    added: dict[tuple[int, str], set[str]] = {}
    for node in swarm.nodes:
        for event in swarm.events(node["name"]):
            if event["event"] == "microbatch_added":
                added.setdefault((event["stage"], event["ticket"]), set()).add(event["replica"])
    for ticket, path in done.items():
        assert len(path) == stages + 1
        for stage in range(stages):
            assert path[stage + 1] in added.get((stage, ticket), set()), (ticket, stage)
