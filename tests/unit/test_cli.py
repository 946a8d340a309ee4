"""agoractl: exit codes, sentences, JSON that is alone on stdout, and what a command imports."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from agorad.cli import targets
from agorad.cli.demo import summary
from agorad.cli.last_seen import LastSeen
from agorad.cli.status_screen import screen, table
from agorad.demo.layout import Plan, prepare
from agorad.demo.swarm import Running, Swarm
from agorad.demo.view import View
from agorad.words import duration
from p2p.identity import Identity


def agoractl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = "from agorad.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", call, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_run_is_made_shown_edited_and_signed_again(tmp_path: Path) -> None:
    made = agoractl(
        "run", "init", "My Run!", "--dir", "r", "--set", "training.target_batch=24", "--json", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["manifest"]["training"]["target_batch"] == 24
    assert document["manifest"]["run"]["id"].startswith("my-run-")
    run = tmp_path / "r" / "run.toml"
    assert run.exists()
    assert (tmp_path / "r" / "operator.key").stat().st_mode & 0o777 == 0o600
    checked = subprocess.run(
        [sys.executable, "-m", "agorad.main", "--config", "r/seed/agorad.toml", "--check-config"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr

    run.write_text(run.read_text().replace("target_batch = 24", "target_batch = 25"))
    shown = agoractl("run", "show", "r/run.toml", cwd=tmp_path)
    assert shown.returncode == 2
    assert "was altered after" in shown.stderr
    signed = agoractl("run", "sign", "r/run.toml", "--key", "r/operator.key", "--json", cwd=tmp_path)
    assert json.loads(signed.stdout)["manifest"]["run"]["version"] == 2
    shown = agoractl("run", "show", "r/run.toml", cwd=tmp_path)
    assert shown.returncode == 0
    assert "target_batch 25" in shown.stdout

    account = agoractl("run", "account", "alice", "--dir", "r", cwd=tmp_path)
    assert len(account.stdout.strip()) == 32
    again = agoractl("run", "account", "alice", "--dir", "r", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    over = agoractl("run", "init", "x", "--dir", "r", cwd=tmp_path)
    assert (over.returncode, over.stdout) == (2, "")
    assert "is not empty" in over.stderr


def test_identity_is_made_only_when_asked(tmp_path: Path) -> None:
    assert agoractl("identity", "k", cwd=tmp_path).returncode == 2
    assert not (tmp_path / "k").exists()
    made = agoractl("identity", "k", "--create", "--json", cwd=tmp_path)
    assert json.loads(made.stdout) == {
        "peer_id": Identity.load(tmp_path / "k").peer_id,
        "path": "k",
        "created": True,
    }
    (tmp_path / "k").write_bytes(b"junk")
    broken = agoractl("identity", "k", cwd=tmp_path)
    assert broken.returncode == 2
    assert broken.stderr.startswith("agoractl: the key file k is damaged")
    assert broken.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("status", "--socket", "none.sock"), 3, "there is no socket at none.sock"),
        (("status", "--dir", "."), 2, "not the folder of a running demo"),
        (("status", "--config", "none.toml"), 2, "cannot read the configuration"),
        (("status", "--dir", ".", "--socket", "x"), 2, "one of --dir, --config and --socket"),
        (("staus",), 2, "did you mean 'status'"),
        (("status", "--dir", "a", "--dir=b"), 2, "--dir is given 2 times; give it once"),
        (("run", "init", "x", "--port", "1", "--port", "2"), 2, "--port is given 2 times"),
        (("peers", "--socket", "x"), 3, "there is no socket at x; start it again"),
        (("status", "--jsn"), 2, "--jsn"),
        (("run", "show", "none.toml"), 2, "cannot read the run manifest none.toml"),
        (("run", "init", "x", "--set", "model.kv_heads=3"), 2, "must divide"),
        (("run", "init", "x", "--stages", "99"), 2, "cannot be cut"),
        (("run", "init", "x", "--preset", "9b"), 2, "there is no preset '9b'"),
        (("run", "init", "x", "--host", "bad host"), 2, "neither an IP address nor a host name"),
        (("run", "init", "x", "--host", "999.1.1.1"), 2, "neither an IP address nor a host name"),
    ],
)
def test_errors_are_a_sentence_and_a_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = agoractl(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_swarm_file(tmp_path: Path) -> None:
    (tmp_path / "swarm.json").write_text("{")
    done = agoractl("status", "--dir", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "swarm.json is damaged" in done.stderr


def test_status_is_quick_to_import_and_no_daemon_but_the_worker_needs_torch() -> None:
    light = "import agorad.cli.status, agorad.cli.targets, sys; print([m for m in HEAVY if m in sys.modules])"
    daemon = (
        "import agorad.main, agorad.roles.seed, agorad.roles.authority, agorad.roles.trainer, sys; "
        "print([m for m in HEAVY if m in sys.modules])"
    )
    for code, heavy in (
        (light, ["torch", "trio", "cryptography", "numpy", "rich"]),
        (daemon, ["torch", "numpy", "rich"]),
    ):
        script = f"HEAVY = {heavy}; {code}"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == "[]"


def test_the_table_shows_what_there_is_not_as_a_dash() -> None:
    node = {
        "name": "worker-0-0", "role": "worker", "run": "r", "phase": "active", "stage": 0, "step": 3,
        "loss": None, "microbatches": {"added": 7, "per_minute": 41.4}, "peers": 4, "uptime_s": 3725.0,
        "warnings": ["hot"],
        "round": {"number": 2, "fraction": 1.0, "members": 2, "at": 0.0},
        "points": {"compute": 1.0, "presence": 0.25},
    }  # fmt: skip
    seed = {
        **node, "name": "seed", "role": "seed", "stage": None, "microbatches": {}, "round": None,
        "points": None, "warnings": [],
    }  # fmt: skip
    first, _blank, _head, worker_row, seed_row, _blank, warning = screen([node, seed])
    assert first == "2 nodes of r: 2 active"
    assert worker_row.split() == [
        "worker-0-0",
        "worker",
        "active",
        "0",
        "3",
        "-",
        "7",
        "41",
        "2:",
        "100%",
        "of",
        "2",
        "1.25",
        "4",
        "1h02m",
    ]
    assert " ".join(seed_row.split()) == "seed seed active - - - - - - - 4 1h02m"
    assert warning == "! worker-0-0: hot"
    assert screen([seed], 80, down=2)[0] == "3 nodes of r: 1 active, 2 not answering"
    long = screen([node, {**seed, "warnings": ["what is wrong, and " * 9 + "the remedy"]}], 60)
    assert max(map(len, long[-3:])) <= 60
    assert long[-1].startswith("    ")
    assert long[-1].endswith("the remedy")
    wide, narrow = table([node, seed]), table([node, seed], 60)
    assert max(map(len, narrow)) <= 60 < max(map(len, wide))
    assert narrow[2].split()[:3] == ["node", "phase", "stage"]
    assert [duration(value) for value in (0, 59.9, 60, 3600)] == ["0s", "59s", "1m00s", "1h00m"]


def test_a_demo_shows_itself_in_eighty_columns(tmp_path: Path) -> None:
    plan = Plan(stages=3, workers=2, trainers=1, steps=9, seconds=None, data=None, assignments=())
    folder = tmp_path / "swarm"
    folder.mkdir()
    swarm = Swarm(prepare(plan, folder))
    last = {"number": 1234, "fraction": 1.0, "members": 16, "at": 0.0}
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for step, node in enumerate(swarm.layout.nodes, 12345):
        node.reserved.close()
        status = {"phase": "warming", "step": step, "loss": 5.5451, "round": last, "peers": 128}
        swarm.nodes.append(Running(node, process, {**status, "microbatches": {"added": 1234567}}, True))
    swarm.nodes[-1].answers = False
    out = io.StringIO()
    Console(file=out, width=80).print(View(swarm, "/9").frame())
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert len(lines) == 2 + len(swarm.nodes)
    assert lines[0].startswith("0 s  step 12353/9")
    assert "1234: 100% of 16" in lines[4]
    assert lines[-1].split()[:3] == ["trainer-0", "-", "ended"]


def test_the_summary_of_a_demo_fits_a_terminal() -> None:
    work = dict.fromkeys(("failed", "lost", "rerouted", "twice", "reused_stale", "gone_with_replica"), 12)
    document = {
        "steps": 60, "seconds": 99.0, "tokens": 368640, "tokens_per_second": 3558.5,
        "loss": {"first": 5.5, "last": 2.4, "uniform": 5.545}, "eval_loss": [[0, 5.4], [30, 3.0], [60, 2.5]],
        "microbatches": {"issued": 2880, "completed": 2880, **work},
        "rounds": {"completed": 90, "partial": 0, "failed": 0, "mean_fraction": 1.0}, "disagreement": 0.0165,
    }  # fmt: skip
    lines = summary(document).splitlines()
    assert max(map(len, lines)) <= 80
    assert "evaluation loss: 5.400 at step 0 -> 2.500 at step 60" in lines
    once = summary({**document, "eval_loss": [[0, 5.4]]})
    assert "evaluation loss: 5.400 at step 0\n" in once


def test_status_costs_little(tmp_path: Path) -> None:
    """Processor time with start-up, the best of three: the machine that runs the tests may be busy."""
    costs = []
    for _ in range(3):
        before = os.times()
        agoractl("status", "--socket", "none.sock", cwd=tmp_path)
        after = os.times()
        costs.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(costs) < 0.45  # about 0.2 on an idle core


def test_how_a_node_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = Path("/home/a/.local/state/agora/run/gpu0/agorad.toml")
    monkeypatch.setattr(targets, "configs", lambda: [joined])
    assert targets.how_to_start(Path("/var/lib/agora/0/agorad.toml")).endswith("systemctl start agorad@0")
    assert targets.how_to_start(Path("/etc/agora/agorad.toml")).endswith("systemctl start agorad")
    assert targets.how_to_start(joined).endswith("agoractl join")
    assert targets.how_to_start(Path("x.toml")).endswith("agorad --config x.toml")
    seen = LastSeen(at=1.0, code=12, why="closed")
    assert "forward the port" in seen.remedy("start it")
