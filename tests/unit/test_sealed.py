"""Batches of Noise records: within their room, in the order of yamux, the same bytes on the other side."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2p import noise
from p2p.limits import Limits
from p2p.sealed import BATCH, NEAR_BATCH, READ_SIZE, RECORD, Opener, Scratch, Sealer
from p2p.yamux import Opened, Session, Stream, YamuxEvent

SIZE = 3_000_000


def test_batches_keep_to_their_room_and_nothing_is_lost_or_turned_round() -> None:
    for room in (1, RECORD, 3 * RECORD + 5, BATCH * RECORD, NEAR_BATCH * RECORD):
        data = os.urandom(SIZE)
        assert carried(data, room, cut=READ_SIZE - RECORD) == data
        assert carried(data, room, cut=70_001) == data


@pytest.mark.parametrize("most", [BATCH, NEAR_BATCH])
def test_long_data_fills_its_batches(most: int) -> None:
    key, scratch = bytes(32), Scratch()
    session = Session(dialer=True, limits=Limits())
    sealer = Sealer(noise.Cipher(key, AESGCM), session, scratch)
    stream = session.open()
    stream.send_window = 1 << 30
    session.send(stream, (memoryview(bytes(SIZE)),))
    sizes = []
    while session.wants_to_send():
        records, buffer = sealer.batch(most * RECORD)
        sizes.append(len(records))
        if buffer is not None:
            scratch.give(buffer)
    assert max(sizes) <= most * RECORD
    assert min(sizes[:-1]) > (most - 1) * RECORD


def carried(data: bytes, room: int, *, cut: int) -> bytes:
    """What arrives of ``data`` when it is sealed in batches of ``room`` and read in pieces of ``cut``."""
    key, scratch = os.urandom(32), Scratch()
    near, far = Session(dialer=True, limits=Limits()), Session(dialer=False, limits=Limits())
    sealer = Sealer(noise.Cipher(key, AESGCM), near, scratch)
    opener = Opener(noise.Cipher(key, AESGCM), far, scratch)
    stream = near.open()
    near.send(stream, (memoryview(data),))
    arrived, begun = bytearray(), b""
    answer = memoryview(bytearray(noise.MAX_PLAINTEXT))
    peers: list[Stream] = []

    def dispatch(events: list[YamuxEvent]) -> None:
        peers.extend(event.stream for event in events if isinstance(event, Opened))

    while near.wants_to_send():
        records, buffer = sealer.batch(room)
        assert len(records) <= max(room, RECORD)
        sent = begun + bytes(records)
        if buffer is not None:
            scratch.give(buffer)
        begun = b""
        for start in range(0, len(sent), cut):
            begun = opener.open(memoryview(begun + sent[start : start + cut]), dispatch)
        for peer in peers:
            while peer.inbox:
                arrived += far.take(peer, SIZE)
        while far.wants_to_send():  # windows that open again
            near.receive(answer[: far.fill(answer)])
    assert begun == b""
    return bytes(arrived)
