"""Strangers, thieves and forgers against a running swarm: every protocol answers each of them with a word.

One small swarm of real processes; this test speaks to all of them as peers that say of themselves what they
like, since it writes their hello by hand. The authority's key, taken from the demo's folder, signs
certificates as the authority would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import run
from agorad.ask import ask
from agorad.authority.messages import PROTOCOL as JOIN
from agorad.authority.messages import Facts, Join
from agorad.outside import PROTOCOL as OUTSIDE
from agorad.run import Manifest
from p2p import hello
from p2p.averaging.lobby import Announcement
from p2p.averaging.roster import Candidate, RoundKey
from p2p.averaging.session import PROTOCOL as ROUND
from p2p.errors import P2PError, Refused
from p2p.host import Host
from p2p.identify import PING, identify, ping
from p2p.identity import Identity, PeerId
from p2p.kad import messages as kad
from p2p.kad.record import seal
from p2p.membership import Certificate, issue
from p2p.multiaddr import Multiaddr
from p2p.probe import PROTOCOL as PROBE
from p2p.selfreport import PROTOCOL as SELF
from stage import messages
from stage.donor import PROTOCOL as STATE
from stage.messages import PROTOCOL as MICROBATCH
from stage.ticket import Ticket
from tests.system.swarms import Demo, demo

ANSWER_S = 8.0
MEGABYTE = bytes(1 << 20)
EVERYBODY = {hello.PROTOCOL, kad.PROTOCOL, SELF}
POINTS = "/agora/points/1"
SERVED = {
    "seed": EVERYBODY | {PROBE, OUTSIDE},
    "trainer": EVERYBODY | {PROBE, OUTSIDE},
    "authority": EVERYBODY | {PROBE, OUTSIDE, JOIN, POINTS},
    "worker": EVERYBODY | {MICROBATCH, STATE, ROUND},
}
OPTIONS = (
    "--stages", "2", "--workers", "1", "--seconds", "3600",
    "--set", "training.eval_every=0", "--set", "model.seq=64", "--set", "training.target_batch=8",
)  # fmt: skip


@attrs.frozen
class Place:
    """The swarm as an attacker who read its folder knows it."""

    swarm: Demo
    manifest: Manifest
    authority: Identity

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return self.swarm.swarm()["nodes"]

    def certificate(self, peer: PeerId, *, by: Identity | None = None, **fields: Any) -> Certificate:
        """As the authority issues it, but for ``fields``."""
        now = time.time()
        usual: dict[str, Any] = {
            "run": self.manifest.run.id, "account": "demo", "role": "worker", "stage": 0,
            "issued": now - 60, "expires": now + 600,
        }  # fmt: skip
        return issue(by or self.authority, peer_id=peer, **(usual | fields))


@attrs.frozen
class Stranger:
    """A peer of our own making."""

    place: Place
    host: Host
    identity: Identity

    async def say_hello(self, node: dict[str, Any], certificate: bytes | None, **changes: Any) -> str:
        """Returns the node's verdict."""
        greeting = hello.Hello(
            run=self.place.manifest.run.id,
            manifest=self.place.manifest.hash,
            version=hello.VERSION,
            certificate=certificate,
            window=1 << 20,
            agent="test",
        )
        with trio.fail_after(ANSWER_S):
            async with await self.call(node, hello.PROTOCOL) as call:
                await call.send(attrs.evolve(greeting, **changes).to_wire())
                return str((await call.receive()).header["verdict"])

    async def call(self, node: dict[str, Any], protocol: str) -> Any:
        addr = Multiaddr.parse(node["addr"]).bare()
        return await self.host.call(node["peer_id"], protocol, addrs=[addr], deadline=ANSWER_S)

    async def ask(
        self, node: dict[str, Any], protocol: str, header: dict[str, Any] | None, payload: bytes = b""
    ) -> str:
        """``answered``, or the code of the refusal; anything else is raised. ``None`` says nothing at all."""
        with trio.fail_after(ANSWER_S):
            try:
                async with await self.call(node, protocol) as call:
                    if header is not None:
                        await call.send(header, payload)
                    reply = await call.receive(max_payload=1 << 20)
                    return str(reply.header.get("results", ["answered"])[0])
            except Refused as refusal:
                return refusal.code if refusal.why else f"{refusal.code} without a reason"

    def question(self, node: dict[str, Any], protocol: str) -> tuple[dict[str, Any], bytes]:
        """What a member could ask."""
        stage = node["stage"] or 0
        if protocol == STATE:
            return {"t": "want", "stage": stage}, b""
        if protocol == ROUND:
            announcement = Announcement(
                key=RoundKey(run=self.place.manifest.run.id, stage=stage, number=1 << 40),
                slice_index=0, floats=8, seconds=5.0,
                candidate=Candidate(peer=self.identity.peer_id, addrs=(), bandwidth=0.0, weight=1.0),
            )  # fmt: skip
            return announcement.header(), b""
        if protocol == kad.PROTOCOL:
            now, me = time.time(), self.identity.peer_id
            record = seal(
                self.identity, f"stage/{self.place.manifest.run.id}/{stage}", me, "poison",
                seq=int(now * 1e6), issued=now, ttl=60.0,
            )  # fmt: skip
            store = kad.StoreRecords(now=now, addrs=("/ip4/127.0.0.1/tcp/1",))
            return kad.question_header(store), kad.pack_batch([record.wire])
        if protocol == PROBE:
            me = self.identity.peer_id
            return {"t": "probe", "peer": me, "addrs": ["/ip4/127.0.0.1/tcp/1"], "bytes": 0}, b""
        if protocol == SELF:
            return {"t": "who"}, b""
        assert protocol == MICROBATCH, f"a protocol that this test does not know: {protocol}"
        model = self.place.manifest.model
        ticket = Ticket(
            run=self.place.manifest.run.id, trainer=self.identity.peer_id, kind="train",
            shard=0, position=0, ids_hash=bytes(32), weight=1.0,
        )  # fmt: skip
        request = messages.Request(
            ticket=ticket.signed_by(self.identity), clock=[], basis=0, path=[self.identity.peer_id],
            tokens=model.seq, documents=[], dtype="fp32", dtype_back="fp32", inline=True, deadline_s=5.0,
        )  # fmt: skip
        return request.to_wire(), bytes((model.seq + 1) * 4 + stage * model.seq * model.k * 4)

    async def open_words(self, node: dict[str, Any], said: str = "unknown_account") -> None:
        """What everybody may ask: identify, ping, look-ups, and to be let in."""
        connection = self.host.connections[node["peer_id"]]
        assert set((await identify(connection, deadline=ANSWER_S)).protocols) >= {PING, hello.PROTOCOL}
        assert await ping(connection, block=bytes(32), deadline=ANSWER_S) < ANSWER_S
        now = time.time()
        for look_up in (
            kad.FindNode(target=1, now=now, addrs=()),
            kad.FindValue(key="clock/x", after=None, now=now, addrs=()),
        ):
            assert await self.ask_kad(node, look_up) is not None
        if node["role"] == "authority":
            request = Join(account="nobody", secret="x", facts=Facts(clock=time.time()))
            assert await self.ask(node, JOIN, request.to_header()) == said

    async def ask_kad(self, node: dict[str, Any], question: kad.Question) -> tuple[Any, Any]:
        with trio.fail_after(ANSWER_S):
            async with await self.call(node, kad.PROTOCOL) as call:
                await call.send(kad.question_header(question))
                reply = await call.receive(max_payload=kad.MAX_PAYLOAD)
                return kad.read_answer(reply.header), kad.read_page(reply.payload)

    async def gated(self, node: dict[str, Any]) -> set[str]:
        """Protocols of a node that are for members, by what it says itself; all that it serves is known."""
        async with await self.call(node, hello.PROTOCOL) as call:
            told = await identify(call.connection, deadline=ANSWER_S)
        ours = {name for name in told.protocols if name.startswith("/agora/")}
        assert ours == SERVED[node["role"]]
        # The leaderboard is for all; how a caller looks from outside, for that caller.
        return ours - {hello.PROTOCOL, JOIN, POINTS, OUTSIDE}

    async def is_refused(self, node: dict[str, Any], code: str) -> None:
        """Every protocol, asked in every way, answers with the code."""
        for protocol in await self.gated(node):
            header, payload = self.question(node, protocol)
            ways: list[tuple[dict[str, Any] | None, bytes]] = [(header, payload)]
            if protocol != kad.PROTOCOL:  # which has to hear the question, since look-ups are for all
                ways += [({}, b""), (header, MEGABYTE)]
            if protocol not in (
                kad.PROTOCOL,
                STATE,
            ):  # a donor waits for a guest's pass: tests/net/test_ahead.py
                ways += [(None, b"")]
            for way in ways:
                got = await self.ask(node, protocol, *way)
                # What a node says of itself is for listed nodes, whoever else may be a member.
                assert got == ("not_listed" if protocol == SELF else code), (
                    f"{protocol} of {node['name']} said {got}"
                )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("refusals") / "swarm"
    with demo(folder, *OPTIONS) as swarm:
        swarm.swarm()
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 0, 60, "microbatch")
        yield Place(swarm, run.load(folder / "run.toml"), Identity.load(folder / "authority/identity.key"))


@asynccontextmanager
async def stranger(place: Place) -> AsyncIterator[Stranger]:
    identity = Identity.generate()
    host = Host(identity)
    async with host.run():
        yield Stranger(place, host, identity)


def forged(certificate: Certificate, **changes: Any) -> bytes:
    return attrs.evolve(certificate, **changes).encode()


def case(name: str, place: Place, me: Identity) -> tuple[bytes | None, dict[str, Any], str]:
    """Certificate, what else is odd about the hello, and the code that must come."""
    good = place.certificate(me.peer_id)
    now = time.time()
    stolen = (place.swarm.folder / "worker-0-0" / "certificate").read_bytes()
    trainer = Identity.load(place.swarm.folder / "trainer-0" / "identity.key")
    match name:
        case "no certificate":
            return None, {}, "no_certificate"
        case "expired":
            return (
                place.certificate(me.peer_id, expires=now - 1, issued=now - 99).encode(),
                {},
                "certificate_expired",
            )
        case "not yet valid":
            return place.certificate(me.peer_id, issued=now + 300).encode(), {}, "not_yet_valid"
        case "of another run":
            return place.certificate(me.peer_id, run="another").encode(), {}, "wrong_run"
        case "stolen":
            return stolen, {}, "wrong_key"
        case "signed by myself":
            return place.certificate(me.peer_id, by=me).encode(), {}, "unknown_authority"
        case "signed by the trainer":
            return place.certificate(me.peer_id, by=trainer).encode(), {}, "unknown_authority"
        case "signed by myself in the authority's name":
            mine = place.certificate(me.peer_id, by=me)
            return forged(mine, authority=place.authority.peer_id), {}, "bad_signature"
        case "altered":
            return forged(good, stage=1), {}, "bad_signature"
        case "prolonged":
            old = place.certificate(me.peer_id, expires=now - 1, issued=now - 99)
            return forged(old, expires=now + 99, grace_until=now + 99), {}, "bad_signature"
        case "stolen and renamed":
            return forged(Certificate.decode(stolen), peer_id=me.peer_id), {}, "bad_signature"
        case "damaged":
            return good.encode()[:-1], {}, "bad_signature"
        case "no certificate at all but bytes":
            return b"\xc0" * 1024, {}, "bad_signature"
        case "in a run of its own":
            return good.encode(), {"run": "another"}, "wrong_run"
        case "with an altered manifest":
            table = place.manifest.table()
            table["training"]["lr"] = 1.0
            return good.encode(), {"manifest": run.from_table(table).hash}, "manifest_mismatch"
        case "of a later version":
            return good.encode(), {"version": (2, 9)}, "version_mismatch"
    raise AssertionError(name)


CASES = (
    "no certificate", "expired", "not yet valid", "of another run", "stolen", "signed by myself",
    "signed by the trainer", "signed by myself in the authority's name", "altered", "prolonged",
    "stolen and renamed", "damaged", "no certificate at all but bytes", "in a run of its own",
    "with an altered manifest", "of a later version",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_who_is_no_member_is_refused_by_every_protocol(place: Place, name: str) -> None:
    async def main() -> None:
        async with stranger(place) as peer:
            certificate, oddities, code = case(name, place, peer.identity)
            for node in place.nodes:
                verdict = await peer.say_hello(node, certificate, **oddities)
                assert verdict == ("" if certificate is None else code)
                await peer.is_refused(node, code)
                # Another run is no place to join; an odd certificate is no reason not to.
                await peer.open_words(node, code if oddities else "unknown_account")

    trio.run(main)


def test_who_says_no_hello_is_a_guest(place: Place) -> None:
    async def main() -> None:
        async with stranger(place) as peer:
            for node in place.nodes:
                await peer.is_refused(node, "no_certificate")
                await peer.open_words(node)

    trio.run(main)


def test_records_of_strangers_are_nowhere(place: Place) -> None:
    async def main() -> None:
        async with stranger(place) as peer:
            for node in place.nodes:
                await peer.say_hello(node, None)
                assert (
                    await peer.ask(node, kad.PROTOCOL, *peer.question(node, kad.PROTOCOL)) == "no_certificate"
                )
            for node in place.nodes:
                for stage in range(2):
                    key = f"stage/{place.manifest.run.id}/{stage}"
                    question = kad.FindValue(key=key, after=None, now=time.time(), addrs=())
                    answer, page = await peer.ask_kad(node, question)
                    assert peer.identity.peer_id not in {contact.peer for contact in answer.nodes}
                    assert not [wire for wire, _left in page if peer.identity.peer_id.encode() in wire]

    trio.run(main)


def test_members_keep_to_their_stage_and_role(place: Place) -> None:
    """A certificate of the authority's own, but for another place than the one asked for."""
    cases = [
        # role, stage, node, protocol, answer
        ("worker", 1, "worker-0-0", STATE, "wrong_stage"),
        ("worker", 1, "worker-0-0", ROUND, "wrong_stage"),
        ("worker", 0, "worker-1-0", STATE, "wrong_stage"),
        ("worker", 0, "worker-1-0", ROUND, "wrong_stage"),
        ("worker", 0, "worker-0-0", MICROBATCH, "wrong_hop"),  # the head takes work from trainers
        ("worker", 1, "worker-0-0", MICROBATCH, "wrong_hop"),
        ("worker", 1, "worker-1-0", MICROBATCH, "wrong_hop"),
        ("worker", None, "worker-0-0", MICROBATCH, "wrong_hop"),
        ("seed", 0, "worker-0-0", MICROBATCH, "wrong_hop"),
        ("trainer", 0, "worker-0-0", STATE, "wrong_stage"),
        ("trainer", 0, "worker-0-0", ROUND, "wrong_stage"),
        ("seed", 0, "worker-1-0", MICROBATCH, "wrong_hop"),
        ("worker", 0, "worker-0-0", STATE, "answered"),  # what a member may
        ("worker", 1, "worker-1-0", STATE, "answered"),
        ("worker", 0, "worker-0-0", ROUND, "answered"),
    ]

    async def main() -> None:
        for role, stage, name, protocol, answer in cases:
            node = place.swarm.node(name)
            async with stranger(place) as peer:
                certificate = place.certificate(peer.identity.peer_id, role=role, stage=stage)
                assert await peer.say_hello(node, certificate.encode()) == ""
                got = await peer.ask(node, protocol, *peer.question(node, protocol))
                assert got == answer, f"{role} of stage {stage} at {protocol} of {name}"

    trio.run(main)


def test_a_member_stores_its_own_records_only(place: Place) -> None:
    async def main() -> None:
        async with stranger(place) as peer, stranger(place) as victim:
            for node in place.nodes:
                certificate = place.certificate(peer.identity.peer_id, stage=1)
                assert await peer.say_hello(node, certificate.encode()) == ""
                assert await peer.ask(node, kad.PROTOCOL, *victim.question(node, kad.PROTOCOL)) == "not_owner"

    trio.run(main)


def test_a_certificate_that_runs_out_is_noticed_at_the_next_stream(place: Place) -> None:
    """On connections that are greeted already; a new hello with a renewed one makes a member again."""

    async def main() -> None:
        async with stranger(place) as peer:
            me = peer.identity.peer_id
            worker = place.swarm.node("worker-0-0")
            expires = time.time() + 5.0
            for node in place.nodes:
                assert await peer.say_hello(node, place.certificate(me, expires=expires).encode()) == ""
                assert await peer.ask(node, kad.PROTOCOL, *peer.question(node, kad.PROTOCOL)) == "ok"
            assert await peer.ask(worker, STATE, *peer.question(worker, STATE)) == "answered"
            assert time.time() < expires, "too slow a machine for this test"
            connections = dict(peer.host.connections)
            await trio.sleep(expires - time.time() + 0.05)
            for node in place.nodes:
                await peer.is_refused(node, "certificate_expired")
                await peer.open_words(node)
            assert peer.host.connections == connections
            for node in place.nodes:
                assert await peer.say_hello(node, place.certificate(me).encode()) == ""
            assert await peer.ask(worker, STATE, *peer.question(worker, STATE)) == "answered"
            for node in place.nodes:  # and whoever says something worse later is what it said last
                other = {"manifest": bytes(32)}
                verdict = await peer.say_hello(node, place.certificate(me).encode(), **other)
                assert verdict == "manifest_mismatch"
                await peer.is_refused(node, "manifest_mismatch")
            assert peer.host.connections == connections

    trio.run(main)


def test_a_forged_ticket_is_no_work(place: Place) -> None:
    """A member of the stage before whose ticket no trainer signed: it is dropped, nothing is added."""

    async def main() -> None:
        async with stranger(place) as peer:
            node = place.swarm.node("worker-1-0")
            await peer.say_hello(node, place.certificate(peer.identity.peer_id).encode())
            header, payload = peer.question(node, MICROBATCH)
            with trio.fail_after(ANSWER_S):
                async with await peer.call(node, MICROBATCH) as call:
                    await call.send(header, payload)
                    try:  # it has to see the ids before it can judge the ticket
                        assert (await call.receive()).header["t"] == "accepted"
                    except P2PError:
                        return
                    with pytest.raises(P2PError):
                        await call.receive(max_payload=1 << 20)

    trio.run(main)
    added = [event for event in place.swarm.events("worker-1-0") if event["event"] == "microbatch_added"]
    issued = {
        event["ticket"] for event in place.swarm.events("trainer-0") if event["event"] == "microbatch_issued"
    }
    assert {event["ticket"] for event in added} <= issued


def test_a_worker_with_a_wrong_secret_ends_with_11(place: Place, tmp_path: Path) -> None:
    settings = tomllib.loads((place.swarm.folder / "worker-0-0" / "agorad.toml").read_text())
    (tmp_path / "secret").write_text("guess\n")
    (tmp_path / "agorad.toml").write_text(
        f'[node]\nrole = "worker"\nstate = "state"\nrun = "{place.swarm.folder}/run.toml"\n'
        f'listen = ["/ip4/127.0.0.1/tcp/0"]\n'
        f'[worker]\naccount = "{settings["worker"]["account"]}"\nsecret_file = "secret"\nstage = 0\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "agorad.main", "--config", "agorad.toml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 11
    last = done.stderr.splitlines()[-1]
    assert last.startswith("agorad: the authority refused: the secret is not the one of account 'demo'; copy")
    assert last.endswith("(wrong_secret)")
    assert "Traceback" not in done.stderr


def test_after_all_that_the_swarm_trains_to_its_end(place: Place) -> None:
    """Nobody died, nobody was disturbed, and nothing was lost."""
    swarm = place.swarm
    done = swarm.count("trainer-0", "microbatch_completed")
    swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > done + 8, 60, "more work")
    for node in place.nodes:
        os.kill(node["pid"], 0)
        assert swarm.count(node["name"], "handler_failed") == 0
        assert swarm.count(node["name"], "peer_refused") > 0
    ask(Path(swarm.node("trainer-0")["control"]), "leave")
    report = swarm.finish()
    work = report["microbatches"]
    assert (work["lost"], work["failed"], work["rerouted"]) == (0, 0, 0)
    assert work["issued"] == work["completed"] > done
    assert set(report["exit"].values()) == {0}
    assert {replica["phase"] for stage in report["stages"] for replica in stage["replicas"]} == {"active"}
