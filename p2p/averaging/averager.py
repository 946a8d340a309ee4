"""What a stage calls: ``average(number, slice, vector, weight, …)`` -> ``Outcome``, over a host and a table.

The trio shell around ``Matchmaker`` and ``Session``, and the server of ``/agora/round/1``. A call of that
protocol opens with one of

    announce   a candidate that takes us for the leader: it stays open until commit, past, or leave
    link       a member of a committed round: handed to that round's session
    where      {number} -> {t: at, open}: is that round still open to you?

Announcements for a round that has not begun here wait in the lobby. Mates that the caller expects are asked
directly; the hash table is asked as well, a moment later, since a look-up takes longer than most matches.

Who may call: members of the run (the host's gate) whose certificate names this stage. Limits: those of
``lobby``, ``roster`` and ``line``; every wait ends at the round's deadline. Times are seconds of ``clock``,
which must be monotonic; deadlines are seconds from now.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from p2p.averaging import fields
from p2p.averaging.audit import REMEMBERED_PEERS, REMEMBERED_ROUNDS
from p2p.averaging.butterfly import Exchange
from p2p.averaging.deadline import REMEMBERED
from p2p.averaging.filling import Filling
from p2p.averaging.line import HEARD, Outbox, carry, check_mate
from p2p.averaging.lobby import Announcement, Lobby, RoundConfig
from p2p.averaging.match import Match
from p2p.averaging.memory import Memory
from p2p.averaging.outcome import Outcome, RoundFailed
from p2p.averaging.reducer import Codec, MakeReducer, PlainCodec
from p2p.averaging.roster import MAX_ADDRS, MAX_SECONDS, Candidate, Roster, RoundKey
from p2p.averaging.session import LINK_S, PROTOCOL, Session
from p2p.averaging.shares import FLOAT_BYTES
from p2p.averaging.table import Table
from p2p.errors import LocalError, Refused, RemoteError
from p2p.event import Emit, Event, ignore
from p2p.identity import verify

if TYPE_CHECKING:
    from p2p.host import Host
    from p2p.identity import Identity, PeerId
    from p2p.rpc import Call

MAX_NUMBER: Final = 1 << 53
FIRST_S: Final = 5.0
"""A caller says what it wants within this time."""


@attrs.frozen(kw_only=True)
class RosterCommitted(Event):
    """A round's members are settled and the exchange begins."""

    round: int
    stage: int
    group: str
    leader: str
    members: tuple[str, ...]


@attrs.frozen(kw_only=True)
class MemberDropped(Event):
    """A member of a round did not contribute everything, or did not finish."""

    round: int
    stage: int
    peer: str
    why: str


class Averager:
    """Rounds of one stage of one run. One ``average`` a round number; rounds may overlap."""

    def __init__(
        self,
        host: Host,
        dht: Table,
        identity: Identity,
        *,
        run: str,
        stage: int,
        reducer: MakeReducer,
        codec: Codec = PlainCodec(),
        emit: Emit = ignore,
        clock: Callable[[], float] = trio.current_time,
        rng: random.Random | None = None,
        config: RoundConfig = RoundConfig(),
    ) -> None:
        self._host = host
        self._dht = dht
        self._identity = identity
        self._run = run
        self._stage = stage
        self._make_reducer = reducer
        self._codec = codec
        self.later_round: Callable[[int], bool] = lambda number: False
        """Told of the number when a mate is at a later round than any that began here. True: this member
        is going there too, so a search for an earlier round is not worth going on with."""
        self._emit = emit
        self._clock = clock
        self._rng = rng or random.Random()
        self._config = config
        self._lobby = Lobby()
        self._newest = -1
        self._memory = Memory()
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        """Seconds of the last exchanges that brought something."""
        self._mbps: deque[float] = deque(maxlen=REMEMBERED)
        """What this host sent at in the last exchanges, megabits a second, 0 where that was not measured."""
        self._line = 0.0
        """Bytes a second that ``Filling`` measured in the last round that filled lines; 0: nothing yet."""
        self._distrusted: dict[PeerId, int] = {}
        """Who reduces nothing in rounds that we lead, up to this number, the latest finding last."""
        self._matches: dict[int, Match] = {}
        self._sessions: dict[bytes, Session] = {}
        self._progress = trio.Event()
        self._followers: dict[tuple[int, PeerId], Outbox] = {}
        host.handle(PROTOCOL, self._serve)

    async def average(
        self,
        number: int,
        slice_index: int,
        vector: memoryview,
        weight: float,
        *,
        expected: Collection[PeerId],
        deadline: float,
        fill: bool = False,
    ) -> Outcome:
        """Average fp32 ``vector`` (little endian, left alone meanwhile) with the stage's other replicas.

        ``weight`` 0: receive only. ``expected``: stage-mates that the round should wait a little for.
        ``fill``: training waits for this round, so it may fill the members' lines and the queues before them;
        other rounds leave room for microbatches. Ends within ``deadline`` seconds and one for last words;
        raises ``RoundFailed``.
        """
        data = memoryview(vector).cast("B") if vector.nbytes else memoryview(b"")
        if data.nbytes % FLOAT_BYTES:
            raise LocalError("a vector to average consists of fp32 numbers")
        if number in self._matches:
            raise LocalError(f"round {number} is on already")
        ends = self._clock() + min(deadline, MAX_SECONDS)
        key = RoundKey(run=self._run, stage=self._stage, number=number)
        candidate = Candidate(
            peer=self._host.peer_id,
            addrs=tuple(str(addr.bare()) for addr in self._host.dialable_addrs[:MAX_ADDRS]),
            bandwidth=self._bandwidth(),
            weight=float(weight),
        )
        mine = Announcement(
            key=key,
            slice_index=slice_index,
            floats=data.nbytes // FLOAT_BYTES,
            seconds=ends - self._clock(),
            candidate=candidate,
        )
        failure: RoundFailed | None = None
        outcome: Outcome | None = None
        async with trio.open_nursery() as nursery:
            match = self._begin(mine, expected, nursery)
            try:
                try:
                    roster = await match.settle()
                except RoundFailed:
                    self._wake_links()
                    raise
                finally:
                    del self._matches[number]
                outcome = await self._exchange(roster, data, ends, fill)
            except RoundFailed as error:  # raised again below, not wrapped in a group
                failure = error
            nursery.cancel_scope.cancel()
        try:
            if outcome is None:
                raise failure or RoundFailed("the round was given up")
        finally:
            failure = None  # it knows this frame, which knows the vector
        return outcome

    def _distrust(self, peer: PeerId, number: int) -> None:
        """An audit went against this reducer."""
        self._distrusted.pop(peer, None)
        self._distrusted[peer] = number + REMEMBERED_ROUNDS
        while len(self._distrusted) > REMEMBERED_PEERS:
            del self._distrusted[next(iter(self._distrusted))]

    def _bandwidth(self) -> float:
        """Megabits a second that this host can send, by its last rounds and its own limit; 0 is not known."""
        measured = max(self._mbps, default=0.0)  # a round that waited for others measures too little
        limit = self._host.upload.rate
        if limit is None:
            return measured
        return min(measured, limit * 8 / 1e6) if measured else limit * 8 / 1e6

    def _begin(self, mine: Announcement, expected: Collection[PeerId], nursery: trio.Nursery) -> Match:
        number = mine.key.number
        self._newest = max(self._newest, number)
        for theirs in self._lobby.past(number - 1):
            outbox = self._followers.get((theirs.key.number, theirs.candidate.peer))
            if outbox is not None:
                outbox.post({"t": "past", "why": "this stage-mate is at a later round"})
                outbox.close()
        waiting, notes = self._lobby.take(mine.key)
        match = Match(
            self._host,
            self._dht,
            mine,
            expected,
            given_up_by=notes,
            tell=lambda peer, header: self._tell(number, peer, header),
            sign=self._identity.sign,
            clock=self._clock,
            rng=self._rng,
            config=self._config,
            nursery=nursery,
            recent=tuple(self._took),
            distrusted=[peer for peer, until in self._distrusted.items() if number <= until],
        )
        self._matches[number] = match
        for theirs, at in waiting:
            match.announced(theirs, at)
        return match

    async def _exchange(self, roster: Roster, data: memoryview, ends: float, fill: bool) -> Outcome:
        number = roster.key.number
        self._emit(
            RosterCommitted(
                round=number,
                stage=self._stage,
                group=roster.group.hex(),
                leader=roster.leader,
                members=roster.peers,
            )
        )
        now = self._clock()
        exchange = Exchange(
            roster,
            self._host.peer_id,
            data,
            self._make_reducer,
            self._identity.sign,
            verify,
            now,
            min(roster.seconds, ends - now),
            self._codec,
            self._rng,
            self._memory,
        )
        filling: Filling[PeerId] | None = Filling(self._line) if fill else None
        session = Session(self._host, exchange, self._clock, filling=filling)
        self._sessions[roster.group] = session
        self._wake_links()
        try:
            outcome = await session.run()
            self._took.append(session.ended_at - now)
            self._mbps.append(session.meter.mbps)
            if filling is not None and filling.measured:
                self._line = filling.measured
        finally:
            del self._sessions[roster.group]
            if exchange.accused is not None:
                self._distrust(exchange.accused, number)
            for peer, why in exchange.drops:
                self._emit(MemberDropped(round=number, stage=self._stage, peer=peer, why=why))
        return outcome

    def _wake_links(self) -> None:
        """Members whose lines wait for a commit of ours look again."""
        self._progress.set()
        self._progress = trio.Event()

    def _tell(self, number: int, peer: PeerId, header: dict[str, Any]) -> None:
        outbox = self._followers.get((number, peer))
        if outbox is not None:
            outbox.post(header)
            if header["t"] in ("past", "commit"):
                outbox.close()

    # -- serving

    async def _serve(self, call: Call) -> None:
        check_mate(call, self._host, self._stage)
        with trio.fail_after(FIRST_S):
            first = (await call.receive()).header
        kind = fields.text(first, "t", 16)
        if kind == "announce":
            await self._serve_announce(call, first)
        elif kind == "link":
            await self._serve_link(call, first)
        elif kind == "where":
            number = fields.integer(first, "number", 0, MAX_NUMBER)
            self._hear_of(number)
            await call.send({"t": "at", "open": self._open(number)})
        else:
            raise RemoteError(f"no such message: {kind}")

    def _open(self, number: int) -> bool:
        return number > self._newest or number in self._matches

    def _hear_of(self, number: int) -> None:
        if number > self._newest and self.later_round(number):
            for match in list(self._matches.values()):
                match.abandon(f"a stage-mate is at round {number} already")

    async def _serve_announce(self, call: Call, first: Mapping[str, Any]) -> None:
        theirs = Announcement.read(first, call.peer)
        await call.send({"t": HEARD})
        number, peer = theirs.key.number, call.peer
        if (theirs.key.run, theirs.key.stage) != (self._run, self._stage):
            raise Refused("wrong_stage", f"rounds here are of run {self._run!r}, stage {self._stage}")
        self._hear_of(number)
        outbox = self._followers[number, peer] = Outbox()
        gave_up = False

        def heard(header: Mapping[str, Any], _payload: memoryview) -> None:
            nonlocal gave_up
            if fields.text(header, "t", 16) == "leave":
                gave_up = header.get("gave_up") is True
                outbox.close()
            elif (match := self._matches.get(number)) is not None:
                match.follower_said(peer, header)

        try:
            if (match := self._matches.get(number)) is not None:
                match.announced(theirs, self._clock())
            elif number <= self._newest:
                self._tell(number, peer, {"t": "past", "why": "the round is over for this stage-mate"})
            elif self._lobby.add(theirs, self._clock()):
                outbox.post({"t": "hold", "started": False})
            else:
                raise Refused("busy", "too many candidates are waiting", self._config.patience_s)
            await carry(call, outbox, heard)
        finally:
            if self._followers.get((number, peer)) is outbox:
                del self._followers[number, peer]
                if (match := self._matches.get(number)) is not None:
                    match.follower_left(peer, gave_up)
                else:
                    self._lobby.left(theirs.key, peer, gave_up)

    async def _serve_link(self, call: Call, first: Mapping[str, Any]) -> None:
        group = fields.blob(first, "group", 32, 32)
        number = fields.integer(first, "number", 0, MAX_NUMBER)
        with trio.move_on_after(LINK_S):  # the commit may reach us later than the others
            while group not in self._sessions and self._open(number):
                await self._progress.wait()
        session = self._sessions.get(group)
        if session is None:
            raise Refused("no_such_round", "this member is not in that group")
        await call.send({"t": HEARD})
        await session.serve(call)
