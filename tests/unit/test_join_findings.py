"""What agoractl join finds out about a machine before a node is started."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import attrs
import pytest

from agorad import facts
from agorad import run as manifests
from agorad.join import findings, layout, reach
from agorad.join.cloud import Place
from agorad.join.reach import Reach
from agorad.run import Manifest
from p2p.identity import Identity
from stage import presets
from tests.unit.joining import CARDS, manifest, own_home, planned, smi


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


def look(
    run: Manifest, nodes: list[layout.Planned], reached: Reach | None = None, system: str = ""
) -> dict[str, Any]:
    return {f.name: f for f in findings.of_machine(run, nodes, Place(), reached, system=system)}


@pytest.mark.catalogue(9, 15)
def test_findings_name_limit_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, CARDS)
    monkeypatch.setattr(findings, "torch_version", lambda: "2.13.0")
    asked = manifest(min_vram_gib=32.0, min_ram_gib=1e5, min_disk_gib=1e6)
    found = look(asked, [planned(tmp_path, device="cuda:0")])
    assert {name for name, f in found.items() if f.verdict == "fail"} == {"GPU memory", "memory", "disk"}
    assert found["GPU"].found == "NVIDIA GeForce RTX 4090"
    assert found["GPU memory"].found == "24.0 GiB; the run asks for 32 (admission.min_vram_gib)"
    assert all(f.remedy and f.exit == 10 for f in found.values() if f.verdict == "fail")
    both = look(manifest(), [planned(tmp_path, device=f"cuda:{gpu}", gpu=gpu) for gpu in (0, 1)])
    assert both["GPU 1"].found == "NVIDIA L40S"
    assert "GPU 1 free" not in both, "0.9 GiB are enough for this model"
    none = look(manifest(), [planned(tmp_path, device="cuda:7", gpu=7)])["GPU"]
    assert (none.verdict, none.found) == ("fail", "nvidia-smi shows no GPU 7")


def test_a_gpu_in_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, CARDS)
    model, training = presets.preset("8b")
    big = attrs.evolve(manifest(), model=model, training=training)
    finding = look(big, [planned(tmp_path, device="cuda:1", gpu=1)])["GPU free"]
    assert (finding.verdict, "0.9 GiB" in finding.found) == ("warn", True)


@pytest.mark.catalogue(5, 10, 12)
def test_a_machine_that_cannot_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, CARDS)
    monkeypatch.setattr(findings, "torch_version", lambda: "2.13.0+cpu")
    nodes = [planned(tmp_path, device="cuda:0")]
    found = look(manifest(), nodes, system="Darwin")
    assert found["system"].verdict == "fail"
    assert "WSL2" in found["system"].remedy
    assert found["torch"].found == "2.13.0+cpu cannot use a GPU"
    monkeypatch.setattr(findings, "torch_version", lambda: "")
    assert look(manifest(), nodes)["torch"].verdict == "fail"
    monkeypatch.setattr(findings, "OLDEST_PYTHON", (99, 0))
    assert look(manifest(), nodes)["Python"].verdict == "fail"


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "find_gpus", list)
    assert look(manifest(), [planned(tmp_path)])["GPU"].verdict == "warn"
    assert look(manifest(min_vram_gib=8.0), [planned(tmp_path)])["GPU"].verdict == "fail"


def test_the_line_and_the_clock(tmp_path: Path) -> None:
    run, nodes = manifest(), [planned(tmp_path)]
    away = look(run, nodes, Reach(why="x: Connection refused"))
    assert (away["authority"].verdict, "clock" in away) == ("warn", False)
    near = Reach(answered=True, rtt_ms=12.0, skew_s=0.004, seen_at="203.0.113.9", own=("192.168.1.5",))
    found = look(run, nodes, near)
    assert (found["authority"].verdict, found["authority"].found) == ("ok", "answers in 12 ms")
    assert found["clock"].found == "as the authority's"
    assert "forward the port to 192.168.1.5" in found["address"].found
    assert "address" not in look(run, nodes, attrs.evolve(near, own=("203.0.113.9",)))
    far = look(run, nodes, attrs.evolve(near, rtt_ms=300.0, skew_s=-95.0))
    assert (far["authority"].verdict, far["clock"].verdict) == ("warn", "fail")
    assert (
        far["clock"].found == "95.0 s behind the authority's; 30 s are allowed (admission.max_clock_skew_s)"
    )


def test_an_authority_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ref = manifests.NodeRef(peer_id=Identity.generate().peer_id, addrs=(f"/ip4/127.0.0.1/tcp/{port}",))
    seen = reach.look(attrs.evolve(manifest(), authorities=(ref,)))
    assert not seen.answered
    assert "refused" in seen.why
    assert not reach.look(manifest()).answered


@pytest.mark.catalogue(9)
def test_a_taken_port_is_a_finding(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        finding = findings.of_node(planned(tmp_path, port=taken.getsockname()[1]), Place())
    assert (finding.name, finding.verdict, finding.exit) == ("port", "fail", 12)
    assert "--host-port" in finding.remedy


def test_a_node_that_runs_already_is_a_finding(tmp_path: Path) -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b'{"ok": true, "result": {"pid": 4711}}\n')

    node = planned(tmp_path, port=1)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(node.control))
        listener.listen()
        Thread(target=serve, args=(listener,), daemon=True).start()
        finding = findings.of_node(node, Place())
    assert (finding.found, finding.exit) == ("this node runs already (process 4711)", 18)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA GeForce RTX 4090", "NVIDIA L40S"]),
        ("1,0", ["NVIDIA L40S", "NVIDIA GeForce RTX 4090"]),
        ("GPU-bb", ["NVIDIA L40S"]), ("", []), ("1,9,0", ["NVIDIA L40S"]),
    ],
)  # fmt: skip
def test_gpus_that_the_driver_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    smi(tmp_path, monkeypatch, CARDS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in facts.find_gpus()] == names
    assert facts.find_gpu("cuda:0")[0] == (names[0] if names else "")


@pytest.mark.parametrize("said", ["", "garbage\n", "0, GPU-1, A100, [N/A], 1\n"])
def test_a_driver_that_says_nothing_useful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    smi(tmp_path, monkeypatch, said)
    assert facts.find_gpus() == []
