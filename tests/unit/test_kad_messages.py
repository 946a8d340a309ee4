"""Questions and answers: they survive the wire, and nothing malformed survives the checks."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.identity import peer_id_of
from p2p.kad import messages
from p2p.kad.messages import Answer, FindNode, FindValue, HandOver, Question, StoreRecords
from p2p.kad.table import Contact

PEER = peer_id_of(b"\x01" * 32)
ADDRS = ("/ip4/10.0.0.1/tcp/1", "/ip6/::1/tcp/2")
QUESTIONS: list[Question] = [
    FindNode(target=5, now=1.5, addrs=ADDRS),
    FindValue(key="clock/run", after=None, now=1.5, addrs=()),
    FindValue(key="clock/run", after="x", now=1.5, addrs=()),
    StoreRecords(now=1.5, addrs=ADDRS),
    HandOver(leaving=True, now=1.5, addrs=ADDRS),
]
ANSWER = Answer(now=2.5, addrs=ADDRS, nodes=(Contact(PEER, ADDRS),), more=True, results=("ok", "old"))


def wire(header: dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = msgpack.unpackb(msgpack.packb(header), raw=False)
    return decoded


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_come_back(question: Question) -> None:
    assert messages.read_question(wire(messages.question_header(question))) == question


def test_answers_come_back() -> None:
    assert messages.read_answer(wire(messages.answer_header(ANSWER))) == ANSWER
    assert messages.read_answer(wire(messages.answer_header(Answer(now=0.0)))) == Answer(now=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "delete"},
        {"op": None},
        {"target": b"short"},
        {"target": 5},
        {"now": None},
        {"now": float("nan")},
        {"now": 1},
        {"addrs": None},
        {"addrs": ["/a"] * 5},
        {"addrs": [""]},
        {"addrs": ["a" * 257]},
        {"addrs": [b"/ip4"]},
    ],
)
def test_bad_find_node(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        messages.read_question({**messages.question_header(QUESTIONS[0]), **changes})


@pytest.mark.parametrize(
    "changes",
    [{"key": ""}, {"key": "k" * 129}, {"key": b"k"}, {"after": 3}, {"after": "x" * 129}],
)
def test_bad_find_value(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        messages.read_question({**messages.question_header(QUESTIONS[1]), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"now": "noon"},
        {"nodes": None},
        {"nodes": [[PEER, []]] * 21},
        {"nodes": [PEER]},
        {"nodes": [[PEER]]},
        {"nodes": [["12D3KooWnobody", []]]},
        {"nodes": [[PEER, ["/a"] * 5]]},
        {"nodes": [["1" * 65, []]]},
        {"more": 1},
        {"results": None},
        {"results": ["ok"] * 17},
        {"results": [1]},
        {"results": ["o" * 33]},
        {"addrs": None},
    ],
)
def test_bad_answers(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        messages.read_answer({**messages.answer_header(ANSWER), **changes})


def test_batches_and_pages_come_back() -> None:
    assert messages.read_batch(memoryview(messages.pack_batch([b"a", b"b"]))) == [b"a", b"b"]
    rows = [(b"a", 1.5), (b"b", 2.5)]
    assert messages.read_page(memoryview(messages.pack_page(rows))) == rows
    assert messages.read_page(memoryview(b"")) == []


@pytest.mark.parametrize("rows", [None, 1, {}, ["text"], [b"r"] * 17, [[b"r"]], [None]])
def test_bad_batches(rows: Any) -> None:
    with pytest.raises(RemoteError):
        messages.read_batch(memoryview(msgpack.packb(rows)))


@pytest.mark.parametrize(
    "rows",
    [None, 1, [b"r"], [[b"r"]], [[b"r", 1]], [["r", 1.0]], [[b"r", float("inf")]], [[]] * 3000],
)
def test_bad_pages(rows: Any) -> None:
    with pytest.raises(RemoteError):
        messages.read_page(memoryview(msgpack.packb(rows)))


@given(st.binary(min_size=1, max_size=200))
def test_noise_is_a_remote_error_or_a_list(noise: bytes) -> None:
    for read in (messages.read_batch, messages.read_page):
        try:
            assert isinstance(read(memoryview(noise)), list)
        except RemoteError:
            pass


FIELDS = ["op", "now", "addrs", "key", "target", "after", "nodes", "more", "results"]
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.text())
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), PLAIN))
def test_any_header_is_read_or_refused(header: dict[str, Any]) -> None:
    for read in (messages.read_question, messages.read_answer):
        try:
            read(header)
        except RemoteError:
            pass


def test_a_full_answer_fits_a_frame_header() -> None:
    contacts = tuple(Contact(PEER, ("/" + "a" * 255,) * 4) for _ in range(messages.MAX_NODES))
    answer = Answer(now=0.0, nodes=contacts, addrs=("/" + "a" * 255,) * 4)
    assert len(msgpack.packb(messages.answer_header(answer))) < 64 << 10
