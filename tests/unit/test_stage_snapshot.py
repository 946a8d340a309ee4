"""Snapshots on disk and on their way to a newcomer."""

import random
from pathlib import Path

import attrs
import msgpack
import pytest
import torch

from p2p.errors import LocalError, RemoteError
from p2p.identity import Identity
from stage.config import TrainingConfig
from stage.optimizer import Optimizer
from stage.packing import Packer, unpack
from stage.parameters import ParameterSpec
from stage.snapshot import SnapshotStore
from stage.state import CHUNK, SnapshotManifest, open_manifest
from stage.weights import Weights

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

FLOATS = 300_032
"""So that a chunk crosses the end of a vector and the last one is short."""


def make_optimizer(value: float = 1.0) -> Optimizer:
    weights = Weights([ParameterSpec("w", (FLOATS,), True, 1.0)])
    optimizer = Optimizer(weights, TrainingConfig(seed=1))
    weights.writable().copy_(torch.arange(FLOATS) * value)
    optimizer.moments.write("exp_avg", 0, torch.full((FLOATS,), value + 1))
    optimizer.moments.write("exp_avg_sq", 0, torch.full((FLOATS,), value + 2))
    optimizer.updates = 9
    return optimizer


def test_saved_state_comes_back(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "deep" / "er")
    assert store.load_newest() is None
    assert store.newest() is None
    optimizer = make_optimizer()
    held = optimizer.hold(5)
    assert store.save(held) == 12 * FLOATS
    held.release()
    state = store.load_newest()
    assert state is not None
    assert (state.step, state.updates, store.newest_step()) == (5, 9, 5)
    fresh = make_optimizer(7.0)
    fresh.load(state.vectors, state.updates, state.fingerprint)
    assert torch.equal(fresh.weights.flat, optimizer.weights.flat)
    assert torch.equal(
        fresh.moments.read("exp_avg_sq", 0, FLOATS), optimizer.moments.read("exp_avg_sq", 0, FLOATS)
    )


def test_the_newest_two_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    (tmp_path / "00000000-step-1.state.part").write_bytes(b"x")
    (tmp_path / "00000000-step-1.state").write_bytes(b"crashed before its manifest")
    for step in (3, 4, 4):
        store.save(make_optimizer().hold(step))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"0000000{number}-step-4.{suffix}" for number in (2, 3) for suffix in ("manifest", "state")
    ]


def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    store.save(make_optimizer().hold(3))
    store.save(make_optimizer().hold(6))
    path = tmp_path / "00000002-step-6.state"
    data = bytearray(path.read_bytes())
    data[CHUNK + 5] ^= 1
    path.write_bytes(data)
    file = store.newest()
    assert file is not None
    with file, pytest.raises(LocalError, match=rf"step-6.state: damaged at byte {CHUNK} "):
        file.load()
    state = store.load_newest()
    assert state is not None
    assert state.step == 3
    assert len(store.problems) == 1
    path.with_suffix(".manifest").write_bytes(b"\xc1 nonsense")
    with pytest.raises(LocalError, match="manifest cannot be read"):
        store.newest()
    path.unlink()
    (tmp_path / "00000001-step-3.state").write_bytes(b"short")
    assert SnapshotStore(tmp_path).load_newest() is None


def test_download_in_any_order_and_install(tmp_path: Path) -> None:
    donor, store = Identity.generate(), SnapshotStore(tmp_path / "donor")
    optimizer = make_optimizer()
    store.save(optimizer.hold(5))
    file = store.newest()
    assert file is not None
    manifest = open_manifest(donor.peer_id, file.manifest.encode(), file.manifest.signed(donor))
    manifest.check_layout(optimizer.weights.layout.size, optimizer.weights.layout.fingerprint)
    newcomer = SnapshotStore(tmp_path / "newcomer")
    arriving = newcomer.receive(manifest)
    order = sorted(arriving.missing)
    random.Random(1).shuffle(order)
    assert len(order) == 4
    for index in order:
        chunk = file.chunk(index)
        assert not arriving.take(index, chunk[:-1] + bytes([chunk[-1] ^ 1]))
        assert not arriving.take(index, chunk[:-1])
        assert arriving.take(index, chunk)
        assert arriving.take(index, chunk)  # again: no harm
    assert arriving.bytes_here == manifest.size
    with newcomer.install(arriving) as installed:
        assert installed.manifest == manifest
        assert torch.equal(installed.mapped().vectors[0], optimizer.weights.flat)
    arriving.close()
    state = newcomer.load_newest()
    assert state is not None
    assert torch.equal(state.vectors[0], optimizer.weights.flat)
    names = sorted(path.name for path in newcomer.folder.iterdir())
    assert names == ["00000001-step-5.manifest", "00000001-step-5.state"]
    with newcomer.find(manifest.digest) or pytest.fail("not found"):
        pass
    assert newcomer.find(bytes(32)) is None
    file.close()


def test_a_broken_download_keeps_what_is_sound_and_nothing_else(tmp_path: Path) -> None:
    store, newcomer = SnapshotStore(tmp_path / "donor"), SnapshotStore(tmp_path / "newcomer")
    store.save(make_optimizer().hold(5))
    file = store.newest()
    assert file is not None
    arriving = newcomer.receive(file.manifest)
    for index in (0, 1):
        assert arriving.take(index, file.chunk(index))
    arriving.close()
    data = newcomer.folder / "incoming.data"
    damaged = bytearray(data.read_bytes())
    damaged[CHUNK + 7] ^= 1
    data.write_bytes(damaged[: 2 * CHUNK + 5])  # and torn
    assert newcomer.begun() == file.manifest
    again = newcomer.receive(file.manifest)
    assert (again.missing, again.bytes_here) == ({1, 2, 3}, CHUNK)
    again.close()
    # Another snapshot begins from nothing, but for what an own one has of it.
    other = make_optimizer()
    other.moments.write("exp_avg_sq", 0, torch.full((FLOATS,), 9.0))
    newcomer.save(other.hold(4))
    store.save(make_optimizer().hold(6))
    newer = store.newest()
    assert newer is not None
    third = newcomer.receive(newer.manifest)
    assert third.missing == {2, 3}  # where the second moment lies
    third.close()
    newcomer.make_room()
    assert newcomer.begun() == newer.manifest, "it may still be coming"
    newcomer.let_go()
    newcomer.make_room()
    assert newcomer.begun() is None
    assert sorted(path.suffix for path in newcomer.folder.iterdir()) == [".manifest", ".state"]
    newer.close()
    file.close()


def test_packed_chunks_are_smaller_and_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(CHUNK // 4, generator=generator).mul_(0.02).numpy().tobytes()
    noise = random.Random(2).randbytes(CHUNK)
    packer = Packer()
    packed = packer.pack(weights)
    assert packed is not None
    assert len(packed) < 0.9 * CHUNK
    assert unpack(packed, CHUNK) == weights
    assert packer.pack(noise) is None
    assert packer.pack(weights) is None, "after a chunk that was not worth it some are not tried"
    short = weights[:400]
    assert unpack(Packer().pack(bytes(400)) or b"", 400) == bytes(400)
    for bad in (b"", packed[:-9], bytes([0]) + packed[1:], noise[:100]):
        with pytest.raises(RemoteError, match="packed chunk"):
            unpack(bad, CHUNK)
    for size in (CHUNK - 4, CHUNK + 4, len(short)):
        with pytest.raises(RemoteError, match="size"):
            unpack(packed, size)


def test_manifests_that_are_refused() -> None:
    donor, other = Identity.generate(), Identity.generate()
    good = SnapshotManifest(1, 1, "f" * 64, 256, (bytes(32),))
    data = good.encode()
    assert open_manifest(donor.peer_id, data, good.signed(donor)) == good
    with pytest.raises(RemoteError, match="signature"):
        open_manifest(other.peer_id, data, good.signed(donor))
    good.check_layout(256, "f" * 64)
    with pytest.raises(RemoteError, match="another stage"):
        good.check_layout(256, "e" * 64)
    with pytest.raises(RemoteError, match="another stage"):
        attrs.evolve(good, floats=512).check_layout(256, "f" * 64)
    fields = msgpack.unpackb(data)
    for index, value in enumerate([2, -1, "1", 7, 0, [b"short"]]):
        bad = [*fields[:index], value, *fields[index + 1 :]]
        with pytest.raises(RemoteError):
            SnapshotManifest.decode(msgpack.packb(bad))
    for junk in (b"", b"\xc1", msgpack.packb(fields[:5]), data + b"x", msgpack.packb({})):
        with pytest.raises(RemoteError):
            SnapshotManifest.decode(junk)
