"""Faults to plant into a patient, each with what is to be found: where, how bad, and words of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from agorad import state_dirs
from p2p.identity import Identity
from p2p.membership import issue
from stage.state import SnapshotManifest
from tests.unit.patients import Place


def _text(relative: str, text: str) -> Callable[[Place], None]:
    return lambda place: (place.folder / relative).write_text(text) and None


def _settings(**settings: Any) -> Callable[[Place], None]:
    return lambda place: place.set(**settings)


def _rules(**rules: Any) -> Callable[[Place], None]:
    return lambda place: place.sign(**rules)


def _altered(place: Place) -> None:
    path = place.folder / "run.toml"
    path.write_text(path.read_text().replace("max_nodes = 1000", "max_nodes = 1001"))


def _unsigned(place: Place) -> None:
    path = place.folder / "run.toml"
    path.write_text(path.read_text().partition("[signature]")[0])


def _another_operator(place: Place) -> None:
    """A stranger makes a run of the same name; the node was in the real one before."""
    document = {"content": place.manifest.content.decode(), "signature": "", "known": []}
    (place.node / "manifest.json").write_text(json.dumps(document))
    stranger = Identity.generate()
    info = attrs.evolve(place.manifest.run, operator=stranger.peer_id)
    place.write(attrs.evolve(place.manifest, run=info), stranger)


def _state_of_another_run(place: Place) -> None:
    other = attrs.evolve(place.manifest, run=attrs.evolve(place.manifest.run, id="other-2"), content=b"")
    document = {"content": other.content.decode(), "signature": "", "known": []}
    (place.node / "manifest.json").write_text(json.dumps(document))


def _key_for_all(place: Place) -> None:
    (place.node / "identity.key").chmod(0o644)


def _key_unreadable(place: Place) -> None:
    (place.node / "identity.key").unlink()
    (place.node / "identity.key").mkdir()


def _role(role: str, **sections: Any) -> Callable[[Place], None]:
    def plant(place: Place) -> None:
        place.role = role
        place.set(**sections)

    return plant


def _no_trainer_key(place: Place) -> None:
    _role("trainer")(place)
    (place.node / "identity.key").unlink()


def _data_gone(place: Place) -> None:
    _role("trainer", trainer={"data": "no-such-folder"})(place)


def _accounts_gone(place: Place) -> None:
    _role("authority", authority={"accounts": "none.toml"})(place)


def _certificate(**changes: Any) -> Callable[[Place], None]:
    def plant(place: Place) -> None:
        now = time.time()
        fields: dict[str, Any] = {
            "run": "t-1", "account": "a", "peer_id": place.keys["worker"].peer_id, "stage": 0,
            "issued": now - 7200, "expires": now + 60, "grace_until": now + 120,
        }  # fmt: skip
        given = {name: value(now) if callable(value) else value for name, value in changes.items()}
        by = place.keys[given.pop("by", "authority")]
        (place.node / "certificate").write_bytes(issue(by, **{**fields, **given}).encode())

    return plant


def _forged(place: Place) -> None:
    _certificate()(place)
    path = place.node / "certificate"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _pipe(relative: str, **settings: Any) -> Callable[[Place], None]:
    """A pipe in the place of a file: who opens it as one waits for ever."""

    def plant(place: Place) -> None:
        if settings:
            place.set(**settings)
        path = place.folder / relative
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)

    return plant


def _key_of_a_seed(place: Place) -> None:
    (place.node / "identity.key").unlink()
    place.keys["seed"].save(place.node / "identity.key")


def _key_elsewhere(place: Place) -> None:
    (place.node / "identity.key").unlink()
    (place.node / "identity.key").symlink_to("/nowhere/identity.key")


def _metrics_taken(place: Place) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    place.opened.append(taken)
    place.set(metrics={"listen": f"127.0.0.1:{taken.getsockname()[1]}"}, **PUBLIC)


def _page_elsewhere(place: Place) -> None:
    place.keys["authority"].save(place.node / "authority.key")
    page = {"page_listen": "203.0.113.9:4180"}
    _role("authority", identity="authority.key", authority=page, **PUBLIC)(place)


def _database(write: Callable[[Path], Any], **authority: str) -> Callable[[Place], None]:
    """An authority, listed, with this for a database."""

    def plant(place: Place) -> None:
        (place.node / "identity.key").unlink()
        place.keys["authority"].save(place.node / "identity.key")
        (place.node / "accounts.toml").write_text("")
        write(place.node / "authority.sqlite")
        _role("authority", authority=authority)(place)

    return plant


def _half_a_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE t (x TEXT)")
        made.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 100)
        made.commit()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)


def state_of_another_user(place: Place) -> None:
    (place.node / "events.jsonl").write_text("")
    os.chown(place.node / "events.jsonl", 12345, -1)


def _signed_tomorrow(place: Place) -> None:
    place.write(attrs.evolve(place.manifest, run=attrs.evolve(place.manifest.run, created=time.time() + 1e5)))


def _held_key(place: Place) -> None:
    """As a daemon does whose socket is elsewhere."""
    held = os.fdopen(state_dirs.claim(place.node / "identity.key"), "rb")
    place.opened.append(held)


def _snapshot(place: Place, data: bytes, written: bytes) -> None:
    floats = len(data) // 12
    told = SnapshotManifest(4, 4, "f", floats, (hashlib.sha256(data).digest(),))
    folder = place.node / "snapshots"
    folder.mkdir()
    (folder / "00000001-step-4.manifest").write_bytes(told.encode())
    (folder / "00000001-step-4.state").write_bytes(written)


def _loose_secret(place: Place) -> None:
    (place.node / "secret").write_text("s3cret")
    (place.node / "secret").chmod(0o644)
    place.set(worker={"secret_file": "secret"})


def _settings_for_all(place: Place) -> None:
    (place.node / "agorad.toml").chmod(0o666)


def _empty_secret(place: Place) -> None:
    (place.node / "secret").touch(0o600)
    place.set(worker={"secret_file": "secret"})


def _another_announced(place: Place) -> None:
    place.set(announce=[f"/ip4/8.8.8.8/tcp/49200/p2p/{place.keys['seed'].peer_id}"])


def _written_tomorrow(place: Place) -> None:
    entry = {"id": 1, "at": time.time() + 1e5, "event": "started"}
    (place.node / "events.jsonl").write_text(json.dumps(entry) + "\n")


def _log_is_a_folder(place: Place) -> None:
    (place.node / "agorad.log").mkdir()
    place.set(log="agorad.log")


def _port_in_use(place: Place) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    place.opened.append(taken)
    place.set(listen=[f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"])


def _stale_socket(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place.node / "c.sock"))


def _in_the_way(place: Place) -> None:
    (place.node / "c.sock").write_text("not a socket")


def _events(*entries: dict[str, Any]) -> Callable[[Place], None]:
    def plant(place: Place) -> None:
        lines = [json.dumps({"id": at, "at": time.time() - 60, **entry}) for at, entry in enumerate(entries)]
        (place.node / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))

    return plant


def frozen(place: Place) -> None:
    """Somebody listens and never answers, like a stopped process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place.node / "c.sock"))
    listener.listen()
    place.opened.append(listener)


PUBLIC = {"announce": ["/ip4/8.8.8.8/tcp/49200"]}
FAULTS: dict[str, tuple[Callable[[Place], None], str, str, str]] = {
    "unknown setting": (_settings(nmae="x"), "settings", "fail", "did you mean 'name'"),
    "not TOML": (_text("node/agorad.toml", "[node"), "settings", "fail", "not valid TOML"),
    "no settings": (lambda p: (p.node / "agorad.toml").unlink(), "settings", "fail", "cannot read"),
    "settings for all": (_settings_for_all, "settings mode", "fail", "everybody"),
    "no manifest": (lambda p: (p.folder / "run.toml").unlink(), "manifest", "fail", "cannot read"),
    "altered manifest": (_altered, "manifest", "fail", "was altered after"),
    "unsigned manifest": (_unsigned, "manifest", "fail", "is not signed"),
    "another operator": (_another_operator, "operator", "fail", "in force until now was by"),
    "state of another run": (_state_of_another_run, "state of a run", "fail", "other-2"),
    "key mode": (_key_for_all, "key", "fail", "0644"),
    "damaged key": (_text("node/identity.key", "junk"), "key", "fail", "damaged"),
    "unreadable key": (_key_unreadable, "key", "fail", "cannot read the key file"),
    "key not listed": (_role("trainer"), "listed", "fail", "lists no trainer with this key"),
    "no key": (_no_trainer_key, "key", "fail", "there is none"),
    "data gone": (_data_gone, "data", "fail", "no-such-folder"),
    "accounts gone": (_accounts_gone, "accounts", "fail", "none.toml"),
    "expired certificate": (_certificate(expires=lambda now: now - 5), "certificate", "warn", "expired"),
    "certificate of another key": (
        lambda p: _certificate(peer_id=p.keys["seed"].peer_id)(p), "certificate", "warn", "another key",
    ),
    "certificate of another run": (_certificate(run="t-2"), "certificate", "warn", "run t-2"),
    "certificate of tomorrow": (
        _certificate(issued=lambda now: now + 86400), "certificate", "warn", "begins in",
    ),
    "certificate of another role": (_certificate(role="trainer"), "certificate", "warn", "for a trainer"),
    "certificate of no stage": (_certificate(stage=7), "certificate", "warn", "the run has 2 stages"),
    "forged certificate": (_forged, "certificate", "warn", "signature does not hold"),
    "certificate by a stranger": (_certificate(by="seed"), "certificate", "warn", "none of this run's"),
    "damaged certificate": (_text("node/certificate", "junk"), "certificate", "warn", "cannot be read"),
    "key of a seed": (_key_of_a_seed, "key of another", "fail", "as the run's seed"),
    "link to no key": (_key_elsewhere, "key", "fail", "points to /nowhere"),
    "key in use": (_held_key, "key in use", "fail", f"process {os.getpid()} runs with"),
    "pipe for a key": (_pipe("node/identity.key"), "key", "fail", "a pipe"),
    "pipe for settings": (_pipe("node/agorad.toml"), "settings", "fail", "a pipe"),
    "pipe for a manifest": (_pipe("run.toml"), "manifest", "fail", "a pipe"),
    "pipe for a secret": (
        _pipe("node/secret", worker={"secret_file": "secret"}),
        "secret", "fail", "a pipe",
    ),
    "empty secret": (_empty_secret, "secret", "fail", "does not hold"),
    "seed not listed": (_role("seed"), "listed", "warn", "lists no seed"),
    "no such stage": (_settings(worker={"stage": 9}), "stage", "fail", "stages 0 to 1"),
    "no place for a socket": (_settings(control="no/folder/c.sock"), "start", "fail", "node.control"),
    "no token": (
        _settings(metrics={"push": "https://x.example/", "push_token_file": "no"}),
        "push token", "warn", "cannot read metrics.push_token_file",
    ),
    "folder for events": (lambda p: (p.node / "events.jsonl").mkdir(), "state", "fail", "is no file"),
    "file for snapshots": (_text("node/snapshots", ""), "state", "fail", "is no folder"),
    "signed tomorrow": (_signed_tomorrow, "clock", "fail", "the manifest is from 27h"),
    "written tomorrow": (_written_tomorrow, "clock", "fail", "last event is from"),
    "metrics taken": (_metrics_taken, "metrics", "warn", "the port is taken by"),
    "metrics for all": (_settings(metrics={"listen": "0.0.0.0:0"}), "metrics", "warn", "others can read"),
    "page elsewhere": (_page_elsewhere, "page", "fail", "Cannot assign"),
    "no TCP": (_settings(listen=["/ip4/127.0.0.1/udp/4001"]), "port", "fail", "no TCP address"),
    "port 0 announced": (_settings(announce=["/ip4/8.8.8.8/tcp/0"]), "announce", "fail", "with a port"),
    "everywhere announced": (
        _settings(announce=["/ip4/0.0.0.0/tcp/1"]), "address", "fail", "no address of one",
    ),
    "another announced": (_another_announced, "announce", "fail", "another peer's"),
    "unknown name announced": (
        _settings(announce=["/dns4/no-such-host.invalid/tcp/1"]), "announce", "fail", "cannot be resolved",
    ),
    "no database": (_database(lambda p: p.write_text("text, not SQLite")), "database", "fail", "no SQLite"),
    "damaged database": (_database(_half_a_database), "database", "fail", "is damaged"),
    "no database server": (
        _database(lambda _: None, database="postgresql://u:geheim@127.0.0.1:1/x"),
        "database", "fail", "x at 127",
    ),
    "no secret": (_settings(worker={"secret_file": "gone"}), "secret", "fail", "secret_file"),
    "loose secret": (_loose_secret, "secret", "warn", "other users"),
    "read-only state": (_settings(state="/sys/agora"), "state folder", "fail", "cannot write in /sys"),
    "open state": (lambda p: p.node.chmod(0o755), "state folder", "warn", "other users"),
    "small disk": (_rules(min_disk_gib=1e6), "disk", "fail", "admission.min_disk_gib"),
    "little memory": (_rules(min_ram_gib=1e5), "memory", "fail", "admission.min_ram_gib"),
    "old software": (_rules(min_version="99.0"), "agorad", "fail", "99.0"),
    "no GPU": (_settings(device="cuda", **PUBLIC), "GPU", "fail", "nvidia-smi shows no GPU 0"),
    "damaged snapshot": (
        lambda p: _snapshot(p, bytes(1200), bytes(1199) + b"x"), "snapshots", "fail", "damaged at byte 0",
    ),
    "cut snapshot": (lambda p: _snapshot(p, bytes(1200), bytes(600)), "snapshots", "fail", "instead of"),
    "log": (_log_is_a_folder, "log", "fail", "cannot write the log"),
    "port in use": (_port_in_use, "port", "fail", "is taken by"),
    "foreign address": (_settings(listen=["/ip4/203.0.113.1/tcp/4009"]), "port", "fail", "cannot listen"),
    "bad address": (_settings(listen=["127.0.0.1:4001"]), "address", "fail", "node.listen"),
    "private announced": (_settings(announce=["/ip4/192.168.1.5/tcp/49200"]), "address", "fail", "private"),
    "loopback only": (_settings(), "address", "warn", "loopback"),
    "IPv6 only": (_settings(announce=["/ip6/2a00::1/tcp/1"]), "address family", "warn", "IPv6"),
    "stale socket": (_stale_socket, "control socket", "warn", "was left by a daemon"),
    "socket in the way": (_in_the_way, "control socket", "fail", "no socket"),
    "frozen daemon": (frozen, "daemon", "fail", "does not answer"),
    "never ran": (lambda p: None, "daemon", "fail", "has never run"),
    "refused before": (
        _events({"event": "started"}, {"event": "stopped", "code": 11, "why": "the authority refused: no"}),
        "daemon", "fail", "code 11: the authority refused: no",
    ),
    "killed before": (
        _events({"event": "started"}, {"event": "phase", "to": "active"}, {"event": "step", "step": 7}),
        "daemon", "fail", "without a goodbye",
    ),
}  # fmt: skip
