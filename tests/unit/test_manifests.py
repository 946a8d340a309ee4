"""Newer manifests: what a live run takes up, their form as records, and what a start makes of a kept one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agorad import manifests
from agorad.run import Admission, Manifest, NodeRef, RunInfo
from p2p.errors import LocalError, RemoteError
from p2p.identity import Identity
from p2p.kad.record import VALUE_LIMIT
from p2p.membership import KNOWN_LIMIT, Trust
from stage.config import ModelConfig, TrainingConfig

OPERATOR, SEED, TRAINER, AUTHORITY, OTHER = (Identity.generate(bytes([n]) * 32) for n in range(1, 6))
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1))
RUN = RunInfo(name="Test", id="test-1", operator=OPERATOR.peer_id)


def manifest(version: int = 1, by: Identity = OPERATOR, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "run": attrs.evolve(RUN, version=version, operator=by.peer_id),
        "seeds": (NodeRef(peer_id=SEED.peer_id, addrs=("/ip4/127.0.0.1/tcp/4001",)),),
        "trainers": (NodeRef(peer_id=TRAINER.peer_id),),
        "authorities": (NodeRef(peer_id=AUTHORITY.peer_id),),
        "model": MODEL,
        "training": TrainingConfig(seed=7, average_every=4),
    }
    return Manifest(**{**fields, **changes}).signed(by)


def training(**changes: Any) -> dict[str, Any]:
    return {"training": attrs.evolve(manifest().training, **changes)}


MAY = [
    training(lr=0.5, schedule="cosine", max_norm=0.2, warmup_steps=1, total_steps=9, min_lr_ratio=0.0),
    training(average_every=2, min_step_samples=3, eval_every=0, merge="overwrite", weight_decay=0.0),
    {"admission": Admission(max_nodes=3, min_version="9.0", min_version_from=1e9)},
    {"seeds": (), "authorities": (NodeRef(peer_id=OTHER.peer_id),)},
    {"trainers": (NodeRef(peer_id=TRAINER.peer_id, addrs=("/ip4/127.0.0.1/tcp/9",)),)},
]
MAY_NOT = [
    ({"model": attrs.evolve(MODEL, ffn=64)}, "model.ffn"),
    ({"model": attrs.evolve(MODEL, layers=(1, 1, 1))}, "model.layers"),
    (training(seed=8), "training.seed"),
    (training(target_batch=3), "training.target_batch"),
    (training(slice_fraction=0.5), "training.slice_fraction"),
    (training(wire_dtype="bf16"), "training.wire_dtype"),
    (training(wire_dtype_backward="int8"), "training.wire_dtype_backward"),
    (training(average_every=5), "training.average_every"),
    ({"admission": Admission(accounts="huggingface")}, "admission.accounts"),
    ({"trainers": ()}, "trainers"),
    ({"trainers": (NodeRef(peer_id=TRAINER.peer_id), NodeRef(peer_id=OTHER.peer_id))}, "trainers"),
    ({"authorities": ()}, "authority"),
    ({"run": attrs.evolve(RUN, version=2, id="test-2")}, "run.id"),
]


@pytest.mark.parametrize("changes", MAY)
def test_what_a_live_run_takes_up(changes: dict[str, Any]) -> None:
    manifests.follow(manifest(), manifest(2, **changes))


@pytest.mark.parametrize(("changes", "named"), MAY_NOT)
def test_what_it_does_not_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LocalError, match=named):
        manifests.follow(manifest(), manifest(2, **changes))


def test_every_training_setting_is_decided_about() -> None:
    names = {field.name for field in attrs.fields(TrainingConfig)}
    fixed = {
        "seed", "target_batch", "slice_fraction", "wire_dtype", "wire_dtype_backward", "averaging", "robust",
        "powersgd_rank",
    }  # fmt: skip
    assert names - manifests.LIVE_TRAINING == fixed


def test_another_signer_an_older_version_and_an_altered_text() -> None:
    with pytest.raises(LocalError, match=r"run\.operator"):
        manifests.follow(manifest(), manifest(2, by=OTHER))
    for version in (1, 2):
        with pytest.raises(LocalError, match="not newer"):
            manifests.follow(manifest(2), manifest(version))
    good = manifest(2)
    forged = attrs.evolve(good, training=attrs.evolve(good.training, lr=9.0), content=b"")
    with pytest.raises(LocalError, match="altered"):
        manifests.follow(manifest(), forged)
    stolen = attrs.evolve(manifest(2, by=OTHER), signature=good.signature)
    with pytest.raises(LocalError, match="altered"):
        manifests.follow(manifest(), stolen)


def test_names_of_what_changed() -> None:
    newer = manifest(2, seeds=(), **training(lr=0.5))
    assert manifests.changed(manifest(), newer) == ["seeds", "training.lr"]
    assert manifests.changed(manifest(), manifest(2)) == []


def many(nodes: int) -> Manifest:
    addrs = tuple(f"/dns4/{'a' * 60}.example/tcp/{port}" for port in range(4000, 4016))
    seeds = tuple(
        NodeRef(peer_id=Identity.generate(bytes([n, 1] * 16)).peer_id, addrs=addrs) for n in range(nodes)
    )
    return manifest(2, seeds=seeds)


@pytest.mark.parametrize("nodes", [0, 1, 5, 24])
def test_pages_fit_records_and_come_back(nodes: int) -> None:
    signed = many(nodes)
    values = manifests.pages(signed)
    assert all(len(msgpack.packb(value)) <= VALUE_LIMIT for value in values)
    again = manifests.read(values)
    again.check_signature()
    assert (again, again.hash) == (signed, signed.hash)
    assert {manifests.version_of(value) for value in values} == {2}


def test_a_manifest_that_is_too_large_for_a_live_run() -> None:
    with pytest.raises(LocalError, match="fewer nodes"):
        manifests.pages(many(40))


def test_pages_that_do_not_belong_together() -> None:
    ours, others = manifests.pages(many(5)), manifests.pages(many(6))
    assert len(ours) >= 3
    wrong: list[list[Any]] = [
        ours[:-1],
        [*ours, ours[-1]],
        [ours[1], ours[0], *ours[2:]],
        [others[0], *ours[1:]],
        [{**page, "version": 3} for page in ours],
        [{**page, "hash": bytes(32)} for page in ours],
        [{**ours[0], "part": ours[0]["part"] + b" "}, *ours[1:]],
        [{**ours[0], "part": bytes(manifests.PAGE + 1)}, *ours[1:]],
    ]
    for values in wrong:
        with pytest.raises(RemoteError):
            manifests.read(values)


LEAVES = st.none() | st.integers() | st.binary(max_size=70) | st.text(max_size=5)
FIELDS = st.sampled_from(["version", "pages", "hash", "signature", "part"])


@given(st.recursive(LEAVES, lambda inner: st.dictionaries(FIELDS, inner, max_size=5), max_leaves=10))
def test_anything_is_read_or_refused(value: object) -> None:
    with pytest.raises(RemoteError):
        manifests.read([value])


@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"{}", b"[" * 50000, b'{"run":1}', b'{"a":NaN}']))
def test_content_that_is_no_manifest(content: bytes) -> None:
    with pytest.raises(RemoteError):
        manifests.parse(content, "")


def kept(one: Manifest, signature: str) -> bytes:
    return json.dumps({"content": one.content.decode(), "signature": signature, "known": []}).encode()


def test_the_newest_of_file_and_kept_one_counts(tmp_path: Path) -> None:
    first, second, third = (manifest(version) for version in (1, 2, 3))
    assert manifests.restore(tmp_path, first) == (first, ())
    manifests.keep(tmp_path, second, [first.hash])
    assert manifests.restore(tmp_path, first) == (second, (first.hash,))
    assert manifests.restore(tmp_path, second) == (second, (first.hash,))
    assert manifests.restore(tmp_path, third) == (third, (first.hash, second.hash))


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"x", b"{}", b"[]", b'{"content": 1, "signature": 2, "known": 3}', b"\xff\xfe",
        kept(manifest(2, by=OTHER), ""),
        kept(manifest(2), "00" * 64),
    ],
)  # fmt: skip
def test_a_kept_one_that_is_damaged_or_another_runs_counts_as_none(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / manifests.FILE).write_bytes(damaged)
    assert manifests.restore(tmp_path, manifest()) == (manifest(), ())


def test_trust_goes_over_and_knows_a_bounded_number_of_others() -> None:
    trust = manifest().trust()
    revocations = trust.revocations
    hashes = [trust.manifest_hash]
    for version in range(2, KNOWN_LIMIT + 5):
        newer = manifest(version, seeds=())
        trust.renew(newer.trust(), 0.0, 30.0)
        hashes.append(newer.hash)
    assert trust.manifest_hash == hashes[-1]
    assert trust.known == tuple(hashes[-1 - KNOWN_LIMIT : -1])
    assert trust.knows(hashes[-2])
    assert not trust.knows(hashes[0])
    assert SEED.peer_id not in trust.standing
    assert trust.revocations is revocations


def test_a_trust_made_anew_knows_no_other() -> None:
    trust = Trust(run="r", manifest_hash=b"1" * 32, authorities=frozenset())
    assert trust.knows(b"1" * 32)
    assert not trust.knows(b"2" * 32)
