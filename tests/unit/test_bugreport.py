"""A report for strangers: everything useful is in it, and no secret, in whatever form it stood somewhere."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path
from urllib.parse import quote

import pytest
import tomli_w
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from agorad import bugreport
from agorad.cli.bugreport import bugreport as command
from agorad.redact import HIDDEN, Redactor
from p2p.errors import LocalError
from p2p.identity import Identity

SECRET = "wei/rd+Secret=4711"
TOKEN = "hf_abcdefGHIJKL0123456789"
ENVIRONMENT = "env-only-token-0815"
DATABASE = "postgresql://agora:databasepw@db.example.org/agora"


def node(folder: Path) -> Path:
    """A node whose files mention its secrets everywhere."""
    folder.mkdir()
    key = Identity.generate()
    key.save(folder / "identity.key")
    (folder / "secret").write_text(SECRET + "\n")
    raw = key.encode()
    forms = [
        SECRET, quote(SECRET, safe=""), base64.b64encode(SECRET.encode()).decode(), SECRET.encode().hex(),
        base64.b64encode(f"alice:{SECRET}".encode()).decode(), raw[4:36].hex(),
        base64.b64encode(raw).decode(), TOKEN, ENVIRONMENT, "databasepw",
        'password = "plain-password-1"', '"token": "json-token-2"',
        "Authorization: Bearer abcdefgh12345678", "https://user:urlpassword@example.org/x",
        "contact me@example.org", "from 198.41.0.4 and 2001:500:2::c and 127.0.0.1",
    ]  # fmt: skip
    lines = [json.dumps({"id": at, "event": "join_delayed", "why": form}) for at, form in enumerate(forms)]
    (folder / "events.jsonl").write_text("\n".join([*lines, ""]))
    (folder / "agorad.log").write_text("\n".join([*forms, "the last line of the log", ""]))
    table = {
        "node": {"role": "worker", "run": "run.toml", "state": ".", "log": "agorad.log", "name": "n1"},
        "worker": {"secret_file": "secret", "account": "alice"},
        "authority": {"database": DATABASE},
    }
    (folder / "agorad.toml").write_text(tomli_w.dumps(table))
    return folder / "agorad.toml"


def contents(archive: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            found[member.name.partition("/")[2]] = file.read()
    return found


def test_no_secret_gets_out_and_what_helps_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT)
    config = node(tmp_path / "n1")
    out = tmp_path / "report.tar.gz"
    done = CliRunner().invoke(command, ["--config", str(config), "--output", str(out), "--offline", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    files = contents(out)
    assert {entry["name"] for entry in told["files"]} == set(files)
    assert out.stat().st_mode & 0o777 == 0o600
    everything = b"\n".join(files.values())
    raw = Identity.load(tmp_path / "n1" / "identity.key").encode()
    for secret in (
        SECRET, quote(SECRET, safe=""), SECRET.encode().hex(), TOKEN, ENVIRONMENT, "databasepw",
        base64.b64encode(SECRET.encode()).decode()[:20], "plain-password-1", "json-token-2", "urlpassword",
        "abcdefgh12345678", "me@example.org", "198.41.0.4", "2001:500:2::c", raw[4:36].hex(),
        base64.b64encode(raw).decode()[8:40],
    ):  # fmt: skip
        assert secret.encode() not in everything, secret
    assert raw[4:36] not in everything
    for useful in (b"the last line of the log", b"127.0.0.1", b"ip-1", b'"join_delayed"', b"n1", b"alice"):
        assert useful in everything, useful
    findings = json.loads(files["n1/doctor.json"])
    assert any(finding["name"] == "manifest" for finding in findings)
    assert json.loads(files["about.json"])["also_set"].count("HF_TOKEN") == 1
    assert told["hidden"] > 10
    again = CliRunner().invoke(command, ["--config", str(config), "--output", str(out), "--offline"])
    assert isinstance(again.exception, LocalError)


def test_a_report_that_would_not_be_clean_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = node(tmp_path / "n1")
    monkeypatch.setattr(Redactor, "clean", lambda _self, text: text)
    out = tmp_path / "report.tar.gz"
    done = CliRunner().invoke(command, ["--config", str(config), "--output", str(out), "--offline"])
    assert isinstance(done.exception, LocalError)
    assert not out.exists()
    assert bugreport.MOST > 0


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=8, max_size=40).filter(lambda text: len(text.strip().encode()) >= 8), st.text())
def test_a_known_secret_goes_wherever_it_stands(secret: str, around: str) -> None:
    redactor = Redactor()
    redactor.know(secret)
    plain = secret.strip()
    whole = f"{around}{plain}{around}"
    for text in (whole, plain.encode().hex(), quote(plain, safe="")):
        cleaned = redactor.clean(text)
        assert plain not in cleaned.replace(HIDDEN, "") or plain in around + around
        assert not redactor.leaks(cleaned.encode())


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=7), st.binary(min_size=12, max_size=40), st.binary(max_size=7))
def test_nor_does_it_hide_in_base64(before: bytes, secret: bytes, after: bytes) -> None:
    redactor = Redactor()
    redactor.know(secret)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        cleaned = redactor.clean(encode(before + secret + after).decode())
        assert HIDDEN in cleaned
