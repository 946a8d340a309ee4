"""doctor: every fault that is planted here is found, named, and comes with its remedy; nothing is changed."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agorad import config, control, facts
from agorad.cli.targets import Target
from agorad.doctor import daemon, machine, patient
from agorad.doctor.diagnose import diagnose
from agorad.doctor.patient import examine
from agorad.run import Manifest, NodeRef, RunInfo
from p2p.identity import Identity
from stage.config import TrainingConfig
from tests.unit.faults import FAULTS, frozen, state_of_another_user
from tests.unit.patients import MODEL, Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(machine, "kernels_trouble", str)  # a process each time
    monkeypatch.setattr(machine, "USUAL", b"reno")  # which every kernel has
    for name in ("CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    operator, keys = Identity.generate(), {}
    for role in ("seed", "authority", "trainer", "worker"):
        keys[role] = Identity.generate()
    manifest = Manifest(
        run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
        seeds=(NodeRef(peer_id=keys["seed"].peer_id, addrs=("/ip4/9.9.9.9/tcp/4001",)),),
        authorities=(NodeRef(peer_id=keys["authority"].peer_id, addrs=("/ip4/8.8.4.4/tcp/4001",)),),
        trainers=(NodeRef(peer_id=keys["trainer"].peer_id),),
        model=MODEL,
        training=TrainingConfig(seed=1),
    )
    (tmp_path / "node").mkdir(mode=0o700)
    found = Place(tmp_path, operator, keys, manifest)
    found.write(manifest)
    keys["worker"].save(found.node / "identity.key")
    found.set(announce=["/ip4/8.8.8.8/tcp/49200"])
    yield found
    for thing in found.opened:
        thing.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_explained(
    place: Place, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "ANSWER_S", 0.2)
    monkeypatch.setattr(facts, "find_gpus", list)
    plant, name, verdict, words = FAULTS[fault]
    before = {(one.name, one.found) for one in place.look() if one.verdict != "ok"}
    plant(place)
    files = sorted(place.folder.rglob("*"))
    fresh = [one for one in place.look() if one.verdict != "ok" and (one.name, one.found) not in before]
    if fault == "never ran":  # the healthy place's node does not run either
        fresh = [one for one in place.look() if one.name == "daemon"]
    (hit,) = [one for one in fresh if one.name == name and words in one.found]
    assert hit.verdict == verdict
    assert hit.remedy
    assert sorted(place.folder.rglob("*")) == files


def test_nothing_is_found_where_nothing_is_wrong(place: Place) -> None:
    bad = [one for one in place.look() if one.verdict != "ok"]
    assert [one.name for one in bad] == ["daemon"]
    assert len(FAULTS) >= 70


def test_a_kernel_without_our_congestion_control_is_told_of(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.verdict for one in place.look() if one.name == "congestion control"] == ["ok"]
    monkeypatch.setattr(machine, "USUAL", b"no such way")
    (found,) = [one for one in place.look() if one.name == "congestion control"]
    assert found.verdict == "warn"
    assert "modprobe tcp_bbr" in found.remedy


def _answering(place: Place, status: dict[str, Any]) -> None:
    """A daemon that knows one answer."""
    listener = control.listen(place.node / "c.sock")
    place.opened.append(listener)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(1000)
                    client.sendall(control.encode({"ok": True, "result": status}))

    threading.Thread(target=serve, daemon=True).start()


def test_what_a_running_daemon_says_is_passed_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old_round = {"number": 1, "fraction": 1.0, "members": 2, "at": time.time() - 9000}
    _answering(
        place,
        {"pid": os.getpid(), "phase": "active", "version": "0.0.1", "warnings": ["the disk is full"],
         "paused": "outside its hours", "round": old_round},
    )  # fmt: skip
    monkeypatch.setattr(machine, "open_files", lambda pid: (990, 1000))
    found = {one.name: one for one in place.look()}
    assert found["daemon"].verdict == "ok"
    assert found["running version"].remedy == "agoractl restart"
    assert found["warning"].found == "the disk is full"
    assert "agoractl resume" in found["paused"].remedy
    assert found["rounds"].verdict == "warn"
    assert found["file table"].verdict == "fail"


def test_gpus_torch_and_kernels(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "find_gpus", lambda: [facts.Gpu(0, "RTX", 8.0, 1e-6)])
    monkeypatch.setattr(machine, "torch_version", lambda: "2.13.0+cpu")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _which: (256, 256))
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 20)
    place.set(device="cuda:0")
    place.sign(min_vram_gib=24.0)
    found = {one.name: one for one in place.look()}
    for name, words in (
        ("GPU", "min_vram_gib"), ("GPU memory", "free"), ("torch", "cannot use a GPU"),
        ("open files", "256"), ("free memory", "not in use"),
    ):  # fmt: skip
        assert found[name].verdict in ("warn", "fail"), name
        assert words in found[name].found
        assert found[name].remedy
    monkeypatch.setattr(machine, "torch_version", lambda: "")
    assert {one.name: one for one in place.look()}["torch"].found == "not installed"
    assert config.load(place.node / "agorad.toml").node.device == "cuda:0"


def test_limits_of_control_groups_and_processes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert machine.cgroup_limit(tmp_path, tmp_path / "own") == 1000
    assert machine.cgroup_limit(tmp_path, tmp_path / "none") is None
    used, most = machine.open_files(os.getpid())
    assert 0 < used < most
    assert machine.open_files(0) == (0, 0)
    assert (machine.available_bytes() or 0) > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_a_file_of_another_user_in_the_state_is_found(place: Place) -> None:
    state_of_another_user(place)
    (hit,) = [one for one in place.look() if one.name == "state owner"]
    assert "12345's" in hit.found


def test_kernels_that_cannot_be_loaded_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.kernels_trouble() == ""
    cut = tmp_path / f"agora_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    cut.write_bytes(b"\x7fELF, cut short")
    spec = importlib.util.spec_from_file_location("agora_kernels", cut)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _name: spec)
    assert "cannot be loaded" in machine.kernels_trouble()
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _name: None)
    assert "is not there" in machine.kernels_trouble()


def test_nodes_of_one_machine_that_share_what_they_must_not(place: Place) -> None:
    ours, theirs = place.node, place.folder / "other"
    theirs.mkdir(mode=0o700)
    (theirs / "identity.key").write_bytes((ours / "identity.key").read_bytes())
    shared = {"listen": ["/ip4/0.0.0.0/tcp/49377"], "metrics": {"listen": "127.0.0.1:49378"}}
    place.set(**shared)
    text = (ours / "agorad.toml").read_text()
    (theirs / "agorad.toml").write_text(text)
    other = examine(Target("other", theirs / "c.sock", theirs / "agorad.toml"))
    patient_ = examine(Target("node", ours / "c.sock", ours / "agorad.toml"))
    found = [one for one in diagnose(patient_, [patient_, other], over_the_net=False) if "twice" in one.name]
    assert sorted(one.name for one in found) == ["key twice", "port twice", "port twice"]
    (theirs / "agorad.toml").write_text(text.replace('state = "."', 'state = "../node"'))
    other = examine(Target("other", theirs / "c.sock", theirs / "agorad.toml"))
    assert "state twice" in [one.name for one in diagnose(patient_, [other], over_the_net=False)]


def test_what_keeps_a_silent_daemon_silent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "ANSWER_S", 0.2)
    frozen(place)
    holder = subprocess.Popen(
        ["flock", str(place.node), "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        silent = lambda: next(one for one in place.look() if one.name == "daemon")  # noqa: E731
        assert f"process {holder.pid} hangs" in silent().found
        os.kill(holder.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        assert f"process {holder.pid} is stopped" in silent().found
        assert silent().remedy == f"kill -CONT {holder.pid}"
        monkeypatch.setattr(daemon, "open_files", lambda _pid: (64, 64))
        assert "all of its 64 files open" in silent().found
    finally:
        subprocess.run(["pkill", "-KILL", "-P", str(holder.pid)], check=False)
        holder.kill()
        holder.communicate()
