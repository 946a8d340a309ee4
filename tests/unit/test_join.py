"""What agoractl join knows of machines, clouds, answers and secrets, without starting a node."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import attrs
import click
import pytest
from click.testing import CliRunner, Result

from agorad import facts
from agorad import run as manifests
from agorad.cli.join import join
from agorad.events import CertificateGranted, JoinDelayed, JoinQueued, Ready, Started
from agorad.join import answers, cloud, docker, findings, layout, lines, questions, reach, secret, source
from agorad.join.answers import Answers, NodeAnswers
from agorad.join.cloud import Place
from agorad.join.reach import Reach
from agorad.join.secret import Secret
from agorad.run import Admission, Manifest, RunInfo
from p2p.errors import LocalError
from p2p.event import Event, event_fields, event_name
from p2p.identity import Identity
from stage import presets
from stage.events import Phase, RoundFinished, StateFetched, StateFetching, Step
from tests.sentences import complete

CARDS = "0, GPU-aa11, NVIDIA GeForce RTX 4090, 24564, 24000\n1, GPU-bb22, NVIDIA L40S, 46068, 900\n"
AZURE = "7783-7084-3265-9085-8269-3286-77"
OPERATOR = Identity.generate()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "CUDA_VISIBLE_DEVICES", *secret.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    # The usual place, but named: of root's on a machine with systemd nothing is the system's then.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ".local" / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(operator: Identity = OPERATOR, version: int = 1, **admission: object) -> Manifest:
    model, training = presets.preset("demo")
    info = RunInfo(name="a run", id="a-run", operator=operator.peer_id, version=version)
    return Manifest(
        run=info, model=model, training=training, admission=Admission(**admission)  # type: ignore[arg-type]
    ).signed(operator)  # fmt: skip


def planned(
    folder: Path, *, device: str = "cpu", port: int = 0, gpu: int = 0, outside: int = 0
) -> layout.Planned:
    return layout.Planned(
        gpu=gpu, device=device, port=port, announce_port=outside, folder=folder,
        identity=folder / "identity.key", log=folder / "agorad.log",
    )  # fmt: skip


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, extra: str = "") -> None:
    """An nvidia-smi that says so."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{extra}\ncat <<'EOF'\n{said}EOF\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(join, list(arguments))


# Clouds


def detect(environment: dict[str, str], files: tuple[str, ...] = (), **firmware: str) -> Place:
    return cloud.detect(environment, files.__contains__, lambda field: firmware.get(field, ""))


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ("RUNPOD_POD_ID", "runpod"), ("VAST_CONTAINERLABEL", "vastai"), ("VAST_TCP_PORT_49200", "vastai"),
        ("MODAL_TASK_ID", "modal"), ("REPLICATE_MODEL", "replicate"), ("COLAB_RELEASE_TAG", "colab"),
        ("KAGGLE_KERNEL_RUN_TYPE", "kaggle"), ("PAPERSPACE_FQDN", "paperspace"),
        ("LAMBDA_LABS_ID", "lambda_labs"), ("COREWEAVE_CLUSTER", "coreweave"),
        ("TENSORDOCK_INSTANCE_ID", "tensordock"), ("HYPERSTACK_ID", "hyperstack"),
        ("JARVISLABS_ID", "jarvislabs"), ("TNR_INSTANCE", "thunder_compute"), ("NEBIUS_ID", "nebius"),
        ("CUDO_VM", "cudo"), ("AKASH_DEPLOYMENT_SEQUENCE", "akash"),
        ("AWS_LAMBDA_FUNCTION_NAME", "aws_lambda"), ("K_SERVICE", "gcp_cloudrun"),
        ("FUNCTIONS_WORKER_RUNTIME", "azure_functions"), ("KUBERNETES_SERVICE_HOST", "container"),
        ("HOME", ""),
    ],
)  # fmt: skip
def test_clouds_by_their_variables(sign: str, name: str) -> None:
    assert detect({sign: "x"}).cloud == name


@pytest.mark.parametrize(
    ("firmware", "name"),
    [
        ({"sys_vendor": "Amazon EC2"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gcp"),
        ({"sys_vendor": "Google", "product_name": "Eve"}, "home"),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE}, "azure"),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Surface Pro"}, "home"),
        ({"chassis_asset_tag": "OracleCloud.com"}, "oci"),
        ({"sys_vendor": "DigitalOcean"}, "digitalocean"),
        ({"sys_vendor": "Alibaba Cloud"}, "alibaba"),
        ({"sys_vendor": "Hetzner"}, "hetzner"),
        ({"sys_vendor": "OVHcloud"}, "ovh"),
        ({"sys_vendor": "Scaleway"}, "scaleway"),
        ({"sys_vendor": "QEMU"}, "virtual"),
        ({"sys_vendor": "LENOVO", "chassis_type": "10"}, "home"),
        ({"chassis_type": "10"}, "home"),
        ({}, ""),
    ],
)  # fmt: skip
def test_clouds_by_their_firmware(firmware: dict[str, str], name: str) -> None:
    place = detect({}, **firmware)
    assert place.cloud == name
    assert place.provider == ("" if name in ("home", "virtual") else name)


def test_the_first_sign_counts() -> None:
    assert (
        detect({"KAGGLE_URL_BASE": "x"}, ("/etc/ppci", "/.dockerenv"), sys_vendor="Amazon EC2").cloud
        == "kaggle"
    )
    assert detect({}, ("/etc/ppci", "/.dockerenv"), sys_vendor="Amazon EC2").cloud == "paperspace"
    assert detect({}, ("/.dockerenv",), sys_vendor="Amazon EC2").cloud == "aws"
    assert detect({}, ("/.dockerenv",), sys_vendor="LENOVO").cloud == "container"


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RUNPOD_PUBLIC_IP": "192.0.2.7", "RUNPOD_TCP_PORT_49200": "17311"}, "runpod"),
        ({"PUBLIC_IPADDR": "192.0.2.7", "VAST_TCP_PORT_49200": "17311"}, "vastai"),
    ],
)
def test_ports_that_have_other_numbers_outside(variables: dict[str, str], name: str, tmp_path: Path) -> None:
    prefix = "RUNPOD_TCP_PORT_" if name == "runpod" else "VAST_TCP_PORT_"
    place = detect({**variables, f"{prefix}22": "99999", f"{prefix}x": "5"})
    assert place == Place(name, "192.0.2.7", {49200: 17311})
    assert (place.outside(49200), place.outside(49201), place.remaps) == (17311, None, True)
    assert detect({}, sys_vendor="Amazon EC2").outside(49201) == 49201
    node = planned(tmp_path, port=49200)
    assert layout.announced(Answers(), node, place) == ["/ip4/192.0.2.7/tcp/17311"]
    assert layout.announced(Answers(announce_ip="host.example"), node, place) == [
        "/dns4/host.example/tcp/17311"
    ]
    finding = findings.of_node(planned(tmp_path, port=49201), place)
    assert finding.verdict == "warn"
    assert "lets TCP 49201 not through (it does: 49200)" in finding.found


# Answers and secrets


def test_answers_are_kept_private_and_without_a_token() -> None:
    said = Answers(
        operator="12D", account="alice", gpus=(0, 2), announce_ip="192.0.2.1", slots=4,
        nodes={0: NodeAnswers(port=49300), 2: NodeAnswers(announce_port=7, identity="/k", log="/l")},
    )  # fmt: skip
    answers.path().parent.mkdir(parents=True)
    answers.path().touch(mode=0o644)
    file = answers.keep("a-run", said)
    answers.keep("b-run", Answers(account="bob"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert answers.recall() == {"a-run": said, "b-run": Answers(account="bob")}
    assert list(answers.recall()) == ["a-run", "b-run"]
    answers.keep("a-run", said)
    assert list(answers.recall()) == ["b-run", "a-run"]
    assert [path.name for path in file.parent.iterdir()] == ["join.json"]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"a": 3}', '{"a": {"account": 3}}', '{"a": {"gpus": ["0"]}}', '{"a": {"nodes": []}}',
        '{"a": {"nodes": {"x": {}}}}', '{"a": {"nodes": {"0": {"port": "1"}}}}', "[" * 9000, "\0",
    ],
)  # fmt: skip
def test_damaged_answers_are_none(text: str) -> None:
    answers.path().parent.mkdir(parents=True)
    answers.path().write_text(text)
    assert answers.recall() == {}


def test_settings_of_a_later_version_are_left_out() -> None:
    answers.path().parent.mkdir(parents=True)
    answers.path().write_text('{"a": {"account": "bob", "colour": "blue", "nodes": {"0": {"shape": 1}}}}')
    assert answers.recall() == {"a": Answers(account="bob", nodes={0: NodeAnswers()})}


def test_where_a_secret_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "invitation").write_text("carol:from-the-invitation\n")
    (tmp_path / "file").write_text("from-the-file\n")
    assert secret.given(None, "", None) is None
    invited = secret.given(None, "", tmp_path)
    assert invited is not None
    assert invited.split() == ("carol", "from-the-invitation")
    monkeypatch.setenv("AGORA_TOKEN", "from-agora")
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "of-other-programs")
    taken = secret.from_environment()
    assert taken == "from-the-environment"
    assert not {"HF_TOKEN", "AGORA_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & set(os.environ), (
        "children inherit them"
    )
    assert secret.given(None, taken, tmp_path) == Secret("from-the-environment")
    assert secret.given(f"@{tmp_path / 'file'}", taken, tmp_path) == Secret("from-the-file")
    assert "from" not in repr(Secret("from-anywhere"))


def test_nothing_started_before_inherits_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, CARDS, extra=f"env > {tmp_path}/inherited")
    manifests.save(manifest(), Path("run.toml"))
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    call("run.toml", "--check")
    seen = (tmp_path / "inherited").read_text()
    assert "PATH=" in seen
    assert "hf_verysecret" not in seen


@pytest.mark.catalogue(2)
@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "a" * 5000, "bell\a"])
def test_tokens_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(LocalError, match="copy it again"):
        secret.given(f"@{tmp_path / 'file'}", "", None)


# Findings


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


# Where nodes live


def test_one_node_a_gpu(tmp_path: Path) -> None:
    said = Answers(gpus=(0, 3), announce_ip="192.0.2.1", nodes={3: NodeAnswers(port=50000)})
    nodes = layout.plan(manifest(), said, cpu=False)
    assert [(node.gpu, node.port, node.device) for node in nodes] == [
        (0, 49200, "cuda:0"),
        (3, 50000, "cuda:3"),
    ]
    nodes = layout.plan(manifest(), said, cpu=False, port=49210, announce_port=7000)
    assert [(node.port, node.announce_port) for node in nodes] == [(49210, 7000), (49213, 7003)]
    assert len({node.folder for node in nodes} | {node.identity for node in nodes}) == 4
    assert layout.announced(said, nodes[1], Place()) == ["/ip4/192.0.2.1/tcp/7003"]
    assert layout.announced(Answers(), planned(tmp_path, port=9), Place()) == []
    with pytest.raises(LocalError, match="--announce-ip"):
        layout.announced(Answers(), nodes[0], Place())
    with pytest.raises(LocalError, match="one node's"):
        layout.plan(manifest(), said, cpu=False, identity=tmp_path / "key")
    with pytest.raises(LocalError, match="there is none"):
        layout.plan(manifest(), said, cpu=False, port=65534)
    with pytest.raises(LocalError, match="on one port"):
        layout.plan(manifest(), attrs.evolve(said, nodes={3: NodeAnswers(port=49200)}), cpu=False)


def test_key_and_log_of_an_earlier_join_are_used_again(tmp_path: Path) -> None:
    said = Answers(gpus=(1,))
    first = layout.plan(manifest(), said, cpu=True, identity=tmp_path / "k", log=tmp_path / "l")[0]
    again = attrs.evolve(said, nodes={1: first.answers})
    assert layout.plan(manifest(), again, cpu=True)[0] == first
    layout.write(manifest(), said, first, Place())
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    os.close(layout.open_log(first))
    assert stat.S_IMODE(first.log.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "bad", ["x y", "", "0.0.0.0", "256.1.1.1", "-", "a" * 300, "http://x", "ff02::1", "a/b"]
)
def test_addresses_that_nobody_could_reach(bad: str) -> None:
    with pytest.raises(LocalError):
        questions.host(bad)


def test_addresses() -> None:
    for good in ("203.0.113.9", "2001:db8::1", "node.example.org", "localhost"):
        assert questions.host(good) == good


def test_what_answers_must_be_like() -> None:
    assert questions.gpus("0,1, 1,3") == (0, 1, 3)
    for bad in ("x", "-1", "0,", "256", ",".join(map(str, range(17)))):
        with pytest.raises(LocalError):
            questions.gpus(bad)
    assert questions.email("") == ""
    assert questions.email("a.b+c@example.co.uk") == "a.b+c@example.co.uk"
    for bad in ("x", "x@", "@x.y", "a b@c.d", "a@b", "a@b..c"):
        with pytest.raises(LocalError):
            questions.email(bad)


# Manifests


class Server(BaseHTTPRequestHandler):
    pages: dict[str, bytes] = {}

    def do_GET(self) -> None:
        body = self.pages.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_words: object) -> None:
        pass


def test_a_manifest_from_an_address(tmp_path: Path) -> None:
    asked = manifest()
    manifests.save(asked, tmp_path / "run.toml")
    text = (tmp_path / "run.toml").read_bytes()
    Server.pages = {
        "/run.toml": text,
        "/altered": text.replace(b'"a run"', b'"b run"'),
        "/page": b"<html>",
        "/big": b"#" * (2 << 20),
    }
    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    try:
        assert source.load(f"{root}/run.toml").hash == asked.hash
        for path, words in (
            ("/none", "answers 404"), ("/altered", "altered"), ("/page", "not a run"), ("/big", "larger"),
        ):  # fmt: skip
            with pytest.raises(LocalError, match=words):
                source.load(root + path)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(LocalError, match="cannot fetch"):
        source.load(f"{root}/run.toml")
    with pytest.raises(LocalError) as told:
        source.load(f"http://user:password@127.0.0.1:{server.server_port}/run.toml?key=secret")
    assert "password" not in str(told.value)
    assert "secret" not in str(told.value)
    with pytest.raises(click.UsageError, match="neither a path"):
        source.load("file:///etc/passwd")


def test_a_run_keeps_its_operator_and_its_newest_edition() -> None:
    here = layout.plan(manifest(), Answers(gpus=(0,)), cpu=True)[0]
    known = Answers(operator=OPERATOR.peer_id)
    assert source.settled(manifest(), known).run.version == 1
    layout.write(manifest(version=3), Answers(), here, Place())
    assert source.settled(manifest(version=2), known).run.version == 3
    assert source.settled(manifest(version=4), known).run.version == 4
    thief = manifest(Identity.generate(), version=9)
    with pytest.raises(LocalError, match="not joined"):
        source.settled(thief, known)
    assert source.settled(thief, Answers()) is thief


# The command


@pytest.mark.catalogue(3, 4, 7, 9)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--use-docker", "--check"), "goes without --identity-path, --log-file and --check"),
        (("--json",), "--json goes with --check"),
        ((), "name the run"),
        (("run.toml", "--token", "hf_secret", "--skip-input"), "every user of this machine"),
        (("run.toml", "--skip-input", "--host_port", "1"), "lets in whom its operator lists"),
        (
            ("run.toml", "--skip_input", "--account", "bob"),
            "give the secret of account 'bob' with --token @FILE",
        ),
        (("hub.toml", "--skip_input"), "give a Hugging Face token with --token @FILE or in HF_TOKEN"),
        (("run.toml", "--gpu_id", "7x", "--skip_input"), "whole numbers from 0"),
        (("run.toml", "--email", "nobody"), "is not an email address"),
        (("run.toml", "--announce_ip", "a b"), "neither an IP address nor a host name"),
        (("run.toml", "--account", "a b"), "is no account"),
        (("run.toml", "--host-port", "0"), "0 is not in the range"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], words: str) -> None:
    manifests.save(manifest(), Path("run.toml"))
    manifests.save(manifest(accounts="huggingface"), Path("hub.toml"))
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    complete(done.output.strip().splitlines()[-1], words)
    assert "hf_secret" not in done.output
    assert not Path(".local").exists()
    assert not Path(".config").exists()


def test_an_invitation_is_its_account_s() -> None:
    manifests.save(manifest(), Path("run.toml"))
    Path("invitation").write_text("carol:s3cret\n")
    done = call("run.toml", "--skip-input", "--account", "bob")
    assert done.exit_code == 2
    assert "the invitation is one of account carol" in done.output


def test_a_join_goes_on_in_a_container(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests.save(manifest(), Path("run.toml"))
    Path("invitation").write_text("carol:s3cret\n")
    started: list[docker.Container] = []
    monkeypatch.setattr(docker, "start", lambda container: started.append(container) or 0)
    done = call("run.toml", "--skip-input", "--use_docker", "--gpu-id", "cpu", "--announce-ip", "203.0.113.9")
    assert done.exit_code == 0, done.output
    (container,) = started
    assert container.run == "run.toml"
    assert list(container.flags) == [
        "--gpu-id", "cpu", "--host-port", "49200", "--account", "carol", "--announce-ip", "203.0.113.9",
    ]  # fmt: skip
    assert (list(container.ports), container.gpus) == ([49200], False)
    assert container.secret is not None
    assert container.secret.split() == ("carol", "s3cret")
    assert not (home / ".local").exists()


def test_a_machine_that_is_too_small_is_told_what_to_do() -> None:
    manifests.save(manifest(min_ram_gib=1e5), Path("run.toml"))
    done = call("run.toml", "--skip-input")
    assert done.exit_code == 10
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("agoractl: memory: ")
    assert last.endswith("the run asks for 100000 (admission.min_ram_gib); use a machine with more")


@pytest.mark.catalogue(10)
def test_another_system_is_told_which_one_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests.save(manifest(), Path("run.toml"))
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    done = call("run.toml", "--skip-input", "--account", "bob")
    assert done.exit_code == 10
    complete(done.output.strip().splitlines()[-1], "agoractl: system: Darwin", "run agorad on Linux")


def test_a_look_starts_nothing(home: Path) -> None:
    manifests.save(manifest(min_ram_gib=1e5), Path("run.toml"))
    done = CliRunner().invoke(join, ["run.toml", "--check", "--json"])
    assert done.exit_code == 5
    found = json.loads(done.stdout)["findings"]
    assert {"system", "Python", "memory", "port"} <= {entry["name"] for entry in found}
    assert {entry["verdict"] for entry in found} <= {"ok", "warn", "fail"}
    assert not (home / ".config").exists()
    assert not (home / ".local").exists()


# On a terminal

FAKE = """
import json, sys
import agorad.cli.join as cli

class Fake:
    def __init__(self, say, *, warm_steps): pass
    def run(self, nodes, secret):
        first = nodes[0]
        told = {"port": first.port, "outside": first.announce_port, "gpus": [n.gpu for n in nodes],
                "account": None if secret is None else secret.split()[0],
                "length": 0 if secret is None else len(secret.split()[1])}
        print("RESULT", json.dumps(told))
        return 0

cli.Live = Fake
cli.join(prog_name="join")
"""


def at_the_terminal() -> None:
    """The child's only one; and Ctrl-C means something, also where whoever runs the tests ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A join in a terminal of its own, with nodes that only say what they would be."""

    def __init__(self, *arguments: str) -> None:
        self.side, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", FAKE, *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=at_the_terminal,
        )
        os.close(child)
        self.text = ""

    def until(self, words: str) -> None:
        end = time.monotonic() + 20
        while words not in self.text.replace("\r\n", " "):
            assert time.monotonic() < end, f"no {words!r} in {self.text!r}"
            if select.select([self.side], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.side, 4096).decode()
                except OSError:  # the child is gone
                    assert words in self.text.replace("\r\n", " "), self.text

    def says(self, question: str, answer: str) -> None:
        self.until(question)
        self.text = ""
        os.write(self.side, f"{answer}\n".encode())

    def result(self) -> dict[str, Any]:
        self.until("RESULT")
        self.until("}")
        assert self.process.wait(20) == 0
        told: dict[str, Any] = json.loads(self.text.partition("RESULT")[2].strip())
        return told

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.side)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as server:
        return int(server.getsockname()[1])


def test_questions_on_a_terminal(terminals: list[Terminal]) -> None:
    manifests.save(manifest(), Path("run.toml"))
    port = free_port()
    terminals.append(first := Terminal("run.toml"))
    first.until("compare this key with what the operator published")
    first.says("Your account", "no such name")
    first.says("is no account", "alice")
    first.says("The secret of account alice (not shown)", "s3cret-of-alice")
    first.says("Email (optional, stays on this machine)", "nonsense")
    assert "s3cret" not in first.text
    first.says("'nonsense' is not an email address", "")
    first.says("TCP port of this node, which others must be able to reach [49200]", "70000")
    first.says("'70000' is no port", str(port))
    first.says("Address that others reach this machine at (empty: found by itself)", "no where")
    first.says("neither an IP address nor a host name", "node.example.org")
    first.says(f"Port that others reach it at [{port}]", "7000")
    told = first.result()
    assert told == {"port": port, "outside": 7000, "gpus": [0], "account": "", "length": 15}
    assert "s3cret" not in first.text
    assert "s3cret" not in answers.path().read_text()
    assert stat.S_IMODE(answers.path().stat().st_mode) == 0o600
    config = (answers.states() / "a-run/gpu0/agorad.toml").read_text()
    assert "/dns4/node.example.org/tcp/7000" in config
    assert 'account = "alice"' in config

    terminals.append(again := Terminal("run.toml"))  # only what is not kept is asked again
    again.says("The secret of account alice (not shown)", "s3cret-of-alice")
    assert again.result() == told | {"port": port}

    terminals.append(anew := Terminal("run.toml", "--reconfigure", "--account", "bob"))
    anew.says("The secret of account bob", "x")
    anew.says("Email", "bob@example.org")
    anew.says("TCP port", str(port))
    anew.says("Address that others", "")
    assert anew.result()["outside"] == 0
    assert answers.recall()["a-run"].email == "bob@example.org"


@pytest.mark.catalogue(2)
def test_a_token_is_asked_until_there_is_one(terminals: list[Terminal]) -> None:
    manifests.save(manifest(accounts="huggingface"), Path("run.toml"))
    terminals.append(first := Terminal("run.toml", "--host-port", str(free_port())))
    first.says("Hugging Face token (not shown)", " ")
    first.until("the token is empty")
    first.says("Hugging Face token (not shown)", "hf_abcdef")
    assert "hf_abc" not in first.text
    first.says("Email", "")
    first.says("Address that others", "")
    assert first.result()["length"] == 9


def test_ctrl_c_at_a_question_keeps_nothing(terminals: list[Terminal], home: Path) -> None:
    manifests.save(manifest(), Path("run.toml"))
    terminals.append(first := Terminal("run.toml"))
    first.until("Your account")
    end = time.monotonic() + 20
    while first.process.poll() is None and time.monotonic() < end:
        os.write(first.side, b"\x03")  # again: one that comes just before the line is read is not heard
        time.sleep(0.2)
    assert first.process.returncode not in (None, 0)  # click's own; agoractl ends with 130
    assert not (home / ".config").exists()


# What nodes do, in words


def entry(event: Event, at: float = 0.0) -> dict[str, Any]:
    return {"id": 1, "at": at, "event": event_name(type(event)), **event_fields(event)}


def heard(narrator: lines.Narrator, *events: Event) -> list[str]:
    return [f"[{tag}] {text}" for event in events for tag, text in narrator.hear(entry(event))]


def granted(why: str) -> CertificateGranted:
    return CertificateGranted(account="alice", stage=2, expires=9.0, authority="12Dauthor", why=why)


def test_the_phases_of_a_join() -> None:
    now = 0.0
    narrator = lines.Narrator(2, clock=lambda: now)
    place = JoinQueued(position=3, eta_s=65.0, paused=False, waitlisted=False, stage=2)
    assert heard(narrator, place, place, attrs.evolve(place, position=1, eta_s=None, paused=True)) == [
        "[AUTH] place 3 in the queue for stage 2; about 1 min 5 s to go",
        "[AUTH] place 1 in the queue for stage 2; the operator has paused joins",
    ]
    late = JoinDelayed(why="no answer", retry_s=0.4)
    assert len(heard(narrator, late, late)) == 1
    now = 61.0
    assert len(heard(narrator, late)) == 1
    assert heard(narrator, granted("it has the fewest"), granted("renewed"))[0] == (
        "[AUTH] access granted to alice for stage 2: it has the fewest"
    )
    part = StateFetching(donor="12Ddonor", step=7, bytes=0, size=2_000_000_000, seconds=0.0)
    assert heard(narrator, part) == ["[DOWNLOAD] state of step 7: 2.0 GB from Ddonor"]
    now = 63.0
    assert heard(narrator, attrs.evolve(part, bytes=10, seconds=2.0)) == []
    now = 67.0
    assert heard(narrator, attrs.evolve(part, bytes=500_000_000, seconds=25.0)) == [
        "[DOWNLOAD] 25% of 2.0 GB, 20.0 MB/s, 1 min 15 s to go"
    ]
    done = StateFetched(donor="12Ddonor", step=7, bytes=2_000_000_000, kept=0, line=1, seconds=99.0)
    assert heard(narrator, done)[0] == "[DOWNLOAD] state of step 7: 2.0 GB in 99.0 s"
    step = Step(stage=2, replica="12Dme", step=8, samples=3)
    assert heard(narrator, step) == []
    assert heard(narrator, Phase(from_="syncing", to="warming", why="w"), step, step)[1:] == [
        "[SYNC] warmed up 1 of 2 steps", "[SYNC] warmed up 2 of 2 steps",
    ]  # fmt: skip
    assert heard(narrator, Phase(from_="warming", to="active", why="w"), step) == [
        "[TRAINING] active on stage 2: this node takes part in training (w)"
    ]
    ended = RoundFinished(
        round=1, stage=2, slice=0, members=["a", "b"], fraction=1.0, checksum="", drops=[], disagreement=0.0
    )
    assert heard(narrator, ended) == []
    status = {"phase": "active", "step": 9, "loss": 2.5, "peers": 4, "microbatches": {"added": 12}}
    said = "12 batches in the last minute, step 9, loss 2.500, 1 averaged, 4 peers"
    assert narrator.pulse(status) == ("PROGRESS", said)
    assert narrator.pulse(status | {"points": {"compute": 1.5, "presence": 1.0}})[1].endswith("2.5 points")


def test_events_that_are_unknown_or_of_another_version_give_no_line() -> None:
    narrator = lines.Narrator(2)
    for odd in ({}, {"event": "new_in_v9"}, {"event": "phase"}, {"event": "join_checking", "what": "soul"}):
        assert narrator.hear(odd) == []
    assert heard(narrator, Ready(seconds=1.0, addrs=[])) == []
    assert len(heard(narrator, Started(name="gpu0", role="worker", run="r", peer_id="12D", version="1"))) == 1
