"""doctor at a running run: faults that only show over the network, through the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli_w

from agorad import run
from agorad.cli.targets import Target
from agorad.doctor.diagnose import diagnose
from agorad.doctor.patient import examine
from agorad.join import reach
from agorad.join.findings import Finding
from p2p.identity import Identity
from tests.system import small_runs


def doctor(config: Path, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", "doctor", "--json", "--config", str(config), *more],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    (node,) = json.loads(done.stdout)["nodes"]
    return done.returncode, {finding["name"]: finding for finding in node["findings"]}


def worker(folder: Path, **node: Any) -> Path:
    """Settings of a node that is not started."""
    place = folder / "worker"
    place.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "role": "worker", "run": "../run.toml", "state": ".", "device": "cpu",
        "listen": [f"/ip4/127.0.0.1/tcp/{small_runs.free_ports(1)}"],
    }  # fmt: skip
    (place / "agorad.toml").write_text(tomli_w.dumps({"node": {**settings, **node}}))
    return place / "agorad.toml"


def look(config: Path) -> dict[str, Finding]:
    target = Target("worker", config.parent / "control.sock", config)
    return {finding.name: finding for finding in diagnose(examine(target))}


def signed_again(folder: Path, name: str, change: Callable[[run.Manifest], run.Manifest]) -> None:
    """Another manifest beside the real one, by the same operator."""
    operator = Identity.load(folder / "operator.key")
    changed = change(run.load(folder / "run.toml"))
    run.save(attrs.evolve(changed, content=b"", signature=None).signed(operator), folder / name)


@pytest.mark.timeout(240)
def test_faults_that_show_over_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = small_runs.make(tmp_path / "run")
    manifest = run.load(folder / "run.toml")
    with small_runs.started(folder, "authority"):
        # A running node, by the command: it is reached from outside, its seed is dead.
        code, found = doctor(folder / "authority" / "agorad.toml")
        assert code == 0
        assert found["daemon"]["verdict"] == "ok"
        seed = f"seed …{manifest.seeds[0].peer_id[-6:]}"
        assert found[seed]["verdict"] == "warn"
        assert "refused" in found[seed]["found"]

        # A healthy node that does not run: its port is dialled back, its line is measured.
        config = worker(folder)
        code, found = doctor(config)
        assert code == 5
        assert [name for name, one in found.items() if one["verdict"] == "fail"] == ["daemon"]
        assert found["from outside"]["verdict"] == "ok"
        assert "Mbit/s" in found["line"]["found"]
        assert found["clock"]["verdict"] == "ok"
        code, found = doctor(config, "--offline")
        assert not {"from outside", "clock", seed} & set(found)

        # The port is closed: what is announced leads nowhere.
        seen = look(worker(folder, announce=["/ip4/127.0.0.1/tcp/1"]))["from outside"]
        assert seen.verdict == "fail"
        assert "cannot reach this node" in seen.found
        assert "firewall" in seen.remedy

        # Another manifest, whose rules nobody could keep; and the trainer's place is another node's.
        def harder(manifest: run.Manifest) -> run.Manifest:
            rules = attrs.evolve(manifest.admission, min_mbps=1e6, max_rtt_ms=1e-6)
            impostor = attrs.evolve(manifest.trainers[0], addrs=manifest.authorities[0].addrs)
            return attrs.evolve(manifest, admission=rules, trainers=(impostor,))

        signed_again(folder, "harder.toml", harder)
        before = reach.time.time
        monkeypatch.setattr(reach.time, "time", lambda: before() + 4000.0)
        found_here = look(worker(folder, run="../harder.toml"))
        monkeypatch.undo()
        trainer = f"trainer …{manifest.trainers[0].peer_id[-6:]}"
        for name, words in (
            ("clock", "ahead of"), ("distance", "max_rtt_ms"), ("line", "min_mbps"),
            (trainer, "was dialled but"), ("newest manifest", "another manifest"),
        ):  # fmt: skip
            assert found_here[name].verdict == "fail", (name, found_here[name])
            assert words in found_here[name].found
            assert found_here[name].remedy

        # A manifest of another run whose nodes are these.
        signed_again(
            folder, "other.toml", lambda m: attrs.evolve(m, run=attrs.evolve(m.run, id="another-run"))
        )
        other = look(worker(folder, run="../other.toml"))
        assert other["run"].verdict == "fail"
    # Nobody is there any more.
    gone = look(worker(folder))
    authority = f"authority …{manifest.authorities[0].peer_id[-6:]}"
    assert gone[authority].verdict == "fail"
