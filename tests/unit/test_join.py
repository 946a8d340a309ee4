"""What agoractl join knows of machines, clouds, answers and secrets, without starting a node."""

from __future__ import annotations

import os
import socket
import stat
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import click
import pytest
from click.testing import CliRunner

from agorad import facts
from agorad import run as manifests
from agorad.cli.join import _gpus, join
from agorad.join import answers, cloud, findings, layout, source
from agorad.join.answers import Answers, Secret
from agorad.run import Admission, Manifest, RunInfo
from p2p.errors import LocalError
from p2p.identity import Identity
from stage import presets


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", *answers.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def manifest(**admission: object) -> Manifest:
    operator = Identity.generate()
    model, training = presets.preset("demo")
    info = RunInfo(name="a run", id="a-run", operator=operator.peer_id)
    return Manifest(
        run=info, model=model, training=training, admission=Admission(**admission)  # type: ignore[arg-type]
    ).signed(operator)  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "files", "maker", "place"),
    [
        ({}, (), "", cloud.Place()),
        ({"RUNPOD_POD_ID": "x", "RUNPOD_PUBLIC_IP": "192.0.2.7"}, (), "", cloud.Place("runpod", "192.0.2.7")),
        ({"VAST_CONTAINERLABEL": "C.1", "PUBLIC_IPADDR": "192.0.2.9"}, (), "", cloud.Place("vastai", "192.0.2.9")),  # noqa: E501
        ({}, ("/etc/ppci",), "", cloud.Place("paperspace")),
        ({}, (), "Amazon EC2", cloud.Place("aws")),
        ({}, (), "Hetzner", cloud.Place("hetzner")),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, ("/etc/ppci",), "Google", cloud.Place("kaggle")),
    ],
)  # fmt: skip
def test_clouds(environment: dict[str, str], files: tuple[str, ...], maker: str, place: cloud.Place) -> None:
    assert cloud.detect(environment, files.__contains__, lambda: maker) == place


def test_ports_that_have_other_numbers_outside() -> None:
    pod = cloud.Place("runpod", "192.0.2.7")
    assert cloud.announced_port(pod, 49200, {"RUNPOD_TCP_PORT_49200": "17311"}) == 17311
    assert cloud.announced_port(pod, 49201, {"RUNPOD_TCP_PORT_49200": "17311"}) == 49201
    assert cloud.announced_port(cloud.Place("aws"), 49200, {"RUNPOD_TCP_PORT_49200": "17311"}) == 49200
    assert cloud.announced_port(pod, 49200, {"RUNPOD_TCP_PORT_49200": "999999"}) == 49200


def test_answers_are_kept_private_and_without_a_token() -> None:
    said = Answers(account="alice", gpus=(0, 2), port=49300, announce_ip="192.0.2.1", slots=4)
    file = answers.keep("a-run", said)
    answers.keep("b-run", Answers(account="bob"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert answers.recall() == {"a-run": said, "b-run": Answers(account="bob")}
    assert list(answers.recall()) == ["a-run", "b-run"]
    answers.keep("a-run", said)
    assert list(answers.recall()) == ["b-run", "a-run"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 3}', '{"a": {"port": "x"}}', '{"a": {"gpus": ["0"]}}']
)
def test_damaged_answers_are_none(text: str) -> None:
    answers.path().parent.mkdir(parents=True)
    answers.path().write_text(text)
    assert answers.recall() == {}


def test_where_a_secret_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "invitation").write_text("carol:from-the-invitation\n")
    (tmp_path / "file").write_text("from-the-file\n")
    assert answers.given_secret(None, None) is None
    invited = answers.given_secret(None, tmp_path)
    assert invited is not None
    assert invited.split() == ("carol", "from-the-invitation")
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    assert answers.given_secret(None, tmp_path) == Secret("from-the-environment")
    assert "HF_TOKEN" not in os.environ, "children inherit it otherwise"
    monkeypatch.setenv("AGORA_TOKEN", "from-the-environment")
    assert answers.given_secret(f"@{tmp_path / 'file'}", tmp_path) == Secret("from-the-file")
    assert "AGORA_TOKEN" not in os.environ
    assert "from" not in repr(Secret("from-anywhere"))


def test_a_bare_token_is_refused() -> None:
    with pytest.raises(click.UsageError, match="every user of this machine"):
        answers.given_secret("hf_abc", None)


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "a" * 5000, "bell\a"])
def test_tokens_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(LocalError, match="copy it again"):
        answers.given_secret(f"@{tmp_path / 'file'}", None)


def test_findings_name_limit_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "find_gpu", lambda _device: ("RTX 2060", 6.0))
    asked = manifest(min_vram_gib=24.0, min_ram_gib=1e5, min_disk_gib=1e6)
    found = {f.name: f for f in findings.look(asked, device="cuda:0", port=0, state=tmp_path)}
    assert {name for name, f in found.items() if f.verdict == "fail"} == {"GPU memory", "memory", "disk"}
    assert found["GPU memory"].found == "6.0 GiB; the run asks for 24 (admission.min_vram_gib)"
    assert all(f.remedy for f in found.values() if f.verdict != "ok")
    monkeypatch.setattr(facts, "find_gpu", lambda _device: ("", 0.0))
    found = {f.name: f for f in findings.look(asked, device="cuda:0", port=0, state=tmp_path)}
    assert found["GPU"].verdict == "fail"


def test_a_taken_port_is_a_finding(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        finding = findings.look(manifest(), device="cpu", port=port, state=tmp_path)[-1]
    assert (finding.name, finding.verdict) == ("port", "fail")
    assert "--host-port" in finding.remedy


def test_one_node_a_gpu(tmp_path: Path) -> None:
    said = Answers(account="alice", gpus=(0, 3), port=49200, announce_ip="192.0.2.1", announce_port=7000)
    nodes = layout.plan(manifest(), said, device=None, identity=None, log=None)
    assert [(node.gpu, node.port, node.device) for node in nodes] == [
        (0, 49200, "cuda:0"), (3, 49201, "cuda:3"),
    ]  # fmt: skip
    assert len({node.folder for node in nodes} | {node.identity for node in nodes}) == 4
    assert layout.announced(said, nodes[1], cloud.Place()) == ["/ip4/192.0.2.1/tcp/7001"]
    assert layout.announced(Answers(gpus=(0,), port=49200), nodes[0], cloud.Place()) == []
    with pytest.raises(LocalError, match="--announce-ip"):
        layout.announced(Answers(gpus=(0,), port=49200, announce_port=9), nodes[0], cloud.Place())
    with pytest.raises(LocalError, match="one node's"):
        layout.plan(manifest(), said, device=None, identity=tmp_path / "key", log=None)


def test_gpu_ids() -> None:
    assert _gpus(("0,1", "1", "3")) == (0, 1, 3)
    for bad in ("x", "-1", "0,", "256", ",".join(map(str, range(17)))):
        with pytest.raises(click.UsageError):
            _gpus((bad,))


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--use-docker",), "not available in this version"),
        (("--json",), "--json goes with --check"),
        ((), "name the run"),
        (("run.toml", "--token", "hf_secret", "--skip-input"), "every user of this machine"),
        (("run.toml", "--skip-input", "--host_port", "1"), "lets in whom its operator lists"),
        (("run.toml", "--gpu_id", "7x", "--skip_input"), "whole numbers from 0"),
    ],
)
def test_what_cannot_be(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(home)
    manifests.save(manifest(), Path("run.toml"))
    done = CliRunner().invoke(join, list(arguments))
    assert done.exit_code == 2, done.output
    assert words in done.output.replace("\n", " ")
    assert "hf_secret" not in done.output


def test_a_look_starts_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    manifests.save(manifest(min_ram_gib=1e5), Path("run.toml"))
    done = CliRunner().invoke(join, ["run.toml", "--check", "--json"])
    assert done.exit_code == 5
    assert not (home / ".config").exists()
    assert not (home / ".local").exists()
