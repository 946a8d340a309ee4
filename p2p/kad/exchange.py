"""Both ends of one question: asking a node over the ``Host``, and answering.

Answering. ``find_node`` and ``find_value`` are open to guests, ``store`` and ``hand_over`` only to
members. A member stores only records that it owns; it hands over what others signed, which is taken by who
is one of the nearest to the key, for no longer than was signed. Asking: every question has a deadline;
whoever misses it, or breaks the protocol, leaves the routing table at once; whoever is passed over as slow
twice in a row does too (a lookup that ends early would otherwise never learn that a peer is dead).

Only members that listen somewhere enter the routing table, with the addresses that they state
themselves in a message of their own; what others tell about third parties is tried, never believed.

Limits: ``MAX_PAGES`` pages an answer, ``MAX_NOTED`` peers in each of the small memories kept here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, final

import trio

from p2p.errors import Refused, RemoteError
from p2p.event import Emit
from p2p.identity import PeerId
from p2p.kad import messages
from p2p.kad.events import ClockSkewed, RecordRefused
from p2p.kad.ids import key_id
from p2p.kad.messages import PROTOCOL, Answer, FindNode, FindValue, HandOver, Question, StoreRecords
from p2p.kad.record import SAME_CLOCK_S, Record, Verifier, handed, received, relayed
from p2p.kad.store import MAX_SUBKEYS, Store
from p2p.kad.table import MAX_ADDRS, Contact, Table
from p2p.multiaddr import Multiaddr
from p2p.rpc import pack

if TYPE_CHECKING:
    from p2p.connection import Connection
    from p2p.host import Host
    from p2p.rpc import Message

MAX_PAGES: Final = 48
MAX_NOTED: Final = 256
SLOW_STRIKES: Final = 2
KEEPERS: Final = 8
"""Nearest nodes that a store or a read is answered with: as many as keep a record."""
OWN_ADDRS_S: Final = 1.0


@final
class Exchange:
    """See the file's opening. ``newcomer`` is called with each contact that is new to the table.

    ``keeps`` says whether this node is one of those that should keep what lies at a place.
    """

    def __init__(
        self,
        host: Host,
        table: Table,
        *,
        clock: Callable[[], float],
        emit: Emit,
        hop_s: float,
        patience_s: float,
        newcomer: Callable[[Contact], None],
        keeps: Callable[[int], bool],
    ) -> None:
        self.leaving = False
        """Set by who goes: from then on it names no address, and nobody takes it for a node of the table."""
        self.records = Store()
        self.verifier = Verifier()
        self._host = host
        self._table = table
        self._clock = clock
        self._emit = emit
        self._hop_s = hop_s
        self._patience_s = patience_s
        self._newcomer = newcomer
        self._keeps = keeps
        self._skewed: OrderedDict[PeerId, None] = OrderedDict()
        self._strikes: OrderedDict[PeerId, int] = OrderedDict()
        self._left: OrderedDict[PeerId, float] = OrderedDict()
        self._own_addrs: tuple[str, ...] = ()
        self._own_addrs_until = 0.0
        host.respond(PROTOCOL, self._respond, open_to_all=True, max_payload=messages.MAX_PAYLOAD)

    # Asking

    async def find_node(
        self, contact: Contact, target: int, *, hop_s: float | None = None
    ) -> tuple[Sequence[Contact], bool]:
        """The contacts that a node knows nearest to a place; whether it is a member."""
        question = FindNode(target=target, now=self._clock(), addrs=self._addrs())
        answer, _, member = await self._ask(contact, question, hop_s=hop_s)
        return answer.nodes, member

    async def find_value(self, contact: Contact, key: str) -> tuple[Sequence[Contact], list[Record], bool]:
        """Nearer contacts, the records of a key that a node keeps, all pages; whether it is a member."""
        nodes: Sequence[Contact] = ()
        member = False
        found: list[Record] = []
        after: str | None = None
        for page in range(MAX_PAGES):
            question = FindValue(key=key, after=after, now=self._clock(), addrs=self._addrs())
            answer, rows, member = await self._ask(contact, question)
            if page == 0:
                nodes = answer.nodes
            try:
                for wire, remaining in rows:
                    record = self._open(contact.peer, key, wire)
                    if after is not None and record.subkey <= after:
                        raise RemoteError(f"records of {key!r} that are not in order of subkey")
                    after = record.subkey
                    if (timed := self._timed(contact.peer, record, remaining)) is not None:
                        found.append(timed)
                if len(found) > MAX_SUBKEYS:
                    raise RemoteError(f"more than {MAX_SUBKEYS} records of one key")
            except RemoteError:
                self._table.failed(contact.peer)
                raise
            if not answer.more or not rows:
                break
        return nodes, found, member

    async def store(self, contact: Contact, record: Record) -> tuple[Sequence[Contact], bool]:
        """Have a node keep a record of ours, or Refused. Whom it knows near the key; if it is a member."""
        question = StoreRecords(now=self._clock(), addrs=self._addrs())
        answer, _, member = await self._ask(contact, question, messages.pack_batch([record.wire]))
        if len(answer.results) != 1:
            raise RemoteError("a store answered with another number of results than records")
        if answer.results[0] != "ok":
            raise Refused(answer.results[0], "the node does not keep this record")
        return answer.nodes, member

    async def hand_over(self, contact: Contact, records: Sequence[Record]) -> None:
        """Give records that we keep to a node that should; what it makes of them is for it to say."""
        now = self._clock()
        rows = [(record.wire, record.expires - now) for record in records]
        await self._ask(
            contact, HandOver(leaving=self.leaving, now=now, addrs=self._addrs()), messages.pack_page(rows)
        )

    async def _ask(
        self, contact: Contact, question: Question, payload: bytes = b"", *, hop_s: float | None = None
    ) -> tuple[Answer, list[tuple[bytes, float]], bool]:
        """One exchange, and whether it was with a member.

        RemoteError and TooSlowError put the peer out of the table, Refused does not.
        """
        hop_s = hop_s or self._hop_s
        began = trio.current_time()
        try:
            with trio.fail_after(hop_s):
                async with await self._host.call(
                    contact.peer, PROTOCOL, addrs=_dialable(contact.addrs), deadline=hop_s
                ) as call:
                    asked = pack(messages.question_header(question), payload, self._host.limits)
                    reply = await call.ask(asked, max_payload=messages.MAX_PAYLOAD)
                    answer = messages.read_answer(reply.header)
                    rows = messages.read_page(reply.payload)
                    is_member = self._is_member(call.connection)
        except (RemoteError, trio.TooSlowError):
            self._table.failed(contact.peer)
            raise
        except trio.Cancelled:
            if trio.current_time() >= began + self._patience_s:
                self._strike(contact.peer)
            raise
        self._strikes.pop(contact.peer, None)
        self._clock_seen(contact.peer, answer.now)
        if is_member:
            self._heard(contact.peer, answer.addrs, answer.now)
        return answer, rows, is_member

    def _is_member(self, connection: Connection) -> bool:
        try:
            self._host.gate(connection, PROTOCOL)
        except Refused:
            return False
        return True

    def _strike(self, peer: PeerId) -> None:
        strikes = self._strikes.pop(peer, 0) + 1
        if strikes >= SLOW_STRIKES:
            self._table.failed(peer)
        else:
            remember(self._strikes, peer, strikes, MAX_NOTED)

    def _heard(self, peer: PeerId, addrs: tuple[str, ...], said_at: float) -> None:
        """A member said where it listens, at this time of its clock."""
        if not addrs or said_at <= self._left.get(peer, -math.inf):
            return  # what was under way when a peer said goodbye does not bring it back
        contact = Contact(peer, addrs)
        known = self._table.find(peer)
        if self._table.heard(contact, trio.current_time()) and known is None:
            self._newcomer(contact)
        if known != contact:
            self._host.learn(peer, _dialable(addrs))

    def _open(self, peer: PeerId, key: str, wire: bytes) -> Record:
        """A record of ``key`` that ``peer`` showed us.

        A forged one, or one of another key, is a RemoteError: no honest node keeps such a thing, so what
        else this one says counts for nothing either.
        """
        try:
            record = self.verifier.open(wire)
        except RemoteError:
            self._emit(RecordRefused(peer=peer, key=key, code="bad_record"))
            raise
        if record.key != key:
            self._emit(RecordRefused(peer=peer, key=key, code="other_key"))
            raise RemoteError(f"a record of {record.key!r} in an answer about {key!r}")
        return record

    def _timed(self, peer: PeerId, record: Record, remaining: float) -> Record | None:
        """The record with the end that ``peer`` claims, or None if that cannot be."""
        try:
            return relayed(record, self._clock(), remaining)
        except Refused as error:
            if error.code != "expired":  # it may have ended on its way here
                self._emit(RecordRefused(peer=peer, key=record.key, code=error.code))
        return None

    # Serving

    def _respond(self, connection: Connection, message: Message) -> tuple[dict[str, Any], bytes]:
        peer = connection.peer
        question = messages.read_question(message.header)
        skew = self._clock_seen(peer, question.now)
        if self._is_member(connection):
            self._heard(peer, question.addrs, question.now)
        elif isinstance(question, StoreRecords | HandOver):
            self._host.gate(connection, PROTOCOL)  # raises what is wrong with the certificate
        match question:
            case FindNode():
                return self._answer(nodes=self._closest(question.target, peer)), b""
            case FindValue():
                now = self._clock()
                page, more = self.records.page(question.key, question.after, messages.PAGE, now)
                nodes = self._closest(key_id(question.key), peer, KEEPERS) if question.after is None else ()
                payload = messages.pack_page([(record.wire, record.expires - now) for record in page])
                return self._answer(nodes=nodes, more=more), payload
            case StoreRecords():
                batch = messages.read_batch(message.payload)
                results = tuple(self._keep(peer, wire, skew) for wire in batch)
                nodes = ()
                if batch:  # a store is a step of the search for who should keep it
                    target = key_id(self.verifier.open(batch[0]).key)
                    nodes = self._closest(target, peer, KEEPERS)
                return self._answer(nodes=nodes, results=results), b""
            case HandOver():
                if question.leaving:
                    remember(self._left, peer, question.now, MAX_NOTED)
                    self._table.failed(peer)
                rows = messages.read_page(message.payload, messages.MAX_BATCH)
                results = tuple(self._take(peer, wire, remaining) for wire, remaining in rows)
                return self._answer(results=results), b""

    def _keep(self, peer: PeerId, wire: bytes, skew: float) -> str:
        """Store one record that a member sent as its own; ``ok`` or the code of the refusal."""

        def judged(record: Record, now: float) -> Record:
            if record.owner != peer:
                raise Refused("not_owner", "records are stored by their owners")
            return received(record, now, skew)

        return self._judge(peer, wire, judged)

    def _take(self, peer: PeerId, wire: bytes, remaining: float) -> str:
        """Store one record that a member kept until now."""

        def judged(record: Record, now: float) -> Record:
            if not self._keeps(key_id(record.key)):
                raise Refused("not_near", "others are nearer to this key")
            return handed(record, now, remaining)

        return self._judge(peer, wire, judged)

    def _judge(self, peer: PeerId, wire: bytes, judged: Callable[[Record, float], Record]) -> str:
        try:
            record = self.verifier.open(wire)
        except RemoteError:
            self._emit(RecordRefused(peer=peer, key="", code="bad_record"))
            raise
        try:
            now = self._clock()
            self.records.put(judged(record, now), now)
        except Refused as error:
            self._emit(RecordRefused(peer=peer, key=record.key, code=error.code))
            return error.code
        return "ok"

    def _answer(self, **fields: Any) -> dict[str, Any]:
        return messages.answer_header(Answer(now=self._clock(), addrs=self._addrs(), **fields))

    def _closest(self, target: int, asker: PeerId, most: int = messages.MAX_NODES) -> tuple[Contact, ...]:
        """The nearest that we know and can say how to reach, the asker aside."""
        nearest = self._table.nearest(target, most + 1)
        known = [contact for contact in nearest if contact.addrs and contact.peer != asker]
        return tuple(known[:most])

    def _addrs(self) -> tuple[str, ...]:
        if self.leaving:
            return ()
        now = trio.current_time()
        if now >= self._own_addrs_until:  # they hardly ever change, and every message carries them
            self._own_addrs = tuple(str(addr.bare()) for addr in self._host.dialable_addrs)[:MAX_ADDRS]
            self._own_addrs_until = now + OWN_ADDRS_S
        return self._own_addrs

    def _clock_seen(self, peer: PeerId, theirs: float) -> float:
        """Seconds that a peer's clock is ahead of ours; reported once a peer when it is too much."""
        skew = theirs - self._clock()
        if abs(skew) <= SAME_CLOCK_S:
            self._skewed.pop(peer, None)
        elif peer not in self._skewed:
            remember(self._skewed, peer, None, MAX_NOTED)
            self._emit(ClockSkewed(peer=peer, seconds=skew))
        return skew


def _dialable(texts: Sequence[str]) -> list[Multiaddr]:
    """Addresses out of a message; those in a form that we do not know are left out."""
    return [addr for text in texts if (addr := _parsed(text)) is not None]


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Multiaddr | None:
    try:
        return Multiaddr.parse(text)
    except RemoteError:
        return None


def remember(cache: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """Put a value in a bounded cache, latest last."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > limit:
        cache.popitem(last=False)
