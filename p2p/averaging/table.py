"""Candidates of a round in the hash table: the way mates meet who have not heard of each other yet."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Protocol

from p2p.averaging.lobby import Announcement
from p2p.averaging.roster import RoundKey
from p2p.errors import P2PError
from p2p.records import CandidateRecord, read_all, round_key

if TYPE_CHECKING:
    from p2p.host import Host
    from p2p.identity import PeerId
    from p2p.kad.record import Record


class Table(Protocol):
    """What a round needs of ``p2p.kad``'s ``Dht``; both deadlines are seconds from now."""

    def store(self, key: str, subkey: str, value: Any, *, ttl: float, deadline: float) -> Awaitable[int]: ...

    def get(self, key: str, *, deadline: float, fresh: bool = True) -> Awaitable[dict[str, Record]]: ...


async def announce_in(table: Table, host: Host, mine: Announcement, seconds: float) -> None:
    """Say that this host wants to take part, for as long as the round can last."""
    membership = host.membership
    record = CandidateRecord(
        addrs=mine.candidate.addrs,
        bandwidth=mine.candidate.bandwidth,
        weight=mine.candidate.weight,
        certificate=(membership.own_certificate() if membership is not None else None) or b"",
    )
    name = round_key(mine.key.run, mine.key.stage, mine.key.number)
    try:
        await table.store(name, host.peer_id, record.to_value(), ttl=max(1.0, seconds), deadline=seconds)
    except P2PError:
        pass  # the table is one of two ways to be found


async def candidates_in(table: Table, key: RoundKey, seconds: float) -> dict[PeerId, tuple[str, ...]]:
    """Who else has said so, and where it can be dialled."""
    try:
        found = await table.get(round_key(key.run, key.stage, key.number), deadline=seconds)
    except P2PError:
        return {}
    return {peer: record.addrs for peer, record in read_all(CandidateRecord, found).items()}
