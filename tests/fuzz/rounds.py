"""A round's state machines as functions of bytes: what mates say while they search, and while they exchange.

An input is a msgpack list of messages, ``[sender, header, payload]`` each, told to a machine that is in the
middle of its work. Signatures are hashes here: a fuzzer cannot bend a curve, but it can copy these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import msgpack

from p2p.averaging.butterfly import Exchange
from p2p.averaging.lobby import Announcement, RoundConfig
from p2p.averaging.matchmaking import Matchmaker
from p2p.averaging.reducer import Codec, PlainCodec, PlainReducer
from p2p.averaging.roster import Candidate, Roster, RoundKey, draft
from p2p.errors import P2PError
from p2p.identity import Identity, PeerId
from stage.codec import CODECS

PEERS: Final = tuple(sorted(Identity.generate(bytes([letter]) * 32).peer_id for letter in b"xyz"))
KEY: Final = RoundKey(run="r", stage=1, number=5)
FLOATS: Final = 96
PART_BYTES: Final = 128
SECONDS: Final = 10.0
MOST: Final = 64
"""Messages of one input."""


def sign_as(peer: PeerId) -> Callable[[str, bytes], bytes]:
    """Not a signature that convinces anybody else."""
    return lambda domain, data: hashlib.sha512(f"{peer}{domain}".encode() + data).digest()


def verify(peer: PeerId, domain: str, data: bytes, signature: bytes) -> bool:
    return signature == sign_as(peer)(domain, data)


def candidate(peer: PeerId) -> Candidate:
    return Candidate(peer=peer, addrs=("/ip4/10.0.0.1/tcp/1",), bandwidth=1.0, weight=1.0)


def roster(leader: PeerId = PEERS[0]) -> Roster:
    members = [candidate(peer) for peer in PEERS]
    return draft(KEY, leader, members, slice_index=1, floats=FLOATS, part_bytes=PART_BYTES, seconds=SECONDS)


def messages(data: bytes) -> Iterator[tuple[int, dict[str, Any], memoryview]]:
    """What can be read of an input."""
    try:
        told = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError):
        return
    for one in told[:MOST] if isinstance(told, list) else []:
        match one:
            case [int(sender), dict(header), bytes(payload)]:
                yield sender, header, memoryview(payload)


def exchange(data: bytes, codec: Codec = PlainCodec()) -> None:
    """Whatever two mates say in an exchange: a result is whole, and an outcome names what it is made of."""
    vector = memoryview(bytearray(4 * FLOATS))
    me = roster().peers[1]
    machine = Exchange(roster(), me, vector, PlainReducer, sign_as(me), verify, 0.0, SECONDS, codec)
    machine.start()
    now, refused = 0.0, set()
    for sender, header, payload in messages(data):
        if sender < 0:
            now = min(now + 1.0, SECONDS)
            machine.tick(now)
        elif sender % 3 != machine.me and sender % 3 not in refused:
            try:
                machine.heard(sender % 3, header, payload)
            except P2PError as error:
                refused.add(sender % 3)
                machine.lost(sender % 3, str(error))
        assert len(machine.out) <= 64 * (MOST + 1)
    machine.tick(SECONDS + 1)
    assert machine.done
    if machine.outcome is not None:
        assert 0.0 <= machine.outcome.fraction <= 1.0


def search(data: bytes) -> None:
    """Whatever mates say in a search: the roster that is found names this member and was signed."""
    for me in PEERS[:2]:
        mine = Announcement(key=KEY, slice_index=1, floats=FLOATS, seconds=SECONDS, candidate=candidate(me))
        machine = Matchmaker(
            mine, PEERS, given_up_by=(), config=RoundConfig(), sign=sign_as(me), verify=verify, now=0.0
        )
        now = 0.0
        for sender, header, _ in messages(data):
            peer = PEERS[sender % 3]
            if sender < 0:
                now += 1.0
                machine.tick(now)
            elif peer != me:
                _told(machine, peer, header, now)
            assert len(machine.out) <= 64 * (MOST + 1)
        found = machine.roster
        if found is not None:
            assert me in found.peers
            found.check(machine.signature, verify)


def _told(machine: Matchmaker, peer: PeerId, header: dict[str, Any], now: float) -> None:
    try:
        if header.get("t") == "announce":
            machine.announced(Announcement.read(header, peer), now, now)
        elif header.get("t") == "accept":
            machine.follower_said(peer, header, now)
        else:
            machine.leader_said(peer, header, now)
    except P2PError:
        machine.leader_lost(peer, now)
        machine.follower_left(peer, False, now)


def exchange_seeds(codec: Codec) -> list[bytes]:
    """A whole round of three as the second member hears it, and its beginning."""
    vectors = [memoryview(bytearray(4 * FLOATS)) for _ in PEERS]
    machines = [
        Exchange(roster(), peer, vector, PlainReducer, sign_as(peer), verify, 0.0, SECONDS, codec)
        for peer, vector in zip(roster().peers, vectors, strict=True)
    ]
    heard: list[list[Any]] = []
    for machine in machines:
        machine.start()
    moved = True
    while moved:
        moved = False
        for sender, machine in enumerate(machines):
            out, machine.out = machine.out, []
            for send in out:
                moved = True
                payload = bytes(send.payload)
                if send.to == 1:
                    heard.append([sender, send.header, payload])
                machines[send.to].heard(sender, send.header, memoryview(payload))
    assert all(machine.done for machine in machines)
    return [msgpack.packb(heard[:count]) for count in (len(heard), len(heard) // 2, 1)]


def search_seeds() -> list[bytes]:
    """What a leader and what a follower says when all goes well."""
    seeds = []
    for leader in PEERS:
        theirs = roster(leader)
        signature = theirs.sign(sign_as(leader))
        led = PEERS.index(leader)
        seeds.append(
            msgpack.packb(
                [
                    [led, {"t": "hold", "started": True}, b""],
                    [led, {"t": "propose", "roster": theirs.encoded}, b""],
                    [led, {"t": "commit", "roster": theirs.encoded, "sig": signature}, b""],
                ]
            )
        )
    told = [
        [
            number,
            Announcement(
                key=KEY, slice_index=1, floats=FLOATS, seconds=SECONDS, candidate=candidate(peer)
            ).header(),
            b"",
        ]
        for number, peer in enumerate(PEERS)
    ]
    away = {"t": "elsewhere", "leader": PEERS[2], "addrs": ["/ip4/10.0.0.1/tcp/1"]}
    accept = {"t": "accept", "group": bytes(32)}
    seeds.append(msgpack.packb([*told, [-1, {}, b""], [2, accept, b""], [0, away, b""], [-1, {}, b""]]))
    return seeds


TARGETS: Final[dict[str, Callable[[bytes], object]]] = {
    "round search": search,
    **{
        f"round exchange {name}": cast(
            "Callable[[bytes], object]", lambda data, codec=codec: exchange(data, codec)
        )
        for name, codec in CODECS.items()
    },
}


def seeds(name: str) -> list[bytes]:
    """Good inputs of one of ``TARGETS``."""
    return search_seeds() if name == "round search" else exchange_seeds(CODECS[name.split()[-1]])
