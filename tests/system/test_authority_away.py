"""The run's only authority is killed and stays away for longer than certificates last; then it comes back.

A real swarm of processes. Meanwhile training goes on and nobody is refused; afterwards every certificate is
renewed without its holder having been out for a moment. Whoever shows a certificate whose grace is over is
refused; in the long version that is one of a worker that was given little grace, and that ends by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import run
from p2p.errors import Refused
from p2p.host import Host
from p2p.identity import Identity
from p2p.membership import Certificate, Membership, issue
from p2p.multiaddr import Multiaddr
from stage.messages import PROTOCOL
from tests.system.swarms import Demo, demo

LIGHT = (
    "--set", "model.seq=32", "--set", "training.target_batch=8", "--set", "trainer.credits=1",
    "--set", "admission.max_nodes_per_account=9",
)  # fmt: skip
SHORT = "worker-0-short"


@attrs.frozen(kw_only=True)
class Times:
    """Seconds."""

    life: float
    away: float
    grace: float
    short_grace: float
    settle: float
    """For all to have renewed once the authority is back: they ask every 45 s at least."""
    workers: int
    stages: int
    short_worker: bool
    """Whether a worker with short grace takes part, or only its certificate."""


SCALED = Times(
    life=3.0, away=4.0, grace=120.0, short_grace=1.0, settle=60.0, workers=1, stages=1, short_worker=False
)
TRUE = Times(
    life=300.0,
    away=1200.0,
    grace=1500.0,
    short_grace=60.0,
    settle=90.0,
    workers=2,
    stages=2,
    short_worker=True,
)


@attrs.define
class Tail:
    """A node's events, each read once: in half an hour there are many."""

    path: Path
    offset: int = 0
    kept: list[dict[str, Any]] = attrs.field(factory=list)
    """All but those of the work itself."""
    done: int = 0
    """Microbatches that a trainer completed."""
    step: int = 0

    def read(self) -> Tail:
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.offset += len(whole)
            for line in whole.splitlines():
                event = json.loads(line)
                name = event["event"]
                self.done += name == "microbatch_completed"
                if name == "step":
                    self.step = max(self.step, event["step"])
                if name not in ("microbatch_completed", "microbatch_added", "traffic"):
                    self.kept.append(event)
        return self

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.read().kept if event["event"] == name]


def reload(swarm: Demo, life: float, grace: float) -> None:
    """Change the authority's settings as an operator does: the file, then SIGHUP."""
    node = swarm.node("authority")
    path = Path(node["config"])
    text = path.read_text()
    for name, value in (("lifetime_s", life), ("grace_s", grace)):
        text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
    path.write_text(text)
    before = swarm.count("authority", "reloaded")
    os.kill(node["pid"], signal.SIGHUP)
    swarm.wait_for(lambda: swarm.count("authority", "reloaded") > before, 20, "new settings")
    assert [e for e in swarm.events("authority") if e["event"] == "reloaded"][-1]["ok"]


def another(swarm: Demo, like: str, name: str) -> subprocess.Popen[bytes]:
    """Start one more worker, set up as ``like`` is."""
    folder = swarm.folder / name
    folder.mkdir()
    text = Path(swarm.node(like)["config"]).read_text()
    text = re.sub(r"(?m)^listen = (\[[^]]*\])$", 'listen = ["/ip4/127.0.0.1/tcp/0"]', text)
    (folder / "agorad.toml").write_text(text.replace(f'"{like}"', f'"{name}"'))
    with (folder / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "agorad.main", "--config", str(folder / "agorad.toml")],
            stdout=out, stderr=out,
        )  # fmt: skip


def shown(swarm: Demo, folder: Path, to: str) -> str:
    """What a member says to who shows the certificate that lies in a node's folder: a refusal's code."""
    manifest = run.load(Path(swarm.swarm()["manifest"]))
    certificate = Certificate.decode((folder / "certificate").read_bytes())
    member = swarm.node(to)

    async def ask() -> str:
        host = Host(Identity.load(folder / "identity.key"))
        host.membership = Membership(manifest.trust(), certificate.encode, time.time)
        host.learn(member["peer_id"], [Multiaddr.parse(member["addr"].rpartition("/p2p/")[0])])
        with trio.fail_after(30):
            async with host.run([]):
                try:
                    async with await host.call(member["peer_id"], PROTOCOL, deadline=10.0) as call:
                        await call.send({})
                        await call.receive()
                except Refused as refusal:
                    return refusal.code
        return "heard"

    return trio.run(ask)


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(SCALED, id="scaled"),
        pytest.param(TRUE, id="true", marks=[pytest.mark.long, pytest.mark.timeout(3000)]),
    ],
)
def test_training_goes_on_without_the_authority_and_certificates_after_it(
    tmp_path: Path, times: Times
) -> None:
    folder = tmp_path / "swarm"
    options = (
        "--stages", str(times.stages), "--workers", str(times.workers), "--seconds", "7200",
        "--set", f"authority.lifetime_s={times.life}", "--set", f"authority.grace_s={times.grace}", *LIGHT,
    )  # fmt: skip
    with demo(folder, *options) as swarm:
        workers = [node["name"] for node in swarm.nodes if node["role"] == "worker"]
        tails = {name: Tail(folder / name / "events.jsonl") for name in [*workers, "trainer-0", SHORT]}
        trainer = tails["trainer-0"]
        swarm.wait_for(lambda: trainer.read().done > 5, 240, "first work")

        (folder / "shown").mkdir()
        if not times.short_worker:
            _short_certificate(folder, times)
            _away(swarm, times, tails, workers, None)
            return
        reload(swarm, times.life, times.short_grace)
        short = another(swarm, workers[0], SHORT)
        try:
            swarm.wait_for(lambda: bool(tails[SHORT].of("certificate_granted")), 240, "the short certificate")
            short.send_signal(signal.SIGSTOP)  # it must not renew with the others' grace
            reload(swarm, times.life, times.grace)
            for name in workers:  # who renewed with little grace meanwhile does so again
                kept = folder / name / "certificate"
                swarm.wait_for(
                    lambda kept=kept: _grace(kept) > times.short_grace, times.life, "a long certificate"
                )
            for name in ("certificate", "identity.key"):
                shutil.copy(folder / SHORT / name, folder / "shown" / name)
            assert _grace(folder / "shown" / "certificate") == times.short_grace
            _away(swarm, times, tails, workers, short)
        finally:
            short.kill()
            short.wait()


def _short_certificate(folder: Path, times: Times) -> None:
    """What a member with little grace would hold."""
    member, now = Identity.generate(), time.time()
    certificate = issue(
        Identity.load(folder / "authority" / "identity.key"),
        run=run.load(folder / "run.toml").run.id, account="demo", peer_id=member.peer_id, stage=0,
        issued=now, expires=now + times.life, grace_until=now + times.life + times.short_grace,
    )  # fmt: skip
    (folder / "shown" / "certificate").write_bytes(certificate.encode())
    member.save(folder / "shown" / "identity.key")


def _grace(path: Path) -> float:
    certificate = Certificate.decode(path.read_bytes())
    return certificate.grace_until - certificate.expires


def _away(
    swarm: Demo,
    times: Times,
    tails: dict[str, Tail],
    workers: list[str],
    short: subprocess.Popen[bytes] | None,
) -> None:
    folder, trainer, first = swarm.folder, tails["trainer-0"], tails[workers[0]]
    gone_at = swarm.kill("authority")
    done, step = trainer.read().done, first.read().step
    if short is not None:
        short.send_signal(signal.SIGCONT)
    print(f"the authority is away at {done} microbatches, step {step}", flush=True)

    # Whose grace is over is out, while the others are believed.
    if short is not None:
        assert short.wait(times.life + times.short_grace + 60) == 13
        ended_s = time.time() - gone_at
        assert ended_s < times.away, "it ended too late to tell"
        print(f"who had {times.short_grace:g} s of grace has ended after {ended_s:.1f} s", flush=True)
    swarm.wait_for(lambda: time.time() > _last(folder / "shown"), times.away, "the end of its grace")
    assert shown(swarm, folder / "shown", workers[0]) == "certificate_expired"

    swarm.wait_for(lambda: time.time() - gone_at >= times.away, times.away + 60, "the authority's return")
    assert all(time.time() > _expires(folder / name / "certificate") for name in workers)
    worked, stepped = trainer.read().done - done, first.read().step - step
    print(f"after {time.time() - gone_at:.1f} s without it: {worked} more microbatches, {stepped} more steps")
    assert worked > 0
    assert stepped > 0

    back = swarm.restart("authority")
    back_at = time.time()
    for name in workers:
        granted = lambda name=name: [e for e in tails[name].of("certificate_granted") if e["at"] > back_at]  # noqa: E731
        swarm.wait_for(lambda granted=granted: bool(granted()), times.settle, f"{name}'s certificate")
        print(
            f"{name} has a new certificate {granted()[0]['at'] - back_at:.1f} s after the return", flush=True
        )
    assert shown(swarm, folder / "shown", workers[0]) == "certificate_expired"
    done = trainer.read().done
    swarm.wait_for(lambda: trainer.read().done > done + 3, 60, "work with the authority back")
    os.kill(swarm.node("trainer-0")["pid"], signal.SIGTERM)
    report = swarm.finish(120)
    back.wait(60)

    other = Identity.load(folder / "shown" / "identity.key").peer_id
    for name in [*workers, "trainer-0"]:
        refusals = [event for event in tails[name].of("peer_refused") if event["peer"] != other]
        assert refusals == [], name
        phases = [event["to"] for event in tails[name].of("phase")]
        assert phases.count("active") <= 1, f"{name} was out: {phases}"
        assert len(tails[name].of("started")) == 1
    counts = report["microbatches"]
    print(counts, flush=True)
    assert counts["lost"] == 0
    assert counts["failed"] == 0


def _last(folder: Path) -> float:
    return Certificate.decode((folder / "certificate").read_bytes()).grace_until


def _expires(path: Path) -> float:
    return Certificate.decode(path.read_bytes()).expires
