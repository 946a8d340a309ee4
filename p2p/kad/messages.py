"""The words of ``/agora/kad/1``: one question and one answer a stream. Pure: values in, values out.

Question (frame header): ``op`` is ``find_node`` {target: 32 bytes}, ``find_value`` {key, after: subkey
or nil}, ``store`` (payload: msgpack list of records) or ``hand_over`` {leaving: bool} (payload:
[[record, seconds that remain]…], what the sender keeps and the receiver should). Every question carries
``now`` (the sender's unix time, to notice clocks that are off) and ``addrs`` (where the sender listens;
empty for none).

Answer: ``now`` and ``addrs`` likewise; ``nodes`` [[peer id, [multiaddr]]…], the nearest known; for
``find_value`` also ``more`` and a payload [[record, seconds that remain]…] in order of subkey; for
``store`` and ``hand_over`` also ``results``, one word a record: ``ok`` or a refusal's code. The ``nodes``
of a store are those nearest to its first record's key.

Limits: ``MAX_NODES`` contacts an answer, ``MAX_ADDRS`` of ``MAX_ADDR_CHARS`` each, ``PAGE`` bytes of
records a payload, ``MAX_BATCH`` records a store or hand-over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import attrs
import msgpack

from p2p.errors import RemoteError
from p2p.identity import PeerId
from p2p.kad.ids import BYTES
from p2p.kad.record import KEY_LIMIT, RECORD_LIMIT
from p2p.kad.table import MAX_ADDRS, Contact

PROTOCOL: Final = "/agora/kad/1"
PAGE: Final = 128 << 10
MAX_PAYLOAD: Final = PAGE + 2 * RECORD_LIMIT
MAX_NODES: Final = 20
MAX_BATCH: Final = 16
MAX_ADDR_CHARS: Final = 256


@attrs.frozen(kw_only=True)
class FindNode:
    target: int
    now: float
    addrs: tuple[str, ...]


@attrs.frozen(kw_only=True)
class FindValue:
    key: str
    after: str | None
    now: float
    addrs: tuple[str, ...]


@attrs.frozen(kw_only=True)
class StoreRecords:
    now: float
    addrs: tuple[str, ...]


@attrs.frozen(kw_only=True)
class HandOver:
    leaving: bool
    """Whether the sender goes: it is no longer to be counted on."""
    now: float
    addrs: tuple[str, ...]


Question = FindNode | FindValue | StoreRecords | HandOver


@attrs.frozen(kw_only=True)
class Answer:
    """What came back; the records of a find_value still unverified."""

    now: float
    addrs: tuple[str, ...] = ()
    nodes: tuple[Contact, ...] = ()
    more: bool = False
    results: tuple[str, ...] = ()


def question_header(question: Question) -> dict[str, Any]:
    header: dict[str, Any] = {"now": question.now, "addrs": list(question.addrs)}
    match question:
        case FindNode():
            return {"op": "find_node", "target": question.target.to_bytes(BYTES, "big"), **header}
        case FindValue():
            return {"op": "find_value", "key": question.key, "after": question.after, **header}
        case StoreRecords():
            return {"op": "store", **header}
        case HandOver():
            return {"op": "hand_over", "leaving": question.leaving, **header}


def read_question(header: dict[str, Any]) -> Question:
    """RemoteError unless it is a question of this protocol, every field within its bounds."""
    now, addrs = _time(header), _addrs(header.get("addrs"))
    match header:
        case {"op": "find_node", "target": bytes(target)} if len(target) == BYTES:
            return FindNode(target=int.from_bytes(target, "big"), now=now, addrs=addrs)
        case {"op": "find_value", "key": str(key), "after": str() | None as after} if 0 < len(
            key
        ) <= KEY_LIMIT and (after is None or len(after) <= KEY_LIMIT):
            return FindValue(key=key, after=after, now=now, addrs=addrs)
        case {"op": "store"}:
            return StoreRecords(now=now, addrs=addrs)
        case {"op": "hand_over", "leaving": bool(leaving)}:
            return HandOver(leaving=leaving, now=now, addrs=addrs)
    raise RemoteError(f"a hash table question that is none: {str(header.get('op'))[:40]!r}")


def answer_header(answer: Answer) -> dict[str, Any]:
    return {
        "now": answer.now,
        "addrs": list(answer.addrs),
        "nodes": [[contact.peer, list(contact.addrs)] for contact in answer.nodes],
        "more": answer.more,
        "results": list(answer.results),
    }


def read_answer(header: dict[str, Any]) -> Answer:
    """RemoteError unless every field is within its bounds."""
    nodes, results, more = header.get("nodes"), header.get("results"), header.get("more")
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
        raise RemoteError(f"a hash table answer without a list of at most {MAX_NODES} nodes")
    if not isinstance(results, list) or len(results) > MAX_BATCH or not isinstance(more, bool):
        raise RemoteError("a hash table answer whose results are not a short list of words")
    if not all(isinstance(word, str) and len(word) <= 32 for word in results):
        raise RemoteError("a hash table answer with a result that is not a short word")
    contacts = [_contact(node) for node in nodes]
    addrs = _addrs(header.get("addrs"))
    return Answer(now=_time(header), addrs=addrs, nodes=tuple(contacts), more=more, results=tuple(results))


def pack_batch(records: Sequence[bytes]) -> bytes:
    packed: bytes = msgpack.packb(list(records))
    return packed


def read_batch(payload: memoryview) -> list[bytes]:
    """Encoded records of a store."""
    rows = _list(payload, MAX_BATCH)
    if not all(isinstance(row, bytes) for row in rows):
        raise RemoteError("a store whose records are not byte strings")
    return rows


def pack_page(rows: Sequence[tuple[bytes, float]]) -> bytes:
    packed: bytes = msgpack.packb([list(row) for row in rows])
    return packed


def read_page(payload: memoryview, limit: int = PAGE // 64) -> list[tuple[bytes, float]]:
    """Encoded records of a find_value or a hand_over, each with the seconds that it has left."""
    page = []
    for row in _list(payload, limit) if payload else []:
        match row:
            case [bytes(wire), float(remaining)] if math.isfinite(remaining):
                page.append((wire, remaining))
            case _:
                raise RemoteError("a page of records with an entry that is not [record, seconds]")
    return page


def _list(payload: memoryview, limit: int) -> list[Any]:
    try:
        rows = msgpack.unpackb(payload, raw=False, max_array_len=limit, max_map_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise RemoteError("a hash table payload that is not a msgpack list within its limits") from error
    if not isinstance(rows, list):
        raise RemoteError("a hash table payload that is not a list")
    return rows


def _time(header: dict[str, Any]) -> float:
    now = header.get("now")
    if not isinstance(now, float) or not math.isfinite(now):
        raise RemoteError("a hash table message that does not say what time it is")
    return now


def _contact(node: Any) -> Contact:
    if type(node) is not list or len(node) != 2:
        raise RemoteError("a hash table answer with a node that is not [peer id, addresses]")
    peer, listens = node
    if type(peer) is not str or len(peer) > 64 or type(listens) is not list or len(listens) > MAX_ADDRS:
        raise RemoteError("a hash table answer with a node that is not [peer id, addresses]")
    try:
        return _known_contact(peer, *listens)
    except TypeError as error:  # what cannot be a key of the cache is no text
        raise RemoteError("an address that is not a text") from error


@lru_cache(maxsize=2048)
def _known_contact(peer: str, *addrs: Any) -> Contact:
    """The same few contacts come in every answer, twenty at a time."""
    return Contact(PeerId(peer), _addrs(list(addrs)))


def _addrs(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_ADDRS:
        raise RemoteError(f"not a list of at most {MAX_ADDRS} addresses")
    if not all(isinstance(addr, str) and 0 < len(addr) <= MAX_ADDR_CHARS for addr in value):
        raise RemoteError(f"an address that is not a text of at most {MAX_ADDR_CHARS} characters")
    return tuple(value)
