"""agoractl against a real swarm: what it shows, and holding, restarting and waiting for nodes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.system import small_runs
from tests.system.swarms import Demo, demo


def agoractl(*arguments: str, code: int = 0, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_swarm_in_the_hands_of_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with demo(folder, "--stages", "1", "--workers", "2", "--steps", "1000000") as running:
        running.swarm()
        where = ("--dir", str(folder))
        agoractl("wait", *where, "--for", "active", "--timeout", "60s")
        _look(running, where)
        _hold(running, where)
        _restart(running, where)
        running.process.send_signal(signal.SIGINT)
        running.process.communicate(timeout=60)
        _down(running)


SCHEMAS = json.loads((Path(__file__).parents[2] / "docs" / "cli-schemas.json").read_text())["$defs"]


def _json(*arguments: str, code: int = 0) -> Any:
    """What it prints, which is what the documents say."""
    document = json.loads(agoractl(*arguments, "--json", code=code).stdout)
    fits(document, arguments[0])
    return document


def fits(document: Any, name: str) -> None:
    jsonschema.Draft202012Validator(_strict(SCHEMAS[name])).validate(document)


def _strict(schema: Any) -> Any:
    """Nothing is printed that is not documented."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        inner.setdefault("additionalProperties", False)
    return inner


def _look(running: Demo, where: tuple[str, str]) -> None:
    agoractl("wait", *where, "--for", "step=1", "--for", "microbatches=1", "--any", "--timeout", "60s")
    nodes = {node["name"]: node for node in _json("status", *where)["nodes"]}
    assert set(nodes) == {"seed", "authority", "worker-0-0", "worker-0-1", "trainer-0"}
    one = agoractl("status", *where, "--node", "worker-0-1").stdout
    assert one.startswith("worker-0-1 is active in stage 0, step ")
    assert nodes["worker-0-1"]["peer_id"] in one
    wrong = agoractl("status", *where, "--node", "nobody", code=2)
    assert "worker-0-0" in wrong.stderr

    (entry,) = _json("peers", *where, "--node", "worker-0-0")["nodes"]
    roles = {row["peer_id"]: row["role"] for row in entry["peers"]}
    assert roles[nodes["authority"]["peer_id"]] == "authority"
    assert roles[nodes["worker-0-1"]["peer_id"]] == "worker"
    assert all(row["bytes_in"] > 0 and row["bytes_out"] > 0 for row in entry["peers"])
    swarm = _json("swarm", *where, "--node", "worker-0-0")
    (stage,) = swarm["stages"]
    own = {replica["peer_id"]: replica["own"] for replica in stage["replicas"]}
    assert own == {nodes["worker-0-0"]["peer_id"]: True, nodes["worker-0-1"]["peer_id"]: False}
    assert {row["role"] for row in swarm["listed"]} == {"seed", "authority", "trainer"}
    pong = _json("ping", nodes["worker-0-1"]["peer_id"][-8:], *where, "--node", "seed", "--count", "3")
    assert pong["peer_id"] == nodes["worker-0-1"]["peer_id"]
    assert len(pong["ms"]) == 3
    assert _json("generate", "def ", *where, "--max-tokens", "2")["run"] == swarm["run"]
    assert "pong from" in agoractl("ping", "authority", *where, "--node", "worker-0-0").stdout
    nobody = agoractl("ping", "0OIl", *where, "--node", "seed", code=1)
    assert "agoractl peers" in nobody.stderr
    said = agoractl("logs", *where, "--node", "worker-0-0", "-n", "1000", "--json").stdout.splitlines()
    assert "ready" in [json.loads(line)["event"] for line in said if line.startswith("{")]


def _hold(running: Demo, where: tuple[str, str]) -> None:
    only = (*where, "--node", "worker-0-0")
    refused = agoractl("pause", *where, "--node", "seed", code=1)
    assert "only workers and trainers" in refused.stderr
    agoractl("pause", *only, "--for", "1h")
    agoractl("wait", *only, "--for", "paused", "--timeout", "30s")
    (status,) = _json("status", *only)["nodes"]
    assert status["paused"] == "asked to"
    assert 0 < status["paused_until"] - time.time() <= 3600
    running.wait_for(
        lambda: _json("status", *only)["nodes"][0]["microbatches"]["in_progress"] == 0, 30, "an idle node"
    )
    before = _json("status", *only)["nodes"][0]
    other = _json("status", *where, "--node", "worker-0-1")["nodes"][0]["microbatches"]["added"]
    agoractl(
        "wait", *where, "--node", "worker-0-1", "--for", f"microbatches={other + 10}", "--timeout", "60s"
    )
    after = _json("status", *only)["nodes"][0]
    assert after["microbatches"]["added"] == before["microbatches"]["added"]
    assert after["round"] == before["round"]
    assert running.count("trainer-0", "microbatch_failed") == 0
    agoractl("resume", *only)
    agoractl("wait", *only, "--for", "active", "--timeout", "90s")
    kinds = [event["event"] for event in running.events("worker-0-0")]
    assert kinds.count("held") == kinds.count("let_go") == 1


def _restart(running: Demo, where: tuple[str, str]) -> None:
    only = (*where, "--node", "worker-0-1")
    (before,) = _json("status", *only)["nodes"]
    agoractl("restart", *only)
    (after,) = _json("status", *only)["nodes"]
    assert (after["pid"], after["peer_id"]) == (before["pid"], before["peer_id"])
    assert after["uptime_s"] < before["uptime_s"]
    assert after["addrs"] != []
    events = running.events("worker-0-1")
    assert [event["event"] for event in events].count("started") == 2
    assert [event["why"] for event in events if event["event"] == "stopped"] == ["restarting"]
    assert any(event["event"] == "resumed" for event in events)
    late = agoractl("wait", *only, "--for", "step=100000000", "--timeout", "0.5s", code=4)
    assert "worker-0-1" in late.stderr


def _down(running: Demo) -> None:
    """Status of nodes that have ended says what they did last."""
    config = running.node("worker-0-1")["config"]
    document = _json("status", "--config", config, code=3)
    assert document["nodes"] == []
    (entry,) = document["down"]
    assert entry["last"]["code"] == 0
    assert entry["last"]["phase"] is not None
    told = agoractl("status", "--config", config, code=3)
    assert told.stdout == ""
    assert "worker-0-1 does not run: it ended cleanly" in told.stderr
    assert f"start it again: agorad --config {config}" not in told.stderr
    assert f"start it: agorad --config {config}" in told.stderr


def test_a_seed_and_an_authority_without_a_swarm(tmp_path: Path) -> None:
    folder = small_runs.make(tmp_path / "run")
    with small_runs.started(folder, "authority", "seed"):
        where = ("--config", str(folder / "seed" / "agorad.toml"))
        agoractl("wait", *where, "--for", "active", "--for", "peers=1", "--timeout", "30s")
        (status,) = _json("status", *where)["nodes"]
        (entry,) = _json("peers", *where)["nodes"]
        assert [row["role"] for row in entry["peers"]] == ["authority"]
        assert _json("ping", "authority", *where, "--count", "2")["role"] == "authority"
        assert [stage["replicas"] for stage in _json("swarm", *where)["stages"]] == [[], []]
        assert _json("points", *where)["rows"] == []
        _json("doctor", *where, "--no-measure")
        for line in agoractl("events", *where, "--json").stdout.splitlines():
            fits(json.loads(line), "events")
        _json("config", *where)
        stacks = json.loads(agoractl("debug", "stacks", *where, "--json").stdout)
        fits(stacks, "debug stacks")
        assert any("p2p/transport.py" in " ".join(task["frames"]) for task in stacks["tasks"])
        _watch(where)
        _reload(folder / "seed" / "agorad.toml", where)
        agoractl("pause", *where, code=1)
        agoractl("restart", *where, timeout=60)
        (after,) = _json("status", *where)["nodes"]
        assert (after["pid"], after["peer_id"]) == (status["pid"], status["peer_id"])
        agoractl("leave", *where)
        agoractl("wait", *where, "--for", "gone", "--timeout", "30s")
        _json("status", *where, code=3)
        told = agoractl("status", *where, code=3)
        assert "seed does not run: it ended cleanly" in told.stderr


def _reload(config: Path, where: tuple[str, ...]) -> None:
    agoractl("reload", *where)
    before = config.read_text()
    config.write_text(before + "\n[limits]\nupload_mbps = 0.5\n")
    assert "limits.upload_mbps = 0.5 must be" in agoractl("reload", *where, code=2).stderr
    config.write_text(before.replace("[node]", "[node]\nthreads = 2"))
    assert "node.threads changes only with a restart" in agoractl("reload", *where, code=1).stderr
    config.write_text(before)


def _watch(where: tuple[str, ...]) -> None:
    """On a terminal of its own, which it leaves as it was."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
        os.execv(sys.executable, [sys.executable, "-m", "agorad.cli", "status", "--watch", *where])
    shown, until, asked = b"", time.monotonic() + 30, False
    while time.monotonic() < until and select.select([terminal], [], [], 20)[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # its other end is closed
            break
        if not asked and shown.count(b"seed is") >= 2:
            asked = True
            os.kill(child, signal.SIGINT)
    if not asked:
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    os.close(terminal)
    assert shown.endswith(b"\x1b[?25h\x1b[?1049l")  # the cursor is back, and what was there before


@pytest.mark.long
def test_other_documents_fit_their_schemas(tmp_path: Path) -> None:
    folder = small_runs.make(tmp_path / "run")
    where = ("--config", str(folder / "seed" / "agorad.toml"))
    _json("bugreport", *where, "--offline", "--output", str(tmp_path / "report.tar.gz"))
    _json("identity", str(tmp_path / "new.key"), "--create")
    _json("run", "show", str(folder / "run.toml"))
    account = agoractl("run", "account", "bob", "--dir", str(folder), "--json")
    fits(json.loads(account.stdout), "run account")
    check = agoractl("join", str(folder / "run.toml"), "--check", "--gpu-id", "cpu", "--json")
    fits(json.loads(check.stdout), "join --check")
