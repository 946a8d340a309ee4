"""Who may speak: every way not to be a member is a typed refusal on every gated protocol."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from p2p import hello
from p2p.errors import Refused, RemoteError
from p2p.event import Event
from p2p.hello import Hello
from p2p.host import Host
from p2p.host_events import PeerRefused
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.membership import Member, Membership, Trust, issue
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
AUTHORITY = Identity.generate(b"a" * 32)
RUN = "test-run"
HASH = b"\7" * 32
TRUST = Trust(run=RUN, manifest_hash=HASH, authorities=frozenset([AUTHORITY.peer_id]))


def certificate(
    peer: PeerId, *, authority: Identity = AUTHORITY, run: str = RUN, valid_s: float = 60.0
) -> bytes:
    now = time.time()
    return issue(
        authority, run=run, account="ann", peer_id=peer, stage=1, issued=now - 100, expires=now + valid_s
    ).encode()


class Node:
    """A host with a membership that tests change."""

    def __init__(
        self, trust: Trust = TRUST, identity: Identity | None = None, limits: Limits = Limits()
    ) -> None:
        self.identity = identity or Identity.generate()
        self.events: list[Event] = []
        self.host = Host(self.identity, emit=self.events.append, limits=limits)
        self.certificate: bytes | None = None
        self.now: Callable[[], float] = time.time
        self.host.membership = Membership(trust, lambda: self.certificate, lambda: self.now())
        self.members: list[Member | None] = []
        for protocol in ("/agora/gated/1", "/agora/also-gated/1"):
            self.host.handle(protocol, self._serve)
        self.host.handle("/agora/open/1", self._serve, open_to_all=True)

    async def _serve(self, call: Call) -> None:
        await call.receive()
        self.members.append(call.member)
        await call.send({"t": "ok"})

    async def ask(self, other: Node, protocol: str = "/agora/gated/1", payload: bytes = b"") -> None:
        call = await self.host.call(other.host.peer_id, protocol, addrs=other.host.addrs, deadline=5)
        async with call:
            await call.send({}, payload)
            await call.receive()


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def live(node: Node, task_status: trio.TaskStatus[None]) -> None:
                async with node.host.run([LOCAL]):
                    task_status.started()
                    await done.wait()

            for node in nodes:
                await nursery.start(live, node)
            yield
            done.set()


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main)


def test_members_speak_and_are_known() -> None:
    async def main() -> None:
        one, two = Node(), Node()
        for node in (one, two):
            node.certificate = certificate(node.identity.peer_id)
        async with running(one, two):
            await one.ask(two)
            (member,) = two.members
            assert member is not None
            assert (member.role, member.stage, member.account) == ("worker", 1, "ann")
            await two.ask(one)  # the same connection the other way
            assert len(one.host.connections) == 1

    run(main)


OTHER = Identity.generate(b"b" * 32)


def presented(case: str, peer: PeerId) -> bytes | None:
    match case:
        case "no_certificate":
            return None
        case "certificate_expired":
            return certificate(peer, valid_s=-1)
        case "wrong_run":
            return certificate(peer, run="another-run")
        case "wrong_key":
            return certificate(OTHER.peer_id)
        case "unknown_authority":
            return certificate(peer, authority=OTHER)
        case "bad_signature":
            good = bytearray(certificate(peer))
            good[-1] ^= 1
            return bytes(good)
    raise AssertionError(case)


CASES = [
    "no_certificate",
    "certificate_expired",
    "wrong_run",
    "wrong_key",
    "unknown_authority",
    "bad_signature",
]


@pytest.mark.parametrize("size", [0, 5_000_000])
@pytest.mark.parametrize("case", CASES)
def test_no_member_is_told_why_on_every_gated_protocol(case: str, size: int) -> None:
    async def main() -> None:
        one, two = Node(), Node()
        one.certificate = presented(case, one.identity.peer_id)
        two.certificate = certificate(two.identity.peer_id)
        async with running(one, two):
            for protocol in ("/agora/gated/1", "/agora/also-gated/1"):
                with pytest.raises(Refused) as caught:
                    await one.ask(two, protocol, bytes(size))
                assert caught.value.code == case
                assert caught.value.why
            await one.ask(two, "/agora/open/1")  # on the same connection, which lives on
            assert two.members == [None]
            refused = [event for event in two.events if isinstance(event, PeerRefused)]
            assert [event.why for event in refused] == [case, case]
            assert len(two.host.connections) == 1
            # the refusal is the caller's, not the connection's: the member may still call the guest
            await two.ask(one)

    run(main)


@pytest.mark.parametrize(
    ("trust", "code"),
    [
        (attrs.evolve(TRUST, manifest_hash=b"\6" * 32), "manifest_mismatch"),
        (attrs.evolve(TRUST, run="another-run"), "wrong_run"),
    ],
)
def test_another_run_or_manifest(trust: Trust, code: str) -> None:
    async def main() -> None:
        one, two = Node(trust), Node()
        for node in (one, two):
            node.certificate = certificate(node.identity.peer_id)
        async with running(one, two):
            with pytest.raises(Refused) as caught:
                await one.ask(two)
            assert caught.value.code == code
            with pytest.raises(Refused) as caught:
                await two.ask(one)
            assert caught.value.code == code

    run(main)


def test_versions_of_one_manifest_that_are_known_speak_to_each_other() -> None:
    newer = attrs.evolve(TRUST, manifest_hash=b"\6" * 32)

    async def main() -> None:
        heard: list[str] = []
        one = Node(attrs.evolve(newer, known=(HASH,)))
        two = Node(attrs.evolve(TRUST, heard_other=lambda: heard.append("other")))
        for node in (one, two):
            node.certificate = certificate(node.identity.peer_id)
        async with running(one, two):
            await two.ask(one)  # the newer one knows the older
            with pytest.raises(Refused) as caught:
                await one.ask(two)
            assert caught.value.code == "manifest_mismatch"
            assert heard
            two.host.membership.trust.renew(newer, time.time(), 30.0)
            await one.ask(two)  # on the same connection, without another hello
            await two.ask(one)

    run(main)


def test_an_authority_may_be_ahead_of_all_others() -> None:
    ahead = attrs.evolve(TRUST, manifest_hash=b"\6" * 32, known=(HASH,))

    async def main() -> None:
        heard: list[str] = []
        one = Node(ahead, AUTHORITY)
        standing = {AUTHORITY.peer_id: "authority"}
        two = Node(attrs.evolve(TRUST, standing=standing, heard_other=lambda: heard.append("other")))
        async with running(one, two):
            await one.ask(two)
            assert heard

    run(main)


def test_who_is_listed_no_longer_is_no_member_on_old_connections_either() -> None:
    async def main() -> None:
        one = Node(attrs.evolve(TRUST))
        two = Node(attrs.evolve(TRUST, standing={one.identity.peer_id: "seed"}))
        two.certificate = certificate(two.identity.peer_id)
        async with running(one, two):
            await one.ask(two)
            two.host.membership.trust.renew(attrs.evolve(TRUST, manifest_hash=b"\6" * 32), time.time(), 30.0)
            with pytest.raises(Refused) as caught:
                await one.ask(two)
            assert caught.value.code == "no_certificate"

    run(main)


def test_certificate_that_runs_out_is_noticed_at_the_next_stream() -> None:
    async def main() -> None:
        one, two = Node(), Node()
        for node in (one, two):
            node.certificate = certificate(node.identity.peer_id)
        async with running(one, two):
            await one.ask(two)
            two.now = lambda: time.time() + 61
            with pytest.raises(Refused) as caught:
                await one.ask(two)
            assert caught.value.code == "certificate_expired"

    run(main)


def test_renewed_certificate_is_presented_before_the_next_call() -> None:
    async def main() -> None:
        one, two = Node(), Node()
        two.certificate = certificate(two.identity.peer_id)
        async with running(one, two):
            with pytest.raises(Refused):
                await one.ask(two)
            one.certificate = certificate(one.identity.peer_id)
            await one.ask(two)
            assert len(one.host.connections) == 1

    run(main)


def test_hello_that_got_no_answer_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that stood still for a moment must not be a stranger for the connection's whole life."""

    async def main() -> None:
        one, two = Node(limits=Limits(hello_s=0.1)), Node()
        one.certificate = certificate(one.identity.peer_id)
        two.certificate = certificate(two.identity.peer_id)
        real, silent = hello.answer, [True]

        async def answer(call: Call, admission: hello.Admission) -> None:
            if silent:
                silent.clear()
                await trio.sleep_forever()
            await real(call, admission)

        monkeypatch.setattr(hello, "answer", answer)
        async with running(one, two):
            await one.ask(two)
            await two.ask(one)
            assert len(one.host.connections) == 1

    run(main)


def test_guests_get_no_share_of_the_windows() -> None:
    async def main() -> None:
        one, two = Node(), Node()
        two.certificate = certificate(two.identity.peer_id)

        def lifted(node: Node) -> int:
            (connection,) = node.host.connections.values()
            stream = connection.open_stream()
            stream.reset()
            return stream._stream.window_size

        async with running(one, two):
            await one.ask(two, "/agora/open/1")
            assert (lifted(one), lifted(two)) == (256 << 10, 256 << 10)
            one.certificate = certificate(one.identity.peer_id)
            await one.ask(two)
            assert (lifted(one), lifted(two)) == (1 << 20, 1 << 20)

    run(main)


@pytest.mark.parametrize("hardware", [True, False])
def test_bulk_goes_over_to_aes_where_both_compute_it(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "has_aes", lambda: hardware)
    data = bytes(range(256)) * 4000

    async def main() -> None:
        one, two = Node(), Node()

        async def echo(call: Call) -> None:
            for _ in range(2):
                await call.send({}, (await call.receive(max_payload=len(data))).payload)

        two.host.handle("/agora/echo/1", echo, open_to_all=True)
        async with running(one, two):
            await one.ask(two, "/agora/open/1")
            ciphers = [
                (connection.sealer.cipher, connection.opener.cipher)
                for node in (one, two)
                for connection in node.host.connections.values()
            ]
            async with await one.host.call(two.host.peer_id, "/agora/echo/1", deadline=5) as call:
                for _ in range(2):
                    await call.send({}, data)
                    assert (await call.receive(max_payload=len(data))).payload == data
            for node, (sending, receiving) in zip((one, two), ciphers, strict=True):
                (connection,) = node.host.connections.values()
                assert (connection.sealer.cipher is not sending) == hardware
                assert (connection.opener.cipher is not receiving) == hardware

    run(main)


def test_listed_nodes_need_no_certificate() -> None:
    async def main() -> None:
        seed = Identity.generate()
        trust = attrs.evolve(TRUST, standing={seed.peer_id: "seed"})
        one, two = Node(trust, seed), Node(trust)
        two.certificate = certificate(two.identity.peer_id)
        async with running(one, two):
            await one.ask(two)
            assert two.members == [
                Member(peer_id=seed.peer_id, role="seed", stage=None, expires=math.inf, account="")
            ]

    run(main)


HELLO = Hello(run=RUN, manifest=HASH, version=(1, 1), certificate=None, window=1, agent="x").to_wire()


@pytest.mark.parametrize(
    "change",
    [
        {"run": 5},
        {"run": "x" * 65},
        {"manifest": "text"},
        {"manifest": b"x" * 65},
        {"version": [1]},
        {"version": [1, "x"]},
        {"version": [-1, 1]},
        {"version": None},
        {"certificate": "text"},
        {"certificate": b"x" * 1025},
        {"window": -1},
        {"window": True},
        {"window": 1 << 32},
        {"aes": 1},
        {"agent": None},
        {"agent": "x" * 65},
    ],
)
def test_malformed_hello(change: dict[str, object]) -> None:
    good = {**HELLO, "version": [1, 1]}
    assert Hello.from_wire(good).version == (1, 1)
    with pytest.raises(RemoteError):
        Hello.from_wire({**good, **change})


def test_version_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        one, two = Node(), Node()
        for node in (one, two):
            node.certificate = certificate(node.identity.peer_id)
        async with running(one, two):
            wire = {**HELLO, "version": [2, 3], "certificate": one.certificate}
            monkeypatch.setattr(Hello, "to_wire", lambda self: wire)
            with pytest.raises(Refused) as caught:
                await one.ask(two)
            assert caught.value.code == "version_mismatch"

    run(main)
