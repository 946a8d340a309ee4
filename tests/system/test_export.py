"""A real swarm's model, in one process: its evaluation loss is the one that the swarm has measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from stage import exported
from stage.data import Source
from stage.model import document_index
from tests.system.swarms import Demo, demo

STEPS = 40
EVAL_ROWS = 8
"""That a trainer evaluates on."""
OLD = 1
"""Steps: what replicas give away may be a fifth of ``max_stale_steps`` behind."""


def agoractl(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_exported_swarm_has_the_loss_that_the_swarm_has_measured(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(300):
        lines = "".join(f"def function_{number}_{i}(x):\n    return x + {i}\n\n" for i in range(number % 5))
        (text / f"{number}.txt").write_text(lines)
    folder, model_folder = tmp_path / "swarm", tmp_path / "model"
    options = (
        "--stages", "3", "--workers", "1", "--steps", str(STEPS), "--data", str(text),
        "--set", "model.seq=64", "--set", "training.target_batch=8", "--set", "model.full_rank_tail=true",
    )  # fmt: skip
    with demo(folder, *options) as swarm:
        swarm.swarm()
        check_that_a_run_that_trains_can_be_exported(swarm, tmp_path / "live")
        report = swarm.finish()
    assert (report["microbatches"]["lost"], report["microbatches"]["failed"]) == (0, 0)
    document = json.loads(agoractl("export", str(folder), "--to", str(model_folder), "--json"))
    assert document["steps"] == [STEPS] * 3
    model = exported.Model.load(model_folder)
    table = tomllib.loads((folder / "run.toml").read_text())
    source = Source(text, table["model"]["seq"], table["training"]["seed"])
    losses, rows = [], source.held_out(EVAL_ROWS)
    assert any(row.starts for row in rows), "of several documents"
    for row in rows:
        ids = torch.frombuffer(bytearray(row.ids), dtype=torch.int32).long()
        documents = document_index(row.starts, len(ids) - 1)
        losses.append(float(model.loss(ids[None], documents[None])))
    step, measured = report["eval_loss"][-1]
    assert step == STEPS
    assert measured < report["eval_loss"][0][1] - 0.5, "it has learned, so that no other weights would do"
    assert sum(losses) / len(losses) == pytest.approx(measured, abs=1e-4)
    words = ("generate", "def ", "--model", str(model_folder), "--max-tokens", "40", "--json")
    made = json.loads(agoractl(*words, "--temperature", "0"))
    assert made["tokens"] > 0
    assert made["steps"] == [STEPS] * 3
    settings = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    check_that_it_ends_when_it_is_interrupted(model_folder)


def check_that_a_run_that_trains_can_be_exported(swarm: Demo, model: Path) -> None:
    """Its live text is that of the weights that its replicas give away; the trainer rests meanwhile.

    They may give away a snapshot that is a step old: then it is tried again some steps later.
    """
    where = ("--dir", str(swarm.folder))

    def rests() -> bool:
        nodes = json.loads(agoractl("status", *where, "--json"))["nodes"]
        working = [n for n in nodes if n["role"] == "worker"]
        trainer = next(n for n in nodes if n["role"] == "trainer")
        steps = {n["step"] for n in (*working, trainer)}
        at_work = [n["microbatches"]["in_progress"] for n in working]
        return len(steps) == 1 and not any((trainer["microbatches"]["in_flight"], *at_work))

    greedy = ("def ", "--max-tokens", "40", "--temperature", "0", "--json")
    for step in (6, 13, 20):
        agoractl("wait", *where, "--node", "trainer-0", "--for", f"step={step}", "--timeout", "120s")
        early = json.loads(agoractl("generate", "def ", *where, "--max-tokens", "3", "--json"))
        assert early["tokens"] == 3 or early["end"] == "document"
        agoractl("pause", *where, "--node", "trainer-0")
        swarm.wait_for(rests, 30, "swarm at rest")
        said = json.loads(agoractl("generate", *greedy, *where))
        to = ("--to", str(model / str(step)))
        written = json.loads(agoractl("export", str(swarm.folder), "--live", *to, "--json"))
        agoractl("resume", *where, "--node", "trainer-0")
        [now] = said["steps"]
        assert all(now - OLD <= step <= now for step in written["steps"])
        if written["steps"] == [now] * 3:
            break
    else:
        raise AssertionError("a snapshot that was a step old three times")
    again = json.loads(agoractl("generate", *greedy, "--model", str(model / str(step))))
    assert (again["text"], again["tokens"], again["end"]) == (said["text"], said["tokens"], said["end"])
    assert len(said["text"]) > 10


def check_that_it_ends_when_it_is_interrupted(model: Path) -> None:
    words = ("generate", "def ", "--model", str(model), "--max-tokens", "1000000")
    with subprocess.Popen(
        [sys.executable, "-m", "agorad.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert begun.startswith(b"def ")
    assert rest.endswith(b"\n")
    assert (process.returncode, errors) == (130, b"")
