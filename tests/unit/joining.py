"""What tests of agoractl join share: a home, a manifest, planned nodes, GPUs, and the command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agorad.cli.join import join
from agorad.join import layout, secret
from agorad.run import Admission, Manifest, RunInfo
from p2p.identity import Identity
from stage import presets

CARDS = "0, GPU-aa11, NVIDIA GeForce RTX 4090, 24564, 24000\n1, GPU-bb22, NVIDIA L40S, 46068, 900\n"
OPERATOR = Identity.generate()


def own_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of whoever runs the tests is read or written: ``folder`` is home, and where we are."""
    monkeypatch.setenv("HOME", str(folder))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "CUDA_VISIBLE_DEVICES", *secret.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    # The usual place, but named: of root's on a machine with systemd nothing is the system's then.
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / ".local" / "state"))
    monkeypatch.chdir(folder)
    return folder


def manifest(operator: Identity = OPERATOR, version: int = 1, **admission: object) -> Manifest:
    model, training = presets.preset("demo")
    info = RunInfo(name="a run", id="a-run", operator=operator.peer_id, version=version)
    return Manifest(
        run=info, model=model, training=training, admission=Admission(**admission)  # type: ignore[arg-type]
    ).signed(operator)  # fmt: skip


def planned(
    folder: Path, *, device: str = "cpu", port: int = 0, gpu: int = 0, outside: int = 0
) -> layout.Planned:
    return layout.Planned(
        gpu=gpu, device=device, port=port, announce_port=outside, folder=folder,
        identity=folder / "identity.key", log=folder / "agorad.log",
    )  # fmt: skip


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, extra: str = "") -> None:
    """An nvidia-smi that says so."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{extra}\ncat <<'EOF'\n{said}EOF\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(join, list(arguments))
