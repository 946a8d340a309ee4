"""``agoractl run checkpoints`` and ``run rollback``: what the run's store holds, and going back to it.

A roll-back is a newer version of the manifest, like every change of a run: its workers start anew from the
checkpoints that it names once an authority has published it.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import click

from agorad import run as manifests
from agorad.run import Manifest
from agorad.usage import NamedPath
from p2p.errors import LocalError
from p2p.identity import Identity
from stage.checkpoints import CheckpointStore, Entry, Line


@click.command()
@click.argument("path", metavar="RUN", type=NamedPath())
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def checkpoints(path: Path, as_json: bool) -> None:
    """List the checkpoints that the run could begin with, by stage.

    Example: agoractl run checkpoints run.toml
    """
    manifest = manifests.load(path)
    found = _entries(manifest, manifest.checkpoint.line)
    if as_json:
        stages = [
            {"stage": stage, "checkpoints": [attrs.asdict(entry) for entry in entries]}
            for stage, entries in enumerate(found)
        ]
        click.echo(json.dumps({"store": manifest.checkpoint.store, "stages": stages}))
        return
    for stage, entries in enumerate(found):
        steps = ", ".join(str(entry.step) for entry in entries)
        click.echo(f"stage {stage}: {f'steps {steps}' if steps else 'none'}")


@click.command()
@click.argument("path", metavar="RUN", type=NamedPath())
@click.option("--step", type=click.IntRange(min=0), required=True, help="The step to go back to.")
@click.option("--key", type=NamedPath(), required=True, help="The operator's key file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def rollback(path: Path, step: int, key: Path, as_json: bool) -> None:
    """Sign a manifest that takes the run back to its checkpoints of a step, or the last ones before it.

    The clock goes on: weights and optimizer are those of then, data and schedule those of now.

    Example: agoractl run rollback run.toml --step 400 --key operator.key
    """
    manifest = manifests.load(path)
    operator = Identity.load(key)
    before = manifest.checkpoint
    chosen = []
    for stage, entries in enumerate(_entries(manifest, before.line)):
        fitting = [entry.step for entry in entries if entry.step <= step]
        if not fitting:
            raise LocalError(
                f"the store has no checkpoint of stage {stage} of step {step} or before; see which there are "
                f"with `agoractl run checkpoints {path}`"
            )
        chosen.append(fitting[-1])
    table = manifest.table()
    table.pop("signature", None)
    table["run"]["version"] = manifest.run.version + 1
    table["checkpoint"] |= {"generation": before.generation + 1, "back_to": step}
    newer = manifests.from_table(table).signed(operator)
    manifests.save(newer, path)
    if as_json:
        click.echo(json.dumps({"path": str(path), "hash": newer.hash.hex(), "steps": chosen}))
        return
    click.echo(f"version {newer.run.version} of {path} goes back to {_words(chosen)}")
    click.echo(f"put it into force with: agoractl authority publish {path}", err=True)


def _entries(manifest: Manifest, line: Line) -> list[list[Entry]]:
    if not manifest.checkpoint.store:
        raise LocalError("this run has no checkpoint store; name one in run.toml, as checkpoint.store")
    run, url = manifest.run.id, manifest.checkpoint.store
    return [CheckpointStore(url, run, stage).entries(line) for stage in range(manifest.model.stages)]


def _words(steps: list[int]) -> str:
    if len(set(steps)) == 1:
        return f"step {steps[0]}"
    return ", ".join(f"step {step} (stage {stage})" for stage, step in enumerate(steps))
