"""What work is worth, and whose it was: receipts judged, compute and presence credited, totals recomputed.

Theory of operation. A trainer submits receipts (``stage.receipts``). ``Rules.read`` believes one only if
the submitter is the trainer that issued its ticket, the manifest lists it, and every stage of the run
signed, each for the one before; ``Rules.credit`` then asks for each peer whose it was when it held a
certificate for exactly that stage at that time, and works out what the microbatch was worth there by the
FLOPs formula of the manifest's model. What a worker says of itself enters nowhere. A ticket is credited
once, whoever submits it.

Presence: a peer earns 1 PFLOP an hour while it is seen by others. It is credited from one sighting to
the next, where these are not further apart than ``gap_s``; so several authorities that look at the same peer
credit its time once, and a peer that nobody sees earns nothing.

Amounts are whole MFLOP, so that sums are exact in any order and a recomputation has to agree to the last
digit; 63 bits hold 9 billion PFLOP. ``audit`` reads every stored receipt again and compares what follows
from them with the ledger and with the balances. Pure: time, tenures and rows are arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import attrs

from agorad.run import Manifest
from p2p.errors import RemoteError
from p2p.identity import PeerId
from stage.config import ModelConfig
from stage.parameters import ticket_flops
from stage.receipts import Receipt

MFLOP: Final = 10**6
MFLOP_A_PFLOP: Final = 10**9
PRESENCE_PFLOP_H: Final = 1.0
CLOCK_S: Final = 60.0
"""How far a trainer's clock may be ahead, and how long before or after a certificate its time may lie."""
OLDEST_S: Final = 30 * 86_400.0
"""A trainer keeps receipts while no authority is there, but not for ever."""

Holder = Callable[[str, int, float], str | None]
"""The account of a peer, if it held a certificate for a stage at a time."""


@attrs.frozen(kw_only=True)
class Credit:
    """What one peer did for one microbatch."""

    account: str
    peer_id: PeerId
    mflop: int


@attrs.frozen(kw_only=True)
class StoredReceipt:
    """A receipt that was believed, and who is credited for it."""

    ticket: str
    at: float
    packed: bytes = attrs.field(repr=False)
    credits: tuple[Credit, ...]


@attrs.frozen(kw_only=True)
class Rules:
    """What a receipt is judged by: the manifest, and nothing else."""

    run: str
    trainers: frozenset[PeerId]
    model: ModelConfig

    @classmethod
    def of(cls, manifest: Manifest) -> Rules:
        """The rules of a run."""
        trainers = frozenset(ref.peer_id for ref in manifest.trainers)
        return cls(run=manifest.run.id, trainers=trainers, model=manifest.model)

    def read(self, packed: bytes, submitter: PeerId, now: float) -> Receipt:
        """The receipt if its signatures and its chain hold. Raises RemoteError with the reason."""
        receipt = Receipt.decode(packed)
        if receipt.ticket.trainer != submitter:
            raise RemoteError("the ticket is another trainer's than the one that submits it")
        if receipt.at > now + CLOCK_S:
            raise RemoteError(f"it was answered {receipt.at - now:.0f} s from now; compare the clocks")
        if receipt.at < now - OLDEST_S:
            raise RemoteError(f"it is {(now - receipt.at) / 86_400:.0f} days old")
        receipt.check(self.run, self.trainers, self.model.stages)
        return receipt

    def credit(self, receipt: Receipt, packed: bytes, holder: Holder) -> StoredReceipt:
        """Who is credited with what. RemoteError if a peer was not there for its stage."""
        credits = []
        for stage, peer in enumerate(receipt.peers):
            account = holder(peer, stage, receipt.at)
            if account is None:
                raise RemoteError(f"{peer} held no certificate for stage {stage} at that time")
            credits.append(
                Credit(account=account, peer_id=peer, mflop=self.mflop(stage, receipt.ticket.kind))
            )
        return StoredReceipt(ticket=receipt.ticket.id, at=receipt.at, packed=packed, credits=tuple(credits))

    def mflop(self, stage: int, kind: str) -> int:
        """What one microbatch is worth at a stage; at least 1, so that a toy model counts too."""
        return max(1, ticket_flops(self.model, stage, kind) // MFLOP)


def presence_mflop(seconds: float) -> int:
    """What being seen for so long is worth."""
    return round(seconds * PRESENCE_PFLOP_H * MFLOP_A_PFLOP / 3600)


def pflop(mflop: int) -> float:
    """For people."""
    return mflop / MFLOP_A_PFLOP


@attrs.frozen(kw_only=True)
class Balance:
    """What a peer has earned so far."""

    peer_id: str
    account: str
    compute: int
    """MFLOP, as below."""
    presence: int
    active_s: float
    joined: float
    """Unix time of the first grant."""
    seen: float
    """Unix time when it was last seen or credited; 0: never."""


@attrs.frozen(kw_only=True)
class Audit:
    """What the stored receipts say, against what was credited."""

    receipts: int
    compute: dict[str, int]
    """MFLOP by account, from the receipts alone."""
    presence: dict[str, int]
    """MFLOP by account, from the ledger's rows."""
    troubles: tuple[str, ...]
    """Every difference, as a sentence; empty if all agrees."""


def audit(
    rules: Rules,
    receipts: Iterable[bytes],
    holder: Holder,
    ledger: Mapping[tuple[str, str], int],
    balances: Iterable[Balance],
) -> Audit:
    """Recompute the ledger. ``ledger``: sums of its rows by account and kind."""
    compute: Counter[str] = Counter()
    tickets: set[str] = set()
    troubles: list[str] = []
    count = 0
    for packed in receipts:
        count += 1
        try:
            receipt = Receipt.decode(packed)
            receipt.check(rules.run, rules.trainers, rules.model.stages)
            stored = rules.credit(receipt, packed, holder)
        except RemoteError as error:
            troubles.append(f"stored receipt {count} would not be believed today: {error}")
            continue
        if stored.ticket in tickets:
            troubles.append(f"ticket {stored.ticket} is stored twice")
            continue
        tickets.add(stored.ticket)
        for credit in stored.credits:
            compute[credit.account] += credit.mflop
    sums = {"compute": Counter[str](), "presence": Counter[str]()}
    for (account, kind), mflop in ledger.items():
        sums[kind][account] += mflop
    kept = {"compute": Counter[str](), "presence": Counter[str]()}
    for balance in balances:
        kept["compute"][balance.account] += balance.compute
        kept["presence"][balance.account] += balance.presence
    troubles += _differences("receipts", compute, "the ledger", sums["compute"])
    for kind in kept:
        troubles += _differences(f"the ledger's {kind} rows", sums[kind], "the balances", kept[kind])
    return Audit(
        receipts=count, compute=dict(compute), presence=dict(sums["presence"]), troubles=tuple(troubles)
    )


def _differences(what: str, one: Mapping[str, int], other_what: str, other: Mapping[str, int]) -> list[str]:
    return [
        f"account {account!r}: {one.get(account, 0)} MFLOP by {what}, {other.get(account, 0)} by {other_what}"
        for account in sorted({*one, *other})
        if one.get(account, 0) != other.get(account, 0)
    ]
