"""Bad input, given to the real programs: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from agorad import run
from agorad.run import Admission, Manifest, NodeRef, RunInfo
from p2p.identity import Identity
from stage.presets import demo
from tests.sentences import complete
from tests.system.swarms import processes_under

NEEDS_A_USER = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


def name(value: str | tuple[str, ...]) -> str:
    """Of a case: its command line."""
    return "" if isinstance(value, str) else " ".join(value)[:40]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def call(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; temporary folders would show in ``cwd/tmp``."""
    temporary = cwd / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary), "HOME": str(temporary), "XDG_CONFIG_HOME": ""},
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], program: str, words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.startswith(f"{program}: ")
    assert done.stderr.count("\n") == 1, done.stderr
    complete(done.stderr)
    assert len(done.stderr) < 400


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Inputs of all kinds."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "short.txt").write_text("hello\n")
    (tmp_path / "good.txt").write_text("All work and no play makes Jack a dull boy.\n" * 4000)
    (tmp_path / "no.jsonl").write_text("text that is no JSON\n" * 900)
    (tmp_path / "fields.jsonl").write_text('{"content": "All work and no play"}\n' * 900)
    (tmp_path / "huge.jsonl").write_text('{"text": "' + "x" * (5 << 20))
    (tmp_path / "bad").mkdir()
    for path in (tmp_path / "no.parquet", tmp_path / "bad" / "no.parquet"):
        path.write_bytes(b"PAR1" + b"text" * 999)
    (tmp_path / "no-text").mkdir()
    (tmp_path / "no-text" / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "secret.txt").write_text("text " * 9000)
    (tmp_path / "secret.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "tmp").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "missing.txt"), "cannot read missing.txt: No such file"),
        (("--data", "empty.txt"), "empty.txt is empty or not text"),
        (("--data", "binary"), "binary is empty or not text"),
        (("--data", "pipe"), "pipe is empty or not text"),
        (("--data", "/dev/zero"), "/dev/zero is empty or not text"),
        (("--data", "short.txt"), "too few for 2 sequences"),
        (("--data", "no-text"), "no-text has no readable text file"),
        (("--data", "no.jsonl"), "900 lines left out that are no JSON"),
        (("--data", "fields.jsonl"), "900 lines left out without a text in 'text'"),
        (("--data", "huge.jsonl"), "1 lines left out with more than 4 MiB"),
        (("--data", "no.parquet"), "cannot read no.parquet as parquet"),
        (("--data", "bad"), "bad has no readable text file (cannot read bad/no.parquet as parquet"),
        (("--set", "data.tokens=tokenizer"), "name the run's tokenizer.json in trainer.tokenizer"),
        (("--set", "trainer.tokenizer=good.txt"), "this run's data.tokens is 'bytes'"),
        (
            ("--set", "data.tokens=tokenizer", "--set", "trainer.tokenizer=good.txt"),
            "good.txt is no tokenizer",
        ),
        (("--set", "data.tokenizer_sha256=12"), "must be 64 lower-case hexadecimal digits"),
        (("--data", ""), "the path is empty"),
        pytest.param(("--data", "secret.txt"), "secret.txt: Permission denied", marks=NEEDS_A_USER),
        (("--stages", "0"), "--stages 0: between 1 and 32"),
        (("--stages", "-1"), "--stages -1: between 1 and 32"),
        (("--stages", "99"), "--stages 99: between 1 and 32"),
        (("--stages", "7"), "6 layers cannot be cut in 7 stages; name at most 6"),
        (("--stages", "two"), "'two' is not a valid integer"),
        (("--workers", "0"), "--workers 0: between 1 and 64"),
        (("--trainers", "0"), "--trainers 0: between 1 and 8"),
        (("--steps", "0"), "--steps 0: between 1"),
        (("--steps", "9" * 30), "--steps 999"),
        (("--seconds", "-1"), "--seconds -1: more than 0"),
        (("--seconds", "nan"), "--seconds nan: more than 0"),
        (("--seconds", "inf"), "--seconds inf: more than 0"),
        (("--set", "model.heads=3"), "must equal model.d = 128"),
        (("--set", "model.kv_heads=3"), "must divide model.heads"),
        (("--set", "model.k=129"), "model.k = 129 must not exceed model.d = 128"),
        (("--set", "model.d=-4"), "model.d = -4 must be between"),
        (("--set", "model.d=wide"), "model.d must be a whole number, not a text ('wide')"),
        (("--set", "model.layers=[1,1]"), "model.layers names 2 stages, --stages asks for 3"),
        (("--set", "model.layers=[2,0,2]"), "every stage needs at least one layer"),
        (("--set", "model.seq=0"), "model.seq = 0 must be between"),
        (("--set", "model.vocab=10"), "must be at least 256"),
        (("--data", "good.txt", "--set", "model.seq=1000000"), "give a larger file or folder"),
        (("--set", "training.lr=nan"), "training.lr = nan must be between"),
        (("--set", "training.lr=fast"), "training.lr must be a number, not a text"),
        (("--set", "training.wire_dtype=int4"), "is none of 'fp32', 'bf16', 'int8'"),
        (("--set", "training.learning_rat=1"), "unknown setting 'training.learning_rat'"),
        (("--set", "training.target_bath=1"), "did you mean 'target_batch'?"),
        (("--set", "trainin.lr=1"), "did you mean 'training'?"),
        (("--set", "training.lr"), "not of the form section.key=value"),
        (("--set", "training=3"), "not of the form section.key=value"),
        (("--set", "model.d.x=3"), "unknown setting 'model.d.x'"),
        (("--set", "worker.slots=0"), "worker.slots = 0 must be between"),
        (("--set", "worker.slot=1"), "did you mean 'slots'?"),
        (("--set", "node.device=tpu"), "node.device = 'tpu' is none of 'auto', 'cpu', 'cuda'"),
        (("--set", "node.listen=/ip4/127.0.0.1/tcp/1"), "the demo decides it; it is different for each"),
        (("--set", "trainer.steps=3"), "the demo decides it; use --steps"),
        (("--dir", "no-text"), "no-text: is not empty"),
        (("--dir", "good.txt"), "good.txt: is not a folder"),
        (("--dir", "good.txt/deep"), "good.txt/deep: Not a directory"),
        (("--dir", "/proc/demo"), "--dir /proc/demo: No such file"),
        (("--dir", ""), "the path is empty"),
        pytest.param(("--dir", "closed/deep"), "closed/deep: Permission denied", marks=NEEDS_A_USER),
        (("--wrokers", "2"), "no such option '--wrokers'; did you mean"),
        (("surplus",), "unexpected extra argument (surplus)"),
    ],
    ids=name,
)
def test_a_demo_that_cannot_be(place: Path, arguments: tuple[str, ...], words: str) -> None:
    before = tree(place)
    folder = () if "--dir" in arguments else ("--dir", "swarm")
    refused(call("agorad.cli", "demo", *folder, "--json", *arguments, cwd=place), "agoractl", words)
    assert tree(place) == before


def test_a_refused_demo_without_a_folder_leaves_no_temporary_one(place: Path) -> None:
    before = tree(place)
    refused(call("agorad.cli", "demo", "--data", "empty.txt", cwd=place), "agoractl", "is empty or not text")
    refused(call("agorad.cli", "dmeo", cwd=place), "agoractl", "no command 'dmeo'; did you mean 'demo'?")
    assert tree(place) == before


@attrs.frozen
class NodePlace:
    """A run on disk and the settings of one node of it."""

    folder: Path
    manifest: Manifest
    operator: Identity

    def settings(self, role: str, *, identity: str | None = None, more: str = "", **node: str) -> None:
        """Write ``agorad.toml``; the key is ``identity``'s."""
        fields = {
            "role": role, "run": "run.toml", "state": "state",
            "identity": f"{identity or role}.key", **node,
        }  # fmt: skip
        lines = [f'{name} = "{value}"' for name, value in fields.items()]
        listen = 'listen = ["/ip4/127.0.0.1/tcp/0"]'
        text = "\n".join(["[node]", *lines, *([] if "listen" in more else [listen]), more, ""])
        (self.folder / "agorad.toml").write_text(text)

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return call("agorad.main", "--config", "agorad.toml", *arguments, cwd=self.folder)

    def refuses(self, words: str, *arguments: str, code: int = 2) -> None:
        (self.folder / "tmp").mkdir(exist_ok=True)
        before = tree(self.folder)
        refused(self.start(*arguments), "agorad", words, code)
        assert tree(self.folder) == before

    def edit(self, change: Callable[[str], str]) -> None:
        path = self.folder / "run.toml"
        path.write_text(change(path.read_text()))


@pytest.fixture
def node(tmp_path: Path) -> NodePlace:
    operator = Identity.generate()
    listed: dict[str, Any] = {}
    for role in ("seed", "authority", "trainer"):
        identity = Identity.generate()
        identity.save(tmp_path / f"{role}.key")
        listed[role] = (NodeRef(peer_id=identity.peer_id, addrs=("/ip4/127.0.0.1/tcp/9",)),)
    model, training = demo((1, 1), 10)
    manifest = Manifest(
        run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
        seeds=listed["seed"], authorities=listed["authority"], trainers=listed["trainer"],
        model=model, training=training, admission=Admission(),
    ).signed(operator)  # fmt: skip
    run.save(manifest, tmp_path / "run.toml")
    (tmp_path / "accounts.toml").write_text("")
    return NodePlace(tmp_path, manifest, operator)


@pytest.mark.catalogue(1)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[node\n", "the configuration agorad.toml is not valid TOML"),
        (b"\xff\xfe\0", "the configuration agorad.toml is not valid TOML: it is not text"),
        (b"", "agorad.toml: the setting 'node' is missing"),
        (b"[node]\nrole = 'seed'\n", "the setting 'node.run' is missing"),
        (b"[node]\nrole = 'king'\n", "node.role = 'king' is none of 'seed'"),
        (b"[node]\nrole = 'seed'\nrun = 'r'\nstate = 's'\nlisen = []\n", "did you mean 'listen'?"),
        (b"[nod]\n", "unknown setting 'nod'; did you mean 'node'?"),
        (b"[node]\nrole='seed'\nrun='r'\nstate='s'\nlisten=['tcp:9']\n", "'tcp:9' is not a multiaddr"),
        (b"[node]\nrole='seed'\nrun='r'\nstate='s'\nthreads=true\n", "node.threads must be a whole number"),
        (b"[node]\nrole='seed'\nrun='r'\nstate='s'\n[worker]\nslots=0\n", "worker.slots = 0 must be between"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "agorad.toml").write_bytes(text)
    (tmp_path / "tmp").mkdir()
    before = tree(tmp_path)
    refused(call("agorad.main", "--config", "agorad.toml", cwd=tmp_path), "agorad", words)
    assert tree(tmp_path) == before


@pytest.mark.catalogue(1)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config", "none.toml"), "cannot read the configuration none.toml: No such file"),
        (("--config", "."), "cannot read the configuration .: Is a directory"),
        (("--config", ""), "the path is empty"),
        (("--confi", "agorad.toml"), "no such option '--confi'; did you mean"),
        (("--config", "agorad.toml", "--role", "king"), "'king' is not one of 'seed'"),
        (("--config", "agorad.toml", "--set", "node.rol=seed"), "did you mean 'role'?"),
        (("--config", "agorad.toml", "--set", "worker"), "not of the form section.key=value"),
        (("--config", "agorad.toml", "--log-file", "none/x.log"), "none is no folder to write in"),
        (("surplus",), "unexpected extra argument (surplus)"),
    ],
    ids=name,
)
def test_a_command_line_that_is_none(node: NodePlace, arguments: tuple[str, ...], words: str) -> None:
    node.settings("seed")
    (node.folder / "tmp").mkdir()
    before = tree(node.folder)
    refused(call("agorad.main", *arguments, cwd=node.folder), "agorad", words)
    assert tree(node.folder) == before


def test_the_run_that_the_others_are_spoiled_copies_of_is_fine(node: NodePlace) -> None:
    for role in ("seed", "authority", "trainer", "worker"):
        node.settings(role)
        done = node.start("--check-config")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.catalogue(1)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "run.toml"),
        (lambda text: "", "run.toml: the setting 'run' is missing"),
        (lambda text: text.replace("target_batch = ", "target_batch = 1"), "was altered after"),
        (lambda text: text.replace("/tcp/9", "/tcp/10", 1), "was altered after"),
        (lambda text: text.replace('ed25519 = "', 'ed25519 = "0000'), "was altered after"),
        (lambda text: text.replace('ed25519 = "', 'ed25519 = "x'), "was altered after"),
        (lambda text: text.partition("[signature]")[0], "is not signed; run `agoractl run sign`"),
        (lambda text: text.replace("average_every", "average_evry"), "did you mean 'average_every'?"),
        (lambda text: text.replace("kv_heads = ", "kv_heads = 3"), "must divide model.heads"),
        (lambda text: text.replace('peer_id = "12D3', 'peer_id = "12E3', 1), "a peer id that is none"),
        (lambda text: text.replace("/ip4/127.0.0.1/tcp/9", "here", 1), "in the manifest is wrong"),
        (lambda text: text.replace("format = 1", "format = 2"), "this version reads format 1; update agorad"),
    ],
)
def test_a_damaged_manifest(node: NodePlace, change: Callable[[str], str], words: str) -> None:
    node.settings("seed")
    before = (node.folder / "run.toml").read_text()
    node.edit(change)
    assert (node.folder / "run.toml").read_text() != before
    node.refuses(words)


def test_another_operators_signature_is_no_signature(node: NodePlace) -> None:
    other = Identity.generate()
    info = attrs.evolve(node.manifest.run, operator=other.peer_id)
    forged = attrs.evolve(node.manifest, run=info, signature=None, content=b"").signed(other)
    text = forged.signature.ed25519 if forged.signature else ""
    assert node.manifest.signature is not None
    node.settings("seed")
    node.edit(lambda before: before.replace(node.manifest.signature.ed25519, text))  # type: ignore[union-attr]
    node.refuses("was altered after")


@pytest.mark.parametrize("key", [b"", b"junk", b"\x08\x01\x12\x40" + bytes(63), bytes(1 << 16)])
def test_a_damaged_key(node: NodePlace, key: bytes) -> None:
    node.settings("seed")
    (node.folder / "seed.key").write_bytes(key)
    node.refuses("seed.key is damaged")


def test_a_key_that_does_not_fit_itself(node: NodePlace) -> None:
    key = bytearray((node.folder / "seed.key").read_bytes())
    key[-1] ^= 1
    node.settings("seed")
    (node.folder / "seed.key").write_bytes(key)
    node.refuses("seed.key is damaged")


def test_a_key_that_the_manifest_does_not_list(node: NodePlace) -> None:
    node.settings("trainer", identity="seed")
    node.refuses("is not listed as trainer of run 't-1'; its operator has to list it")
    node.settings("trainer", identity="new")
    node.refuses("there is no key at")
    node.settings("authority", identity="trainer")
    node.refuses("is not listed as authority")


def test_a_port_in_use(node: NodePlace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        node.settings("seed", more=f'listen = ["{addr}"]')
        node.refuses(
            f"cannot listen on {addr}: Address already in use by python (process {os.getpid()}); "
            "name another address in node.listen"
        )


@pytest.mark.catalogue(42)
def test_files_that_settings_name(node: NodePlace) -> None:
    node.settings("trainer", more='[trainer]\ndata = "none.txt"')
    node.refuses("cannot read")
    (node.folder / "binary").write_bytes(b"\0" * 999)
    node.settings("trainer", more='[trainer]\ndata = "binary"')
    node.refuses("is empty or not text")
    node.settings("authority", more='[authority]\naccounts = "none.toml"')
    node.refuses("cannot read the account file")
    (node.folder / "accounts.toml").write_text("[accounts.demo]\nsecret = 3\n")
    node.settings("authority")
    node.refuses("did you mean 'secret_sha256'?")
    (node.folder / "state").write_text("")
    node.settings("seed")
    node.refuses("is not a folder")


@pytest.mark.catalogue(42)
def test_what_only_the_role_finds_out_leaves_nothing_either(node: NodePlace) -> None:
    (node.folder / "short.txt").write_text("hello")
    node.settings("trainer", more='[trainer]\ndata = "short.txt"')
    (node.folder / "tmp").mkdir()
    before = tree(node.folder)
    done = node.start()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("agorad: data: ")
    assert "Traceback" not in done.stderr
    assert tree(node.folder) == before
    assert processes_under(node.folder) == []
