"""The butterfly: every member reduces its share of the vector and hands the means out.

Theory of operation (sans-IO: messages and time in, messages and one outcome out). The vector is cut in
parts; part p has one *reducer* and that one's *deputy*, the next member in the roster.

    raw(p)     every member with weight  -> reducer     its own numbers
    mean(p)    reducer -> deputy                        signed over group, part, digest, contributors
    ack(p)     deputy  -> reducer
    mean(p)    reducer -> everybody else
    ask(p)     a member whose reducer is lost -> deputy: mean(p), or gone(p), once the deputy knows
    want(p)    deputy whose reducer is lost or late -> everybody: mean(p) from who has it, else raw(p); the
               deputy reduces p, signs it and hands it to all
    gone(p)    reducer or deputy: nobody will get this part from me
    audit(p)   deputy -> contributors, now and then: your numbers of this part once more (``audit``)
    audited(p) the numbers
    report     everybody -> everybody, when no part is pending; then ``verdict`` decides what counts

Parts go in any order. A sender that is lost or late is dropped from the parts it has not sent; the others'
mean stands if two contributed (or all who have weight). A sender with numbers that are not finite is
dropped from all parts of that reducer, but stays in the round and receives.

Races, and what settles them:
- *Reducer dies before the deputy has its part*: nobody else can have it; the deputy sees the reducer lost
  and takes over. Averaged, for everyone, without the dead one's numbers.
- *Reducer is slow*: the deputy takes over what it was not handed by ``TAKE_BY``, and acknowledges no other
  version; a reducer that hears ``want`` gives the part up, and takes the deputy's in the place of its own.
- *Reducer dies after*: whoever lacks the part asks the deputy, which holds it. Averaged, for everyone.
- *A member asks while the deputy still hears from the reducer* (one broken link): the deputy keeps the
  question until the part arrives or its reducer is lost to it too.
- *Deputy dies*: the reducer sends to everybody without the acknowledgement. On its own this would be unsafe
  (the deputy may only be cut off, having said ``gone`` to others): the verdict makes it safe, since a part
  that some reporter lacks does not count.
- *Both die*: the part may have reached some members and not others; it counts only if all reporters hold it.
- *A reducer sends different bytes to different members*: reports carry digests, and parts that differ do not
  count; both signatures are the evidence.

Guaranteed under crashes, stops and lost links in any number: all members that finish have averaged the same
parts with the same bytes, hence equal checksums. A member that cannot learn the verdict fails and its vector
is untouched. Guaranteed for the loss of any one member of three or more at any moment: all others finish.
Not guaranteed (impossible): that all finish or none does; that a round of two survives the loss of one.

What is held is kept by ``result``; ``schedule`` says after what time whom to give up.

Limits: the roster's. Memory: the result (one vector) and the reducers of unfinished parts of one share.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from p2p.averaging import fields
from p2p.averaging.audit import Auditor
from p2p.averaging.memory import Memory
from p2p.averaging.outcome import EVERYBODY_LOST, PARTS_MISSED, Outcome
from p2p.averaging.reducer import Buffer, Codec, MakeReducer, PlainCodec, Reducer
from p2p.averaging.result import Part, Result
from p2p.averaging.roster import Roster, Sign, Verify
from p2p.averaging.schedule import ACK_BY, MEANS_BY, RAW_BY, TAKE_BY, TAKEN_BY, Schedule
from p2p.averaging.shares import MAX_PARTS
from p2p.averaging.verdict import MESSAGES, NOTHING, Value, Verdict
from p2p.errors import LocalError, RemoteError

if TYPE_CHECKING:
    from p2p.identity import PeerId


@attrs.frozen
class Send:
    """A message to member ``to``; ``payload`` may be a view into a buffer that keeps until the end."""

    to: int
    header: dict[str, Any]
    payload: Buffer = attrs.field(default=b"", repr=False)


class Exchange:
    """One member's side of a committed round. After each input drain ``out`` and look at ``done``."""

    def __init__(
        self,
        roster: Roster,
        me: PeerId,
        vector: memoryview,
        make_reducer: MakeReducer,
        sign: Sign,
        verify: Verify,
        now: float,
        seconds: float,
        codec: Codec = PlainCodec(),
        audits: random.Random | None = None,
        memory: Memory | None = None,
    ) -> None:
        """``audits`` draws what this member audits as a deputy; None: nothing. ``memory``: of the result."""
        if len(vector) != roster.floats * 4:
            raise LocalError("the vector is not as long as the roster says")
        self.roster = roster
        self.me = roster.peers.index(me)
        self.out: list[Send] = []
        self.outcome: Outcome | None = None
        self.failed: str | None = None
        self._vector = vector
        self._result = Result(roster, codec, sign, verify, memory or Memory())
        self._make_reducer = make_reducer
        self._codec = codec
        self._schedule = Schedule(now, seconds, self.me)
        self._n = len(roster.members)
        self._weights = [member.weight for member in roster.members]
        self._everybody = sum(1 << i for i, weight in enumerate(self._weights) if weight > 0)
        self._spans = roster.spans
        self._owners = roster.owners
        self._status = self._result.status
        self._reducers: dict[int, Reducer] = {}
        self._added = {p: 0 for p, owner in enumerate(self._owners) if owner == self.me}
        self._lost: dict[int, str] = {}
        self._barred: dict[int, str] = {}
        self._unacked: set[int] = set()
        self._askers: dict[int, set[int]] = {}
        self._asked: set[int] = set()
        self._moved: set[int] = set()
        """Parts that their deputy reduces, as far as this member was told."""
        self._auditor = Auditor(roster, self.me, make_reducer, codec, audits)
        self._took_over = False
        self._verdict = Verdict(self.me, self._n, len(self._spans))

    # -- inputs

    def start(self) -> None:
        """Send this member's numbers off."""
        if self._weights[self.me] > 0:
            for part in self._sending_order():
                if self._owners[part] != self.me:
                    begin, end = self._spans[part]
                    own = self._codec.encode(self._vector[begin:end])
                    self._tell(self._owners[part], {"t": "raw", "p": part}, own)
        self._reduce_own()
        self._advance()

    def _sending_order(self) -> list[int]:
        """The first part of each reducer, then the second of each, and so on.

        So the numbers for a part come from all senders at about the same time: few parts are begun and not
        finished, and means travel while numbers do. Each begins at another reducer than its neighbour.
        """
        nth: Counter[int] = Counter()
        order: list[tuple[int, int, int]] = []
        for part, owner in enumerate(self._owners):
            order.append((nth[owner], (owner - self.me) % self._n, part))
            nth[owner] += 1
        return [part for _, _, part in sorted(order)]

    def place(self, sender: int, header: Mapping[str, Any], size: int) -> memoryview | None:
        """Where this message's payload may lie, to be ``heard`` there when it is complete; None: elsewhere.

        A mean goes to its place in the result, unless another one may get there first. Until it is heard and
        its signature found good, that part is not held.
        """
        part = header.get("p")
        if self.done or header.get("t") != "mean" or type(part) is not int:
            return None
        if not 0 <= part < len(self._spans) or part in self._added:
            return None
        return self._result.place(sender, part, size)

    def heard(self, sender: int, header: Mapping[str, Any], payload: memoryview) -> None:
        """A message of member ``sender``; ``RemoteError`` means: drop its link and call ``lost``."""
        if self.done or sender in self._lost:
            return
        kind = fields.text(header, "t", 16)
        if kind in MESSAGES:
            self._verdict.heard(sender, kind, header, payload)
        elif kind == "raw":
            self._raw(sender, self._part(header), payload)
        elif kind == "mean":
            self._mean(sender, self._part(header), header, payload)
        elif kind == "ack":
            part = self._part(header)
            if self._owners[part] != self.me or sender != self.roster.deputy(self.me):
                raise RemoteError("an acknowledgement from one who is not the deputy")
            self._spread(part)
        elif kind == "ask":
            self._asked_by(sender, self._parts(header))
        elif kind == "want":
            self._wanted(sender, self._parts(header))
        elif kind == "gone":
            self._gone(sender, self._parts(header))
        elif kind == "audit":
            self._show(sender, self._part(header))
        elif kind == "audited":
            self._audited(sender, self._part(header), payload)
        else:
            raise RemoteError(f"no such message: {kind}")
        self._advance()

    def lost(self, member: int, why: str) -> None:
        """The link to ``member`` ended for good. All that waited for it is settled now."""
        if self.done or member in self._lost or member == self.me:
            return
        self._lost[member] = why
        self._result.lost(member)
        self._auditor.lost(member)
        if len(self._lost) == self._n - 1:
            self.failed = EVERYBODY_LOST
            return
        if self.roster.deputy(member) == self.me:
            self._take_over()
        self._reduce_own()
        if member == self.roster.deputy(self.me):
            for part in sorted(self._unacked):
                self._spread(part)
        questions: dict[int, list[int]] = {}
        for part, status in enumerate(self._status):
            owner = self._owners[part]
            deputy = self.roster.deputy(owner)
            if status is not Part.PENDING or not (owner in self._lost or part in self._moved):
                continue
            if deputy == self.me:
                continue  # taken over
            if deputy in self._lost:
                self._miss(part)
            elif part not in self._asked:
                self._asked.add(part)
                questions.setdefault(deputy, []).append(part)
        for deputy, parts in questions.items():
            self._tell(deputy, {"t": "ask", "p": parts})
        self._advance()

    def tick(self, now: float) -> None:
        """Time has come to ``now``; at or after ``wake_at`` something gives up."""
        if self.done:
            return
        passed = self._schedule.advance(now)
        if passed >= RAW_BY:
            for part in [p for p in self._added if self._status[p] is Part.PENDING]:
                if self._owners[part] == self.me or passed >= TAKEN_BY:
                    self._finish(part)
        if passed >= ACK_BY:
            for part in sorted(self._unacked):
                self._spread(part)
        if TAKE_BY <= passed < TAKEN_BY:
            self._take_over()
        if passed >= MEANS_BY and self._result.pending:
            for part, status in enumerate(self._status):
                if status is Part.PENDING:
                    self._barred.setdefault(self._owners[part], "parts did not come")
                    self._miss(part)
        self._advance()
        if passed >= 1.0 and not self.done:
            self.failed = "no verdict before the round's deadline"

    def stood_still(self, now: float) -> None:
        """This process was stopped until ``now``: the marks still ahead are put off, the end is not."""
        self._schedule.stood_still(now)

    def wake_at(self) -> float:
        """When ``tick`` is due next."""
        return self._schedule.wake_at()

    @property
    def done(self) -> bool:
        return self.outcome is not None or self.failed is not None

    @property
    def accused(self) -> PeerId | None:
        """A reducer whose mean was not that of what its contributors sent, by an audit of this member."""
        return self._auditor.accused

    @property
    def drops(self) -> list[tuple[PeerId, str]]:
        """Who was dropped and why, so far, as this member sees it."""
        reasons = {**self._barred, **self._lost}
        return [(self.roster.peers[i], why) for i, why in sorted(reasons.items())]

    # -- as reducer

    def _raw(self, sender: int, part: int, payload: memoryview) -> None:
        if part not in self._added:
            if part in self._moved:
                return  # it was ours; they were on their way
            raise RemoteError("numbers for a part that is reduced elsewhere")
        if not self._everybody >> sender & 1:
            raise RemoteError("numbers from a member without weight")
        if self._added[part] >> sender & 1:
            raise RemoteError("the same part twice")
        if len(payload) != self._wire_size(part):
            raise RemoteError("a part of the wrong length")
        if self._status[part] is Part.PENDING and sender not in self._barred:
            self._add(part, sender, self._codec.decode(payload))
            self._reduce_own() if sender in self._barred else self._finish_if_complete(part)

    def _add(self, part: int, member: int, payload: Buffer) -> None:
        begin, end = self._spans[part]
        if part not in self._reducers:
            self._reducers[part] = self._make_reducer(end - begin)
        try:
            self._reducers[part].add(payload, self._weights[member])
        except RemoteError as error:
            self._barred[member] = str(error)
        else:
            self._added[part] |= 1 << member

    def _reduce_own(self) -> None:
        for part in self._added:
            if self._status[part] is Part.PENDING:
                self._finish_if_complete(part)

    def _finish_if_complete(self, part: int) -> None:
        away = sum(1 << i for i in {*self._lost, *self._barred})
        if not self._everybody & ~(self._added[part] | away | 1 << self.me):
            self._finish(part)

    def _finish(self, part: int) -> None:
        begin, end = self._spans[part]
        if self._weights[self.me] > 0 and self.me not in self._barred:
            self._add(part, self.me, self._vector[begin:end])
        for late in range(self._n):
            if self._everybody & ~self._added[part] & ~(1 << self.me) & 1 << late and late not in self._lost:
                self._barred.setdefault(late, "sent nothing in time")
        reducer = self._reducers.pop(part, None)
        contributors = self._added[part]
        if reducer is None or contributors.bit_count() < min(2, self._everybody.bit_count()):
            self._miss(part)
            for to in range(self._n):
                self._tell(to, {"t": "gone", "p": [part]})
            return
        mean = reducer.finish()
        if len(mean) != end - begin:
            raise LocalError("the reducer returned another length than it was given")
        self._askers.pop(part, None)
        self._result.hold(part, self._codec.encode(mean), self.me, contributors, None)
        deputy = self.roster.deputy(self.me)
        if self._owners[part] != self.me:
            self._hand(part, *range(self._n))
            return
        self._unacked.add(part)
        if deputy in self._lost:
            self._spread(part)
        else:
            self._hand(part, deputy)

    def _spread(self, part: int) -> None:
        if part in self._unacked:
            self._unacked.discard(part)
            deputy = self.roster.deputy(self.me)
            self._hand(part, *[to for to in range(self._n) if to != deputy])

    def _take_over(self) -> None:
        """As deputy: reduce what the reducer, lost or late, has not handed over."""
        if self._took_over or self._schedule.passed >= TAKEN_BY:
            return
        self._took_over = True
        principal = (self.me - 1) % self._n
        parts = [
            part
            for part, owner in enumerate(self._owners)
            if owner == principal and self._status[part] is Part.PENDING
        ]
        if parts:
            self._added |= dict.fromkeys(parts, 0)
            for to in range(self._n):
                self._tell(to, {"t": "want", "p": parts})
            self._reduce_own()

    def _wanted(self, deputy: int, parts: Sequence[int]) -> None:
        """The deputy reduces these parts now."""
        for part in parts:
            if self.roster.deputy(self._owners[part]) != deputy:
                raise RemoteError("a deputy that wants another one's parts")
            if part in self._moved:
                raise RemoteError("a deputy that wants a part twice")
            self._moved.add(part)
            if self._status[part] is Part.HELD:
                if part not in self._unacked:  # else it is on its way
                    self._hand(part, deputy)
                continue
            self._added.pop(part, None)
            self._reducers.pop(part, None)
            if self._weights[self.me] > 0:
                begin, end = self._spans[part]
                own = self._codec.encode(self._vector[begin:end])
                self._tell(deputy, {"t": "raw", "p": part}, own)

    # -- as receiver and deputy

    def _mean(self, sender: int, part: int, header: Mapping[str, Any], payload: memoryview) -> None:
        owner = self._owners[part]
        deputy = self.roster.deputy(owner)
        reducer = fields.integer(header, "rd", 0, self._n - 1)
        asked_for = self._took_over and self.me == deputy
        if (
            reducer not in (owner, deputy)
            or reducer == self.me
            or not (sender in (owner, deputy) or asked_for)
        ):
            raise RemoteError("a mean from one who did not reduce it")
        contributors = fields.integer(header, "by", 1, (1 << self._n) - 1)
        signature = fields.blob(header, "sig", 64, 64)
        if len(payload) != self._wire_size(part):
            raise RemoteError("a mean of the wrong length")
        if part in self._unacked:
            self._unacked.discard(part)
            self._result.replace(part, payload, reducer, contributors, signature)
        elif self._status[part] is not Part.HELD:
            self._result.hold(part, payload, reducer, contributors, signature)
            self._reducers.pop(part, None)
            if part in self._askers:
                self._answer_all(part)
        if sender == owner and self.me == deputy and self._result.proofs[part].reducer == owner:
            self._tell(owner, {"t": "ack", "p": part})
            if part == self._auditor.part and self._schedule.passed < RAW_BY:
                self._begin_audit(part)

    def _miss(self, part: int) -> None:
        if self._status[part] is Part.PENDING:
            self._result.miss(part)
            if part in self._askers:
                self._answer_all(part)

    def _answer_all(self, part: int) -> None:
        for asker in sorted(self._askers.pop(part)):
            self._answer(asker, part)

    def _asked_by(self, sender: int, parts: Sequence[int]) -> None:
        for part in parts:
            if self.roster.deputy(self._owners[part]) != self.me:
                raise RemoteError("a question for another deputy")
            if self._status[part] is Part.PENDING:
                self._askers.setdefault(part, set()).add(sender)
            else:
                self._answer(sender, part)

    def _answer(self, asker: int, part: int) -> None:
        if self._status[part] is Part.HELD:
            self._hand(part, asker)
        else:
            self._tell(asker, {"t": "gone", "p": [part]})

    def _gone(self, sender: int, parts: Sequence[int]) -> None:
        for part in parts:
            owner = self._owners[part]
            told = part in self._asked or part in self._moved
            if sender != owner and not (sender == self.roster.deputy(owner) and told):
                raise RemoteError("gone, says one who was not asked")
            self._miss(part)

    # -- audit

    def _begin_audit(self, part: int) -> None:
        begin, end = self._spans[part]
        contributors = self._result.proofs[part].contributors & self._everybody
        mean, own = self._result.vector[begin:end], self._vector[begin:end]
        for other in self._auditor.begin(mean, contributors, own, self._lost):
            self._tell(other, {"t": "audit", "p": part})

    def _show(self, deputy: int, part: int) -> None:
        self._auditor.show(deputy, part)
        begin, end = self._spans[part]
        own = self._codec.encode(self._vector[begin:end]) if self._weights[self.me] > 0 else b""
        self._tell(deputy, {"t": "audited", "p": part}, own)

    def _audited(self, sender: int, part: int, payload: memoryview) -> None:
        if self._auditor.answered(sender, part, payload):
            why = f"its mean of part {part} is not the mean of what was sent (audit)"
            self._barred[self._owners[part]] = why
            self._result.disown(part)

    # -- agreement and end

    def _advance(self) -> None:
        """Report once nothing is pending, take a turn as owner of a ballot, pass messages on, finish."""
        verdict, result = self._verdict, self._result
        auditing = self._auditor.running is not None and self._schedule.passed < ACK_BY
        if not result.pending and not auditing and self.me not in verdict.reports:
            verdict.report(b"".join(result.digests))
        if self.me in verdict.reports and not verdict.started:
            silent = [i for i in range(self._n) if i not in verdict.reports and i not in self._lost]
            mine = all(earlier in self._lost for earlier in range(self.me)) and not silent
            if mine or self._schedule.passed >= self._schedule.turn:
                verdict.start()
        for note in verdict.out:
            self._tell(note.to, note.header, note.payload)
        verdict.out.clear()
        if verdict.decided is not None and not self.done:
            self._end(verdict.decided)

    def _end(self, value: Value) -> None:
        counted = [part for part in range(len(self._spans)) if value.digest(part) != NOTHING]
        if self._spans and not counted:
            self.failed = "no part was averaged by all"
            return
        digests, proofs = self._result.digests, self._result.proofs
        if any(digests[part] != value.digest(part) for part in counted):
            self.failed = PARTS_MISSED
            return
        drops = {**self._barred, **self._lost}
        for i in range(self._n):
            if not value.mask >> i & 1:
                drops.setdefault(i, "did not finish")
        sources = {part: (proofs[part].contributors, digests[part]) for part in counted}
        vector = self._result.finish(counted, self._vector)
        self.outcome = Outcome.of(self.roster, vector, sources, value.mask, drops)

    # -- helpers

    def _hand(self, part: int, *members: int) -> None:
        header, payload = self._result.message(part)
        for to in members:
            self._tell(to, header, payload)

    def _wire_size(self, part: int) -> int:
        begin, end = self._spans[part]
        return self._codec.size(end - begin)

    def _tell(self, to: int, header: dict[str, Any], payload: Buffer = b"") -> None:
        if to != self.me and to not in self._lost:
            self.out.append(Send(to, header, payload))

    def _part(self, header: Mapping[str, Any]) -> int:
        return fields.integer(header, "p", 0, len(self._spans) - 1)

    def _parts(self, header: Mapping[str, Any]) -> list[int]:
        parts = fields.array(header, "p", MAX_PARTS)
        return [fields.integer({"p": part}, "p", 0, len(self._spans) - 1) for part in parts]
