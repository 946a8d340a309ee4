"""Receipts, what they are worth, and the books: nobody is credited for what no trainer issued and had
answered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agorad.authority.books import Books
from agorad.authority.leaderboard import ROWS, Credited, Leaderboard, Row, rank
from agorad.authority.ledger import OLDEST_S, Balance, Rules, StoredReceipt, presence_mflop
from agorad.authority.store import Grant, Store
from agorad.outbox import Outbox
from p2p.errors import LocalError, RemoteError
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from stage.config import ModelConfig
from stage.messages import Answer, Load, reply_from_wire
from stage.parameters import forward_flops, parameter_specs, ticket_flops
from stage.presets import preset
from stage.receipts import MAX_STAGES, RECEIPT_LIMIT, Receipt, check_chain, sign
from stage.ticket import Ticket

NOW = 1_800_000_000.0
STAGES = 3
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1))


def key(number: int) -> Identity:
    return Identity.generate(bytes([number]) * 32)


TRAINER, MATE, STRANGER, OTHER = key(1), key(2), key(3), key(4)
WORKERS = [key(10 + stage) for stage in range(STAGES)]
RULES = Rules(run="run", trainers=frozenset({TRAINER.peer_id, MATE.peer_id}), model=MODEL)


def ticket(position: int = 0, *, by: Identity = TRAINER, run: str = "run", kind: str = "train") -> Ticket:
    unsigned = Ticket(
        run=run, trainer=by.peer_id, kind=kind, shard=0, position=position,
        ids_hash=position.to_bytes(32, "big"), weight=1.0,
    )  # fmt: skip
    return unsigned.signed_by(by)


def receipt(
    issued: Ticket | None = None,
    *,
    workers: list[Identity] = WORKERS,
    at: float = NOW,
    signer: Identity = TRAINER,
    statements: dict[int, bytes] | None = None,
) -> Receipt:
    """A true one, unless something is said: each worker signs for the one before."""
    issued = issued or ticket()
    callers = [issued.trainer, *(worker.peer_id for worker in workers)]
    signed = [sign(worker, issued, stage, callers[stage]) for stage, worker in enumerate(workers)]
    for stage, signature in (statements or {}).items():
        signed[stage] = signature
    peers = tuple(worker.peer_id for worker in workers)
    return Receipt(ticket=issued, at=at, peers=peers, statements=tuple(signed)).signed_by(signer)


# Statements and receipts


def test_a_true_receipt_holds_and_reads_back() -> None:
    true = receipt()
    assert Receipt.decode(true.encode()) == true
    true.check("run", RULES.trainers, STAGES)
    assert RULES.read(true.encode(), TRAINER.peer_id, NOW) == true
    first = check_chain(true.ticket, first=1, stages=3, peers=true.peers, signatures=true.statements[1:])
    assert first is None


def forged() -> Iterator[tuple[str, Receipt]]:
    """By what is wrong with it."""
    one, two, three = WORKERS
    honest = ticket()
    yield "not signed", receipt(statements={1: bytes(64)})
    yield "another key", receipt(statements={1: sign(STRANGER, honest, 1, one.peer_id)})
    yield "another ticket", receipt(statements={1: sign(two, ticket(7), 1, one.peer_id)})
    yield (
        "same ticket, other ids",
        receipt(statements={1: sign(two, attrs.evolve(honest, ids_hash=bytes([9]) * 32), 1, one.peer_id)}),
    )
    yield "another run's", receipt(statements={1: sign(two, ticket(run="other"), 1, one.peer_id)})
    yield (
        "another kind's",
        receipt(ticket(kind="train"), statements={1: sign(two, ticket(kind="eval"), 1, one.peer_id)}),
    )
    yield "wrong upstream", receipt(statements={1: sign(two, honest, 1, STRANGER.peer_id)})
    yield "wrong upstream of the head", receipt(statements={0: sign(one, honest, 0, MATE.peer_id)})
    yield "another stage", receipt(statements={1: sign(two, honest, 2, one.peer_id)})
    yield "missing stage", receipt(workers=[one, two])
    yield "stage twice", receipt(workers=[one, two, three, OTHER])
    yield "one peer at two stages", receipt(workers=[one, two, one])
    yield (
        "stages swapped",
        attrs.evolve(receipt(), peers=(one.peer_id, three.peer_id, two.peer_id)).signed_by(TRAINER),
    )
    yield (
        "peer replaced",
        attrs.evolve(receipt(), peers=(one.peer_id, OTHER.peer_id, three.peer_id)).signed_by(TRAINER),
    )
    yield "ticket of another run", receipt(ticket(run="other"))
    yield "ticket not signed", receipt(attrs.evolve(honest, signature=bytes(64)))
    yield "ticket signed for other ids", receipt(attrs.evolve(honest, ids_hash=bytes([9]) * 32))
    yield "trainer not listed", receipt(ticket(by=STRANGER), signer=STRANGER)
    yield "ticket minted by a worker", receipt(ticket(by=one), signer=one)
    yield "closed by somebody else", receipt(signer=STRANGER)
    yield "closed by another trainer", receipt(signer=MATE)
    yield "time changed", attrs.evolve(receipt(), at=NOW - 1)


@pytest.mark.parametrize(("what", "false"), [pytest.param(*pair, id=pair[0]) for pair in forged()])
def test_a_false_receipt_is_not_believed(what: str, false: Receipt) -> None:
    for submitter in (false.ticket.trainer, TRAINER.peer_id):
        with pytest.raises(RemoteError):
            RULES.read(false.encode(), submitter, NOW)


def test_only_the_tickets_own_trainer_hands_it_in_and_in_time() -> None:
    true = receipt().encode()
    for submitter in (MATE.peer_id, WORKERS[0].peer_id):
        with pytest.raises(RemoteError, match="another trainer's"):
            RULES.read(true, submitter, NOW)
    with pytest.raises(RemoteError, match="compare the clocks"):
        RULES.read(true, TRAINER.peer_id, NOW - 100)
    with pytest.raises(RemoteError, match="days old"):
        RULES.read(true, TRAINER.peer_id, NOW + OLDEST_S + 1)


def test_two_colluding_peers_cannot_mint_receipts() -> None:
    """They have each other's signatures, every old ticket, and all that ever passed by; no trainer's key."""
    one, two = WORKERS[0], WORKERS[1]
    old = receipt()
    for issued in (
        ticket(1, by=one),  # their own
        attrs.evolve(ticket(1, by=one), trainer=TRAINER.peer_id),  # in the trainer's name
        attrs.evolve(old.ticket, position=1),  # an old one, renumbered
        attrs.evolve(old.ticket, kind="eval"),
        attrs.evolve(old.ticket, shard=1),
        attrs.evolve(old.ticket, weight=2.0),
    ):
        for signer in (one, two):
            minted = receipt(issued, workers=[one, two, WORKERS[2]], signer=signer)
            for submitter in (one.peer_id, TRAINER.peer_id):
                with pytest.raises(RemoteError):
                    RULES.read(minted.encode(), submitter, NOW)
    # Nor can they put one of them in another's place in a receipt that the trainer closed.
    for stage in range(STAGES):
        peers = list(old.peers)
        peers[stage] = OTHER.peer_id
        caller = TRAINER.peer_id if stage == 0 else peers[stage - 1]
        statements = list(old.statements)
        statements[stage] = sign(OTHER, old.ticket, stage, caller)
        changed = attrs.evolve(old, peers=tuple(peers), statements=tuple(statements))
        with pytest.raises(RemoteError):
            RULES.read(changed.encode(), TRAINER.peer_id, NOW)


def test_bytes_that_are_no_receipt() -> None:
    true = receipt()
    row = msgpack.unpackb(true.encode())
    bad: list[Any] = [
        b"", b"\xff", msgpack.packb({}), msgpack.packb([]), msgpack.packb([[]] * 5), bytes(RECEIPT_LIMIT + 1),
        true.encode() + b"\0", true.encode()[:-1], b"\x91" * 5000,
    ]  # fmt: skip
    changes: list[tuple[int, Any]] = [
        (0, 2), (1, []), (2, 1), (2, float("nan")), (3, []), (3, [["x"]]), (3, [["", bytes(64)]]),
        (3, [["x", bytes(63)]]), (3, [["x" * 65, bytes(64)]]), (4, b""), (4, "x" * 64),
    ]  # fmt: skip
    for at, value in changes:
        bad.append(msgpack.packb([*row[:at], value, *row[at + 1 :]]))
    bad.append(msgpack.packb(row, use_single_float=True))  # another spelling
    for data in bad:
        with pytest.raises(RemoteError):
            Receipt.decode(data)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_receipts_never_crash_and_never_hold(noise: bytes, at: int) -> None:
    true = receipt().encode()
    data = true[:at] + noise + true[at + len(noise) :]
    try:
        found = RULES.read(data, TRAINER.peer_id, NOW)
    except RemoteError:
        return
    assert found.encode() == true


def test_what_32_stages_sign_fits_a_header() -> None:
    issued = ticket()
    workers = [Identity.generate(bytes([100 + number]) * 32) for number in range(32)]
    whole = receipt(issued, workers=workers)
    whole.check("run", RULES.trainers, 32)
    answer = Answer(
        loss=1.0, c_hash=b"", path=[TRAINER.peer_id, *whole.peers], load=Load(1), stale=False,
        receipts=list(whole.statements),
    )  # fmt: skip
    wire = msgpack.packb(answer.to_wire())
    assert len(wire) < 5_000 < Limits().header
    assert reply_from_wire(msgpack.unpackb(wire)) == answer
    most = [Identity.generate(bytes([number, 1]) * 16) for number in range(MAX_STAGES)]
    assert len(receipt(issued, workers=most).encode()) < RECEIPT_LIMIT
    assert Receipt.decode(receipt(issued, workers=most).encode()).peers == tuple(w.peer_id for w in most)


# What it is worth


def test_credits_follow_the_formula_of_the_model() -> None:
    for stage in range(STAGES):
        weights = sum(s.numel for s in parameter_specs(MODEL, stage) if s.name != "embed")
        forward = MODEL.seq * (2 * weights + 4 * MODEL.layers[stage] * MODEL.d * MODEL.seq)
        assert ticket_flops(MODEL, stage, "eval") == forward_flops(MODEL, stage) == forward
        assert ticket_flops(MODEL, stage, "train") == 3 * forward
    # The reference system's own figures for its 8B run (forward, TFLOP: 13.2, 8.80, 24.5).
    model = preset("8b")[0]
    figures = [forward_flops(model, stage) / 1e12 for stage in (0, 1, 6)]
    assert figures == pytest.approx([13.2, 8.8, 24.5], rel=0.01)


def test_presence_is_a_pflop_an_hour() -> None:
    assert presence_mflop(3600) == 10**9
    assert sum(presence_mflop(60) for _ in range(60)) == pytest.approx(10**9, rel=1e-6)


# The books


class Desk:
    """A store with grants, and what points are made of."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "authority.sqlite")

    @property
    def books(self) -> Books:
        return self.store.books

    def grant(
        self, worker: Identity, stage: int, account: str, issued: float = NOW - 60, for_s: float = 3600
    ) -> None:
        self.store.grant(
            Grant(peer_id=worker.peer_id, account=account, stage=stage, issued=issued, expires=issued +
            for_s), max_nodes=99, max_per_account=99, now=issued,
        )  # fmt: skip

    def credit(self, *receipts: Receipt, now: float = NOW, grace_s: float = 600.0) -> set[str]:
        stored = []
        for one in receipts:
            packed = one.encode()
            read = RULES.read(packed, one.ticket.trainer, now)
            stored.append(RULES.credit(read, packed, lambda p, s, a: self.books.held(p, s, a, grace_s)))
        return self.books.add_receipts(stored, now)

    def compute(self) -> dict[str, int]:
        return {balance.peer_id: balance.compute for balance in self.books.balances()}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    for stage, worker in enumerate(WORKERS):
        made.grant(worker, stage, "alice" if stage else "bob")
    yield made
    made.store.close()


def test_each_stage_is_credited_once_a_ticket(desk: Desk) -> None:
    assert desk.credit(receipt()) == {"train:0:0"}
    expected = {worker.peer_id: ticket_flops(MODEL, s, "train") // 10**6 for s, worker in enumerate(WORKERS)}
    assert desk.compute() == expected
    for again in (receipt(), receipt(at=NOW - 5)):  # replayed, and closed again with another time
        assert desk.credit(again) == set()
    assert desk.compute() == expected
    new = desk.credit(receipt(), receipt(ticket(1)), receipt(ticket(2, kind="eval")))
    assert new == {"train:0:1", "eval:0:2"}
    assert desk.compute() == {
        worker.peer_id: 2 * expected[worker.peer_id] + ticket_flops(MODEL, s, "eval") // 10**6
        for s, worker in enumerate(WORKERS)
    }


def test_the_same_ticket_twice_in_one_batch_counts_once(desk: Desk) -> None:
    packed = receipt().encode()
    one = RULES.credit(receipt(), packed, lambda p, s, a: desk.books.held(p, s, a, 0.0))
    assert desk.books.add_receipts([one, one], NOW) == {"train:0:0"}
    assert desk.compute()[WORKERS[0].peer_id] == one.credits[0].mflop


@pytest.mark.parametrize(
    ("what", "at"),
    [("before the grant", NOW - 200), ("after the grace", NOW - 60 + 3600 + 600 + 61)],
)
def test_who_held_no_certificate_at_that_time_is_not_credited(desk: Desk, what: str, at: float) -> None:
    with pytest.raises(RemoteError, match="held no certificate for stage 0"):
        desk.credit(receipt(at=at), now=at)
    assert set(desk.compute().values()) == {0}


def test_certificates_are_honoured_to_the_end_of_their_grace(desk: Desk) -> None:
    late = NOW - 60 + 3600 + 599
    assert desk.credit(receipt(at=late), now=late)


def test_a_stage_that_a_peer_was_not_let_in_for_earns_nothing(desk: Desk) -> None:
    one, two, _three = WORKERS
    desk.grant(OTHER, 1, "carol")
    for workers in ([OTHER, two, WORKERS[2]], [one, two, OTHER], [one, STRANGER, WORKERS[2]]):
        with pytest.raises(RemoteError, match="held no certificate for stage"):
            desk.credit(receipt(workers=workers))
    # The peer changed its stage: each is credited for the time when it had it.
    desk.grant(OTHER, 2, "carol", issued=NOW + 3600)
    assert desk.credit(receipt(ticket(1), workers=[one, OTHER, WORKERS[2]], at=NOW), now=NOW + 3700)
    with pytest.raises(RemoteError, match="held no certificate for stage 2"):
        desk.credit(receipt(ticket(2), workers=[one, two, OTHER], at=NOW), now=NOW + 3700)


def test_renewals_continue_a_tenure_and_a_gap_does_not(desk: Desk) -> None:
    worker = key(50)
    for issued in (0.0, 500.0, 900.0, 5000.0):
        desk.grant(worker, 0, "dora", issued=issued, for_s=1000.0)
    expected = {-61.0: None, 0.0: "dora", 1900.0: "dora", 3000.0: None, 5001.0: "dora", 6100.0: None}
    assert {at: desk.books.held(worker.peer_id, 0, at, 0.0) for at in expected} == expected


def test_claiming_more_changes_nothing(desk: Desk) -> None:
    """There is no field for it: a receipt with one more does not decode, and only the formula counts."""
    desk.credit(receipt())
    before = desk.compute()
    row = msgpack.unpackb(receipt(ticket(1)).encode())
    for more in ([*row, 10**12], [*row[:3], [[*hop, 10**12] for hop in row[3]], row[4]]):
        with pytest.raises(RemoteError):
            RULES.read(msgpack.packb(more), TRAINER.peer_id, NOW)
    heavy = attrs.evolve(ticket(1), weight=64.0).signed_by(TRAINER)
    desk.credit(receipt(heavy))
    assert desk.compute() == {peer: 2 * mflop for peer, mflop in before.items()}


def test_presence_is_the_time_between_sightings(desk: Desk) -> None:
    peer = WORKERS[0].peer_id
    for seconds in (0, 60, 120, 120, 90, 1000, 1060):  # twice by two authorities, once late, once away
        desk.books.add_presence([(peer, NOW + seconds), (STRANGER.peer_id, NOW + seconds)], gap_s=150)
    balance = desk.books.balance(peer)
    assert balance is not None
    assert (balance.presence, balance.active_s) == (3 * presence_mflop(60), 180.0)
    assert desk.books.balance(STRANGER.peer_id) is None


def test_the_ledger_follows_from_the_receipts(desk: Desk) -> None:
    desk.grant(OTHER, 1, "carol")
    for number in range(20):
        workers = [WORKERS[0], OTHER if number % 3 else WORKERS[1], WORKERS[2]]
        desk.credit(receipt(ticket(number), workers=workers), receipt(ticket(number // 2)))
    desk.books.add_presence([(OTHER.peer_id, NOW)], gap_s=150)
    desk.books.add_presence([(OTHER.peer_id, NOW + 60)], gap_s=150)
    found = desk.books.recompute(RULES)
    assert (found.receipts, found.troubles) == (20, ())
    totals: dict[str, int] = {}
    for balance in desk.books.balances():
        totals[balance.account] = totals.get(balance.account, 0) + balance.compute
    assert found.compute == totals
    assert found.presence == {"carol": presence_mflop(60)}


@pytest.mark.parametrize(
    ("tampering", "trouble"),
    [
        ("UPDATE balances SET compute = compute + 1 WHERE account = 'bob'", "by the balances"),
        ("UPDATE ledger SET mflop = mflop + 1 WHERE account = 'bob'", "by the ledger"),
        ("UPDATE ledger SET account = 'mallory' WHERE account = 'bob'", "'mallory'"),
        (
            "INSERT INTO ledger (at, account, peer_id, kind, mflop, receipts, first_ticket) "
            "SELECT at, account, peer_id, kind, mflop, 1, '' FROM ledger LIMIT 1",
            "by receipts",
        ),
        ("DELETE FROM receipts WHERE ticket = 'train:0:0'", "by receipts"),
        ("UPDATE receipts SET packed = x'00' WHERE ticket = 'train:0:0'", "would not be believed"),
        ("UPDATE tenures SET account = 'mallory' WHERE account = 'bob'", "'mallory'"),
    ],
)
def test_whatever_is_changed_behind_the_books_shows(desk: Desk, tampering: str, trouble: str) -> None:
    desk.credit(receipt(), receipt(ticket(1)))
    with desk.books.transact() as execute:
        execute(tampering, {})
    assert any(trouble in sentence for sentence in desk.books.recompute(RULES).troubles)


def test_a_crash_between_leaves_all_or_nothing(desk: Desk, tmp_path: Path) -> None:
    """A disk that fails in the middle of a batch: nothing of it is there, and it can come again."""

    class DiskError(Exception):
        pass

    true = receipt()
    stored = RULES.credit(true, true.encode(), lambda p, s, a: desk.books.held(p, s, a, 0.0))
    left = [0]

    def count(execute: Callable[..., Any]) -> Callable[..., Any]:
        def counted(statement: str, values: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise DiskError
            return execute(statement, values)

        return counted

    @contextlib.contextmanager
    def transact(*, snapshot: bool = False) -> Iterator[Any]:
        with desk.books.transact(snapshot=snapshot) as execute:
            yield count(execute)

    for allowed in range(7):
        left[0] = allowed
        with pytest.raises(DiskError):
            Books(transact).add_receipts([stored], NOW)
        assert set(desk.compute().values()) == {0}
        found = desk.books.recompute(RULES)
        assert (found.receipts, found.troubles) == (0, ())
    assert desk.books.add_receipts([stored], NOW) == {stored.ticket}


# The leaderboard


def balance(account: str, compute: int = 0, presence: int = 0, **more: Any) -> Balance:
    fields = {"active_s": 0.0, "joined": 1.0, "seen": 0.0, **more}
    peer = f"{account}-{compute}"
    return Balance(peer_id=peer, account=account, compute=compute, presence=presence, **fields)


def test_accounts_are_ranked_by_what_their_nodes_earned_together() -> None:
    rows = rank(
        [
            balance("bob", 5 * 10**9, joined=7.0, seen=NOW),
            balance("bob", 0, 10**9, active_s=3600.0, joined=3.0),
            balance("amy", 6 * 10**9),
            balance("eve", 9 * 10**9, seen=NOW),
            balance("new"),
        ],
        {"eve"},
        NOW + 10,
    )
    assert [(row.rank, row.user, row.score, row.status) for row in rows] == [
        (1, "eve", 9.0, "banned"), (2, "amy", 6.0, "away"), (2, "bob", 6.0, "active"),
        (4, "new", 0.0, "away"),
    ]  # fmt: skip
    assert (rows[2].active_h, rows[2].joined, rows[2].compute, rows[2].presence) == (1.0, 3.0, 5.0, 1.0)


def test_the_longest_leaderboard_fits_a_header_and_reads_back() -> None:
    rows = rank([balance("x" * 60 + f"{n:04}", n) for n in range(ROWS)], (), NOW)
    board = Leaderboard(rows=tuple(rows), accounts=ROWS, own=rows[0], node=(1.0, 2.0), at=NOW)
    wire = msgpack.packb(board.to_header())
    assert len(wire) < Limits().header
    assert Leaderboard.from_header(msgpack.unpackb(wire)) == board
    worst = Credited(new=0, known=0, refused=(("generate:2147483647:9223372036854775807", "x" * 160),) * 256)
    wire = msgpack.packb(worst.to_header())
    assert len(wire) < Limits().header
    assert Credited.from_header(msgpack.unpackb(wire)) == worst


def test_answers_of_nonsense_are_refused() -> None:
    row = Row(rank=1, user="a", active_h=0.0, joined=0.0, compute=0.0, presence=0.0, score=0.0, status="away")
    good = Leaderboard(rows=(row,), accounts=1, own=None, node=None, at=NOW).to_header()
    changes: list[dict[str, Any]] = [
        {"rows": [[]]}, {"rows": [row.to_wire()] * (ROWS + 1)}, {"node": [1.0]}, {"own": 1}, {"at": 1},
        {"accounts": -1}, {"t": "x"}, {"node": [-1.0, 0.0]}, {"rows": [[*row.to_wire()[:-1], "king"]]},
        {"rows": [[1, "a", float("nan"), 0.0, 0.0, 0.0, 0.0, "away"]]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(RemoteError):
            Leaderboard.from_header(good | change)
    for answer in ({}, {"t": "credited", "new": -1, "known": 0, "refused": []},
                   {"t": "credited", "new": 0, "known": 0, "refused": [["x", 1]]},
                   {"t": "credited", "new": 0, "known": 0, "refused": [["x", "y" * 1000]]}):  # fmt: skip
        with pytest.raises(RemoteError):
            Credited.from_header(answer)


# The trainer's outbox


def drained(outbox: Outbox, most: int = 7) -> list[bytes]:
    found = []
    while batch := outbox.batch(most, 1 << 20):
        found += batch
        outbox.done(len(batch))
    return found


def test_the_outbox_gives_in_order_and_survives_a_restart(tmp_path: Path) -> None:
    records = [f"record {number}".encode() * (number % 5 + 1) for number in range(100)]
    outbox = Outbox(tmp_path / "box", segment_bytes=300)
    for record in records[:60]:
        assert outbox.append(record) == 0
    first = outbox.batch(4, 1 << 20)
    assert first == records[:4]
    outbox.done(3)
    assert outbox.batch(4, 1 << 20) == records[3:7]
    assert outbox.waiting == 57
    again = Outbox(tmp_path / "box", segment_bytes=300)  # the first one was killed
    assert again.waiting == 60
    for record in records[60:]:
        again.append(record)
    assert drained(again) == records
    assert again.waiting == 0
    assert list((tmp_path / "box").iterdir()) == []


def test_a_batch_is_bounded_by_bytes_but_never_empty(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "box")
    for size in (50, 50, 500, 10):
        outbox.append(bytes(size))
    sizes = []
    while batch := outbox.batch(9, 100):
        sizes.append([len(record) for record in batch])
        outbox.done(len(batch))
    assert sizes == [[50, 50], [500], [10]]


def test_the_oldest_go_when_there_is_no_room_even_while_they_are_handed_in(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "box", segment_bytes=10, segments=3)
    for number in range(3):
        assert outbox.append(bytes([number]) * 20) == 0
    assert outbox.batch(1, 100) == [bytes([0]) * 20]
    assert outbox.append(bytes([3]) * 20) == 1
    outbox.done(1)  # of what was dropped meanwhile
    assert drained(outbox) == [bytes([number]) * 20 for number in (1, 2, 3)]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_tail_costs_its_record_only(tmp_path: Path, cut: int) -> None:
    outbox = Outbox(tmp_path / "box")
    for number in range(3):
        outbox.append(bytes([number]) * 20)
    (file,) = (tmp_path / "box").iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    again = Outbox(tmp_path / "box")
    again.append(b"next")
    whole = 2 if cut <= 28 else 1
    assert drained(again) == [bytes([number]) * 20 for number in range(whole)] + [b"next"]


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "box").write_text("in the way")
    with pytest.raises(LocalError, match="cannot use the folder"):
        Outbox(tmp_path / "box")


def test_a_stored_receipt_hides_its_bytes() -> None:
    assert "packed" not in repr(StoredReceipt(ticket="t", at=NOW, packed=b"x", credits=()))
    assert PeerId(TRAINER.peer_id) in RULES.trainers


def test_a_record_that_cannot_be_removed_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk became read-only: what was taken stays there, and comes again in the next life."""
    outbox = Outbox(tmp_path / "receipts")
    outbox.append(b"one")
    assert outbox.batch(9, 1000) == [b"one"]

    def read_only(*_args: object, **_words: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        outbox.done(1)
    assert outbox.waiting == 0
    assert Outbox(tmp_path / "receipts").batch(9, 1000) == [b"one"]
