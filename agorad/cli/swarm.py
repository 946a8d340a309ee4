"""``agoractl swarm``: the run as a node of this machine sees it: stages, replicas, load, step."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options
from agorad.words import align, or_dash

ANSWER_S: Final = 12.0


@click.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def swarm(where: Where, as_json: bool) -> None:
    """The whole run: each stage's replicas with phase, step and free room, and the listed nodes.

    Read from the hash table by the first node of this machine that answers.

    Example: agoractl swarm --json
    """
    trouble: Exception | None = None
    for target in find(where):
        try:
            found = target.ask("swarm", timeout=ANSWER_S)
        except (Unreachable, NoAnswer, CommandFailed) as error:
            trouble = trouble or error
            continue
        click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))
        return
    if trouble is not None:
        raise trouble


def lines(found: dict[str, Any]) -> list[str]:
    """A stage a block, then who is listed; this machine's own node is marked."""
    stages = found["stages"]
    replicas = sum(len(stage["replicas"]) for stage in stages)
    loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
    said = [
        f"{found['name']} ({found['run']}): step {found['step']}{loss}, "
        f"{replicas} replicas in {len(stages)} stages",
        "",
    ]
    rows = []
    for stage in stages:
        for replica in stage["replicas"]:
            apart = replica["disagreement"]
            rows.append(
                (
                    f"{'*' if replica['own'] else ' '} {stage['stage']}",
                    f"…{replica['peer_id'][-6:]}",
                    replica["phase"],
                    str(replica["step"]),
                    str(replica["slots"]),
                    "-" if apart is None else f"{apart:.3f}",
                )
            )
        if not stage["replicas"]:
            rows.append((f"  {stage['stage']}", "-", "nobody", "-", "-", "-"))
    said += align(("  stage", "replica", "phase", "step", "free slots", "apart"), rows)
    listed = [
        (
            entry["role"],
            f"…{entry['peer_id'][-6:]}",
            "connected" if entry["connected"] else "not connected",
            or_dash(entry["samples"]),
        )
        for entry in found["listed"]
    ]
    return [*said, "", *align(("listed", "peer", "here", "samples"), listed)]
