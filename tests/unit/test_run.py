"""Run manifests: what is written is what is signed; errors name the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from agorad import run
from agorad.run import Manifest, NodeRef, RunInfo
from agorad.settings import unstructure
from p2p.errors import LocalError
from p2p.identity import Identity
from stage.config import ModelConfig, TrainingConfig, split_layers

OPERATOR = Identity.generate(b"o" * 32)
SEED = Identity.generate(b"e" * 32)
TRAINER = Identity.generate(b"t" * 32)
AUTHORITY = Identity.generate(b"a" * 32)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "run": RunInfo(name="Test", id="test-1", operator=OPERATOR.peer_id, created=1.5),
        "seeds": (NodeRef(peer_id=SEED.peer_id, addrs=("/ip4/127.0.0.1/tcp/4001",)),),
        "trainers": (NodeRef(peer_id=TRAINER.peer_id),),
        "authorities": (NodeRef(peer_id=AUTHORITY.peer_id),),
        "model": ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1)),
        "training": TrainingConfig(seed=7),
    }
    return Manifest(**{**fields, **changes})


def table() -> dict[str, Any]:
    tables: dict[str, Any] = unstructure(manifest())
    return tables


def test_written_and_read_it_is_the_same_run(tmp_path: Path) -> None:
    signed = manifest().signed(OPERATOR)
    run.save(signed, tmp_path / "run.toml")
    again = run.load(tmp_path / "run.toml")
    assert again == signed
    assert again.hash == signed.hash
    assert again.training.lr == signed.training.lr


def test_trust_lists_who_stands() -> None:
    trust = manifest().trust()
    assert trust.run == "test-1"
    assert trust.authorities == {AUTHORITY.peer_id}
    assert trust.standing == {
        SEED.peer_id: "seed",
        TRAINER.peer_id: "trainer",
        AUTHORITY.peer_id: "authority",
    }
    assert trust.manifest_hash == manifest().hash


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("lr = 0.003", "lr = 0.0031"),
        ("seed = 7", "seed = 8"),
        ("/tcp/4001", "/tcp/4002"),
        ('name = "Test"', 'name = "Best"'),
        ('ed25519 = "', 'ed25519 = "00'),
    ],
)
def test_any_change_after_signing_is_noticed(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "run.toml"
    run.save(manifest().signed(OPERATOR), path)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(LocalError, match="altered after"):
        run.load(path)


def test_layout_and_comments_are_not_signed(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    run.save(manifest().signed(OPERATOR), path)
    path.write_text("# a comment\n\n" + path.read_text().replace("lr = 0.003", "lr  =  3e-3"))
    assert run.load(path).hash == manifest().hash


def test_signing_needs_the_operators_key(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="operator is"):
        manifest().signed(SEED)
    run.save(manifest(), tmp_path / "run.toml")
    with pytest.raises(LocalError, match="not signed"):
        run.load(tmp_path / "run.toml")
    assert run.load(tmp_path / "run.toml", signed=False) == manifest()


def test_a_resigned_manifest_is_another_run() -> None:
    hijacked = manifest(run=attrs.evolve(manifest().run, operator=SEED.peer_id)).signed(SEED)
    assert hijacked.hash != manifest().hash


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("model", {"k": 65}, "model.k = 65 must not exceed model.d = 64"),
        ("model", {"heads": 5}, r"5 × 16 = 80 must equal model.d = 64"),
        ("model", {"kv_heads": 3}, "model.kv_heads = 3 must divide model.heads = 4"),
        ("model", {"d": -64}, "model.d = -64 must be between"),
        ("model", {"layers": []}, "names 0 stages"),
        ("model", {"layers": [1, 0]}, "at least one layer"),
        ("model", {"dd": 1}, "unknown setting 'model.dd'; did you mean"),
        ("model", {"d": "64"}, r"model.d must be a whole number, not a text \('64'\)"),
        ("model", {"d": True}, "model.d must be a whole number, not true or false"),
        ("model", {"vocab": 100}, "at least 256"),
        ("training", {"lr": float("nan")}, "training.lr = nan"),
        ("training", {"warm_up_steps": 4}, "did you mean 'warm"),
        ("training", {"merge": "sum"}, "training.merge = 'sum' is none of 'delta', 'ema', 'overwrite'"),
        (
            "training",
            {"averaging": "powersgb"},
            "training.averaging = 'powersgb' is none of 'sparta', 'powersgd'",
        ),
        ("training", {"powersgd_rank": 0}, "training.powersgd_rank = 0 must be between"),
        ("training", {"warmup_steps": 2000}, "must not exceed"),
        ("run", {"id": "Not/A Key"}, "run.id"),
        ("run", {"format": 2}, "reads format 1"),
        ("run", {"operator": "12D3Koo"}, "peer id"),
        ("admission", {"accounts": "facebook"}, "admission.accounts"),
        ("admission", {"max_nodes": 0}, "admission.max_nodes"),
        ("admission", {"min_vram_gib": -1.0}, "admission.min_vram_gib"),
        ("admission", {"max_rtt_ms": float("nan")}, "admission.max_rtt_ms"),
        ("admission", {"min_version": "new"}, "admission.min_version"),
    ],
)
def test_what_is_wrong_is_one_sentence(section: str, change: dict[str, Any], sentence: str) -> None:
    tables = table()
    tables.setdefault(section, {}).update(change)
    with pytest.raises(LocalError, match=sentence) as error:
        run.from_table(tables)
    assert "\n" not in str(error.value)


def test_missing_settings_and_sections_are_named() -> None:
    tables = table()
    del tables["model"]["d"]
    with pytest.raises(LocalError, match=r"the setting 'model\.d' is missing"):
        run.from_table(tables)
    del tables["model"]
    with pytest.raises(LocalError, match="the setting 'model' is missing"):
        run.from_table(tables)


@pytest.mark.parametrize("content", [b"[run\n", b"\xff\xfe", b"x = " + b"[" * 10_000])
def test_damaged_files_name_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(LocalError, match=r"run\.toml is not valid TOML"):
        run.load(path)


def test_a_node_with_a_bad_address_is_refused() -> None:
    with pytest.raises(LocalError, match="address of"):
        NodeRef(peer_id=SEED.peer_id, addrs=("localhost:1",))


@pytest.mark.parametrize("stages", range(1, 7))
def test_layers_are_split_evenly(stages: int) -> None:
    layers = split_layers(6, stages)
    assert len(layers) == stages
    assert sum(layers) == 6
    assert max(layers) - min(layers) <= 1


def test_more_stages_than_layers() -> None:
    with pytest.raises(LocalError, match="6 layers cannot be cut in 7 stages"):
        split_layers(6, 7)
