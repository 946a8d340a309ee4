"""Node settings: overrides are typed, paths follow the file, unknown names get a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from agorad import config
from p2p.errors import LocalError

TEXT = """
[node]
role = "worker"
run = "../run.toml"
state = "."
listen = ["/ip4/127.0.0.1/tcp/0"]

[worker]
stage = 1
"""


def write(folder: Path, text: str = TEXT) -> Path:
    path = folder / "agorad.toml"
    path.write_text(text)
    return path


def test_paths_follow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.chdir("/")
    settings = config.load(path)
    assert settings.node.state == tmp_path
    assert settings.node.run == tmp_path.parent / "run.toml"
    assert settings.identity == tmp_path / "identity.key"
    assert settings.control == tmp_path / "control.sock"
    assert settings.path == path
    assert settings.name == "worker"


def test_overrides_are_read_by_the_type_of_their_setting(tmp_path: Path) -> None:
    settings = config.load(
        write(tmp_path),
        role="trainer",
        assignments=[
            "trainer.seconds=5",
            "node.name=12",
            "node.threads=2",
            "worker.stage=0",
            "worker.stage=2",
        ],
    )
    assert settings.node.role == "trainer"
    assert settings.trainer.seconds == 5.0
    assert settings.node.name == "12"
    assert settings.node.threads == 2
    assert settings.worker.stage == 2


def test_a_list_may_be_given_as_one_value(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path), assignments=["node.listen=/ip4/127.0.0.1/tcp/7"])
    assert settings.node.listen == ("/ip4/127.0.0.1/tcp/7",)
    many = config.load(write(tmp_path), assignments=['node.announce=["/dns4/a/tcp/1", "/dns4/b/tcp/2"]'])
    assert many.node.announce == ("/dns4/a/tcp/1", "/dns4/b/tcp/2")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("node.lissten=x", "unknown setting 'node.lissten'; did you mean 'listen'"),
        ("nod.listen=x", "unknown setting 'nod'; did you mean 'node'"),
        ("node.threads.x=1", "unknown setting 'node.threads.x'; it has no settings inside"),
        ("node.threads=many", r"node.threads must be a whole number, not a text \('many'\)"),
        ("node.threads=1.5", "node.threads must be a whole number"),
        ("node.threads=0", "node.threads = 0 must be between 1 and"),
        ("node.role=king", "node.role = 'king' is none of"),
        ("node=1", "'node' is a section"),
        ("node.listen=[]", "node.listen is empty"),
        ("threads", "is not of the form"),
        (".=1", "is not of the form"),
    ],
)
def test_bad_overrides(tmp_path: Path, assignment: str, sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        config.load(write(tmp_path), assignments=[assignment])


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot read the configuration .*nowhere"):
        config.load(tmp_path / "nowhere")
    with pytest.raises(LocalError, match=r"agorad\.toml: the setting 'node' is missing"):
        config.load(write(tmp_path, ""))
