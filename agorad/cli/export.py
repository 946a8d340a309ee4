"""``agoractl export``: the run's model as one folder, from what this machine and the run's store have.

States come from the nodes of this machine that belong to the run, from the folders of a demo where one is
named, from ``--state``, and from the run's checkpoint store; of each stage the best fitting one is taken.
With ``--live`` they come from the replicas that train, by leave of an authority (``agorad.live``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs
import click

from agorad import run as manifests
from agorad import trainer_data
from agorad.cli import targets
from agorad.join import source
from agorad.run import Manifest
from agorad.usage import NamedPath
from p2p.errors import LocalError

if TYPE_CHECKING:
    from stage.export import Part


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--to", type=NamedPath(), required=True, help="The folder to write.")
@click.option(
    "--state", "states", type=NamedPath(), multiple=True,
    help="A node's state folder; can be repeated. Else those of this machine's nodes.",
)  # fmt: skip
@click.option(
    "--live", is_flag=True,
    help="Fetch the present states from the run's replicas; where an authority of it runs.",
)  # fmt: skip
@click.option("--tokenizer", type=NamedPath(), help="The run's tokenizer.json, where it has one.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True,
    help="Of the weights; bf16 is half the size.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an exported model that is there.")
@targets.target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def export(
    run: str,
    to: Path,
    states: tuple[Path, ...],
    live: bool,
    tokenizer: Path | None,
    dtype: Literal["fp32", "bf16"],
    force: bool,
    where: targets.Where,
    as_json: bool,
) -> None:
    """Merge the stages' weights into a model in Hugging Face's layout.

    RUN is the path or address of the run's manifest, or the folder of a demo. States come from this machine's
    nodes and from the run's checkpoint store, or with --live from the run as it trains. The folder has a
    loader in it, exported.py, that needs torch only.

    Example: agoractl export run.toml --to my-model
    """
    if live and states:
        raise click.UsageError("--live takes no --state: it asks the run's replicas")
    folder = to.resolve()
    demo = Path(run) if Path(run).is_dir() else None
    manifest = source.load(run) if demo is None else manifests.load(demo / "run.toml")
    tokens = trainer_data.tokens(tokenizer, manifest, "--tokenizer")
    content = None if tokenizer is None else tokenizer.read_bytes()

    from stage import export as writing  # torch, for who gets this far

    writing.check_place(folder, force)
    with contextlib.ExitStack() as files:
        if live:
            asked = targets.Where(folder=demo) if demo and where == targets.Where() else where
            found = _live(manifest, asked, folder.parent, files)
        else:
            nodes = _of_machine(manifest) if demo is None else (p for p in demo.iterdir() if p.is_dir())
            named = list(states) or sorted(nodes)
            found = _candidates(manifest, named, strict=bool(states), files=files)
        parts = writing.choose(found, manifest.training.max_stale_steps)
        for stage, part in enumerate(parts):
            click.echo(f"stage {stage}: step {part.step}, from {part.where}", err=True)
        written = writing.write(
            folder, parts, manifest.model, manifest.training.seed, run=manifest.run.id,
            text=writing.Text(tokenizer=content, end=tokens.end), dtype=dtype, force=force,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps({**attrs.asdict(written), "folder": str(folder), "run": manifest.run.id}))
        return
    click.echo(f"{written.parameters} parameters, {written.bytes} bytes in {folder}")
    click.echo(f'try it: agoractl generate "…" --model {folder}', err=True)


def _live(
    manifest: Manifest, where: targets.Where, scratch: Path, files: contextlib.ExitStack
) -> list[list[Part]]:
    """The present state of each stage, from a replica that trains."""
    from agorad import live

    authority = targets.of_role(where, "authority")
    if authority is None:
        raise LocalError(
            "none of these nodes is an authority, and replicas give their state to nobody without its leave; "
            "export where an authority of the run runs"
        )
    scratch.mkdir(parents=True, exist_ok=True)
    with authority.advised():
        parts = live.states(
            manifest, authority, scratch=scratch, files=files, tell=lambda said: click.echo(said, err=True)
        )
    return [[part] for part in parts]


def _of_machine(manifest: Manifest) -> Iterator[Path]:
    """State folders of this machine's nodes of the run."""
    for target in targets.of_machine(broken=targets.unread):
        with contextlib.suppress(LocalError):  # one that cannot be read is no reason to do without the others
            settings = target.settings()
            if manifests.load(settings.node.run).run.id == manifest.run.id:
                yield settings.node.state


def _candidates(
    manifest: Manifest, folders: list[Path], *, strict: bool, files: contextlib.ExitStack
) -> list[list[Part]]:
    """What there is of each stage; ``strict``: every folder has to have something."""
    from agorad.checkpoints import snapshots_of
    from stage.checkpoints import CheckpointStore
    from stage.export import LocalPart, StoredPart
    from stage.parameters import Layout, parameter_specs
    from stage.snapshot import SnapshotStore

    model, settings = manifest.model, manifest.checkpoint
    layouts = [Layout.of(parameter_specs(model, stage)) for stage in range(model.stages)]
    found: list[list[Part]] = [[] for _ in layouts]
    by_print = {layout.fingerprint: stage for stage, layout in enumerate(layouts)}
    for folder in folders:
        fitting = 0
        for file in SnapshotStore(snapshots_of(folder, settings.generation)).all():
            files.enter_context(file)
            stage = by_print.get(file.manifest.fingerprint)
            if stage is not None:
                found[stage].append(LocalPart(file))
                fitting += 1
        if strict and not fitting:
            raise LocalError(
                f"{folder} has no snapshot of a stage of run {manifest.run.id!r}; "
                "name a worker's state folder"
            )
    if settings.store:
        for stage, layout in enumerate(layouts):
            store = CheckpointStore(settings.store, manifest.run.id, stage)
            for entry in store.entries(settings.line):
                signed = store.manifest(
                    entry.step, settings.writers, floats=layout.size, fingerprint=layout.fingerprint
                )
                found[stage].append(StoredPart(store, signed))
    return found
