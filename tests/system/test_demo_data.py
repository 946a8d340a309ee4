"""Swarms that train on other data than bytes of a text: lines and parquet by a tokenizer, the hub."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.hubs import REPO, Hub, fill, serving
from tests.system.ledger import check_ledger
from tests.system.swarms import demo
from tests.system.test_footprint import MB, peak
from tests.tokens import trained

SMALL = (
    "--stages", "1", "--workers", "1", "--steps", "8",
    "--set", "training.target_batch=8", "--set", "model.seq=64", "--set", "training.lr=0.004",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(240)
def test_lines_and_parquet_by_a_tokenizer(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="replace") for path in sorted(library.glob("*.py"))]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    half = len(texts) // 2
    lines = (json.dumps({"body": text}) + "\n" for text in texts[:half])
    (corpus / "a.jsonl").write_text("".join(lines) + "this is no JSON\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts[half:]}), corpus / "b.parquet", row_group_size=3)
    options = (
        "--data", str(corpus), "--set", "data.tokens=tokenizer", "--set", "trainer.field=body", "--set",
        f"trainer.tokenizer={trained(tmp_path / 'tokenizer.json')}", "--set", "model.vocab=400",
    )  # fmt: skip
    with demo(tmp_path / "swarm", *SMALL, *options) as swarm:
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 20, 120, "work")
        memory = peak(swarm.node("trainer-0")["pid"])
        report = swarm.finish()
        check_ledger(swarm, 1)
    assert memory < 300 * MB, f"{memory / MB:.0f} MB"
    print(f"a trainer with parquet and a tokenizer: {memory / MB:.0f} MB")
    assert report["steps"] == 8
    assert report["microbatches"]["lost"] == report["microbatches"]["failed"] == 0
    assert report["loss"]["last"] < report["loss"]["first"]
    assert [step for step, _loss in report["eval_loss"]][-1] == 8


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is away at first, and one transfer breaks off."""
    hub = Hub()
    fill(hub, tmp_path)
    hub.fail = [503] * 3
    hub.cut = [1000]
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        with demo(tmp_path / "swarm", *SMALL, "--set", f"trainer.dataset={REPO}") as swarm:
            report = swarm.finish()
            check_ledger(swarm, 1)
    assert report["steps"] == 8
    assert report["microbatches"]["lost"] == report["microbatches"]["failed"] == 0
    assert report["loss"]["last"] < report["loss"]["first"]
    assert hub.fail == hub.cut == []
    assert 1 <= len(list((tmp_path / "swarm" / "trainer-0" / "hub").glob("data/*.parquet"))) <= 3
