"""What agoractl join keeps and takes: answers, secrets, addresses, manifests, and where nodes live."""

from __future__ import annotations

import os
import stat
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import attrs
import click
import pytest

from agorad import run as manifests
from agorad.join import answers, layout, questions, secret, source
from agorad.join.answers import Answers, NodeAnswers
from agorad.join.cloud import Place
from agorad.join.secret import Secret
from p2p.errors import LocalError
from p2p.identity import Identity
from tests.unit.joining import CARDS, OPERATOR, call, manifest, own_home, planned, smi


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


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
