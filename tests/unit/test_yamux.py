"""yamux without a network: exact frames, every split, windows, limits, hostile input."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import LocalError, RemoteError
from p2p.limits import Limits
from p2p.yamux import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Changed,
    Credit,
    Opened,
    PingAnswered,
    Session,
    Stream,
    WentAway,
)

RECORD = 65_519
LIMITS = Limits(inbound_streams=8, outbound_streams=8, queued_frames=64)


def output(session: Session) -> bytes:
    """Everything that the session wants to send now."""
    record = memoryview(bytearray(RECORD))
    out = b""
    while session.wants_to_send():
        out += bytes(record[: session.fill(record)])
    session.drained.clear()
    return out


def pair() -> tuple[Session, Session]:
    return Session(dialer=True, limits=LIMITS), Session(dialer=False, limits=LIMITS)


def transfer(one: Session, two: Session) -> list[object]:
    """One way, all that waits."""
    return list(two.receive(memoryview(output(one))))


def settle(one: Session, two: Session) -> None:
    for _ in range(100):
        if not (one.wants_to_send() or two.wants_to_send()):
            return
        transfer(one, two)
        transfer(two, one)
    raise AssertionError("the two sides talk without end")


def opened(one: Session, two: Session, data: bytes = b"x") -> tuple[Stream, Stream]:
    near = one.open()
    one.send(near, [memoryview(data)])
    (came,) = [event for event in transfer(one, two) if isinstance(event, Opened)]
    return near, came.stream


def read(session: Session, stream: Stream) -> bytes:
    data = b""
    while stream.inbox:
        data += bytes(session.take(stream, 1 << 20))
    return data


def test_frames_never_move() -> None:
    """The bytes of the specification, written out."""
    one, two = pair()
    near = one.open()
    one.send(near, [memoryview(b"hel"), memoryview(b"lo")])
    assert output(one).hex() == "000000010000000100000005" + b"hello".hex()
    two.receive(memoryview(bytes.fromhex("000000010000000100000005") + b"hello"))
    two.ping(7)
    # the acknowledgement waits for a frame that is in a hurry
    assert output(two).hex() == "000100020000000100000000" + "000200010000000000000007"
    one.close_sending(near)
    assert output(one).hex() == "000100040000000100000000"
    one.reset(near)
    assert output(one).hex() == "000100080000000100000000"
    one.go_away(2)
    assert output(one).hex() == "000300000000000000000002"
    one.receive(memoryview(bytes.fromhex("000200010000000000000009")))
    assert output(one).hex() == "000200020000000000000009"


def script() -> bytes:
    """A dialer's output with every kind of frame."""
    one, _two = pair()
    first, second = one.open(), one.open()
    one.send(first, [memoryview(b"a" * 100)])
    one.send(second, [memoryview(b"b" * 5000)])
    one.ping(5)
    data = output(one)
    one.close_sending(first)
    data += output(one)
    one.reset(second)
    one.go_away()
    return data + output(one)


@pytest.mark.parametrize("step", [1, 2, 5, 11, 12, 13, 100])
def test_any_split_gives_the_same_state(step: int) -> None:
    data = script()
    session = Session(dialer=False, limits=LIMITS)
    streams: list[Stream] = []
    for start in range(0, len(data), step):
        for event in session.receive(memoryview(data[start : start + step])):
            if isinstance(event, Opened):
                streams.append(event.stream)
    assert [read(session, stream) for stream in streams] == [b"a" * 100, b"b" * 5000]
    assert [stream.fin_received for stream in streams] == [True, False]
    assert [stream.reset for stream in streams] == [False, True]
    assert session.remote_gone == 0


def test_every_split_offset() -> None:
    data = script()
    for cut in range(1, 300):
        session = Session(dialer=False, limits=LIMITS)
        session.receive(memoryview(data[:cut]))
        session.receive(memoryview(data[cut:]))
        assert session.streams[1].inbox_bytes == 100


def test_window_stops_the_sender_and_consumption_frees_it() -> None:
    one, two = pair()
    near, far = opened(one, two, bytes(3 * INITIAL_WINDOW))
    transfer(one, two)
    assert far.inbox_bytes == INITIAL_WINDOW
    assert not one.wants_to_send()
    total = 0
    for _ in range(40):
        total += len(read(two, far))
        settle(one, two)
    assert total == 3 * INITIAL_WINDOW
    assert near.pending_bytes == 0


def test_streams_take_turns() -> None:
    one, two = pair()
    bulk, small = one.open(), one.open()
    one.send(bulk, [memoryview(bytes(200_000))])
    one.send(small, [memoryview(b"now")])
    record = memoryview(bytearray(RECORD))
    assert one.fill(record) == RECORD
    two.receive(record)
    one.fill(record)
    one.ping(1)
    assert one.drained == [small]


def test_frames_fit_one_record_exactly() -> None:
    one, _ = pair()
    stream = one.open()
    one.send(stream, [memoryview(bytes(200_000))])
    record = memoryview(bytearray(RECORD))
    for _ in range(3):
        assert one.fill(record) == RECORD
        assert HEADER.unpack_from(record)[4] == RECORD - HEADER.size


def test_data_before_a_reset_stays_readable() -> None:
    one, two = pair()
    near, far = opened(one, two, b"request")
    two.send(far, [memoryview(b"no, because")])
    reply = output(two)
    two.reset(far)
    one.receive(memoryview(reply + output(two)))
    assert near.reset
    assert read(one, near) == b"no, because"


@pytest.mark.parametrize("size", [1, 1000, 65_507, 65_508, 100_000])
def test_the_end_of_a_stream_never_rides_on_its_data(size: int) -> None:
    one, two = pair()
    mine, theirs = opened(one, two)
    one.send(mine, [memoryview(bytes(size))])
    one.close_sending(mine)
    flagged = []
    while one.wants_to_send():
        record = output(one)
        two.receive(memoryview(record))
        offset = 0
        while offset < len(record):
            _, kind, flags, _, length = HEADER.unpack_from(record, offset)
            if flags & FIN:
                flagged.append((kind, length))
            offset += HEADER.size + (length if kind == DATA else 0)
    assert flagged == [(DATA, 0)]
    assert read(two, theirs)[1:] == bytes(size)
    assert theirs.fin_received


def test_half_close_both_ways_forgets_the_stream() -> None:
    one, two = pair()
    near, far = opened(one, two)
    one.close_sending(near)
    settle(one, two)
    assert far.fin_received
    two.send(far, [memoryview(b"answer")])
    settle(one, two)
    two.close_sending(far)
    settle(one, two)
    assert read(one, near) == b"answer"
    assert not one.streams
    assert not two.streams


def test_abandoned_stream_tells_a_sender_that_goes_on() -> None:
    one, two = pair()
    near, far = opened(one, two)
    two.take(far, 10)
    two.abandon(far)
    settle(one, two)
    assert near.fin_received
    assert not near.reset
    one.send(near, [memoryview(b"more")])
    settle(one, two)
    assert near.reset
    assert not one.streams
    assert not two.streams


def test_agreed_window_holds_in_both_directions() -> None:
    one, two = pair()
    window = 1 << 20
    one.promise(window)
    two.promise(2 * window)
    one.agree(2 * window)
    two.agree(window)
    near, far = opened(one, two, bytes(window))
    transfer(one, two)
    assert far.inbox_bytes == window  # at once, without an update
    two.send(far, [memoryview(bytes(window))])
    transfer(two, one)
    assert near.inbox_bytes == window


def test_stock_opener_that_lifts_its_window_lifts_only_that() -> None:
    session = Session(dialer=False, limits=LIMITS)
    frame = HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 1 << 20)
    (event, *_) = session.receive(memoryview(frame))
    assert isinstance(event, Opened)
    assert event.stream.send_window == INITIAL_WINDOW + (1 << 20)
    assert event.stream.receive_window == INITIAL_WINDOW


def test_growth_is_bounded_by_the_budget() -> None:
    limits = attrs.evolve(LIMITS, window_budget=1 << 20, big_window=1 << 20)
    one, two = Session(dialer=True, limits=limits), Session(dialer=False, limits=limits)
    pairs = [opened(one, two) for _ in range(4)]
    for _near, far in pairs:
        two.grow(far, 1 << 30)
    extra = sum(far.window_size - INITIAL_WINDOW for _near, far in pairs)
    assert extra == 1 << 20
    settle(one, two)
    assert sum(near.send_window for near, _far in pairs) == 4 * (INITIAL_WINDOW - 1) + extra
    for _near, far in pairs:
        two.reset(far)
    again = opened(one, two)[1]
    two.grow(again, 1 << 30)
    assert again.window_size == 1 << 20


def test_inbound_limit_resets_the_stream_only() -> None:
    one = Session(dialer=True, limits=attrs.evolve(LIMITS, outbound_streams=100))
    two = Session(dialer=False, limits=LIMITS)
    nears = []
    for _ in range(LIMITS.inbound_streams + 1):
        near = one.open()
        one.send(near, [memoryview(b"x")])
        nears.append(near)
    settle(one, two)
    assert [near.reset for near in nears] == [False] * LIMITS.inbound_streams + [True]


def test_outbound_limit_and_goaway() -> None:
    one, _ = pair()
    for _ in range(LIMITS.outbound_streams):
        one.open()
    with pytest.raises(LocalError):
        one.open()
    one, two = pair()
    two.go_away()
    assert transfer(two, one) == [WentAway(0)]
    with pytest.raises(RemoteError):
        one.open()


def test_ping() -> None:
    one, two = pair()
    one.ping(0xDEADBEEF)
    transfer(one, two)
    assert transfer(two, one) == [PingAnswered(0xDEADBEEF)]


def test_peer_that_asks_but_never_reads_is_dropped() -> None:
    session = Session(dialer=False, limits=LIMITS)
    with pytest.raises(RemoteError, match="does not read"):
        session.receive(memoryview(HEADER.pack(0, PING, SYN, 0, 1) * (LIMITS.queued_frames + 1)))


def test_peer_that_opens_and_resets_but_never_reads_is_dropped() -> None:
    session = Session(dialer=False, limits=LIMITS)
    frames = b"".join(
        HEADER.pack(0, WINDOW_UPDATE, SYN, number, 0) + HEADER.pack(0, DATA, RST, number, 0)
        for number in range(1, 2000, 2)
    )
    with pytest.raises(RemoteError, match="does not read"):
        session.receive(memoryview(frames))


def test_cleaning_up_works_while_the_peer_does_not_read() -> None:
    session = Session(dialer=False, limits=LIMITS)
    events = session.receive(memoryview(b"".join(HEADER.pack(0, DATA, SYN, n, 0) for n in (1, 3, 5))))
    one, two, three = (event.stream for event in events if isinstance(event, Opened))
    session.receive(memoryview(HEADER.pack(0, PING, SYN, 0, 1) * LIMITS.queued_frames))
    session.reset(one)
    session.close_sending(two)
    session.abandon(three)
    session.go_away()


def test_window_that_grows_after_the_end_takes_no_credit() -> None:
    credit = Credit(10 << 20)
    session = Session(dialer=False, limits=LIMITS, credit=credit)
    events = session.receive(memoryview(HEADER.pack(0, DATA, SYN, 1, 4) + b"data"))
    (stream,) = (event.stream for event in events if isinstance(event, Opened))
    session.close()
    session.grow(stream, 4 << 20)
    assert credit.left == 10 << 20


@pytest.mark.parametrize(
    "frames",
    [
        HEADER.pack(1, DATA, SYN, 1, 0),
        HEADER.pack(0, 4, 0, 1, 0),
        HEADER.pack(0, DATA, SYN, 0, 0),
        HEADER.pack(0, DATA, SYN, 2, 0),
        HEADER.pack(0, DATA, SYN, 1, 0) * 2,
        HEADER.pack(0, DATA, SYN, 1, INITIAL_WINDOW + 1),
        HEADER.pack(0, DATA, SYN, 1, 0xFFFFFFFF),
        HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 0) + HEADER.pack(0, WINDOW_UPDATE, 0, 1, 0xFFFFFFFF),
        HEADER.pack(0, DATA, SYN | FIN, 1, 1) + b"x" + HEADER.pack(0, DATA, 0, 1, 1) + b"x",
    ],
)
def test_violations_end_the_session(frames: bytes) -> None:
    with pytest.raises(RemoteError):
        Session(dialer=False, limits=LIMITS).receive(memoryview(frames))


def test_frames_for_unknown_streams_are_skipped() -> None:
    session = Session(dialer=False, limits=LIMITS)
    junk = HEADER.pack(0, DATA, 0, 9, 3) + b"abc" + HEADER.pack(0, WINDOW_UPDATE, RST, 9, 5)
    assert session.receive(memoryview(junk + HEADER.pack(0, GO_AWAY, 0, 0, 0))) == [WentAway(0)]
    assert not session.wants_to_send()


def test_small_pieces_do_not_pin_large_buffers() -> None:
    one, two = pair()
    _near, far = opened(one, two)
    for _ in range(100):
        batch = (
            HEADER.pack(0, DATA, 0, 1, 10) + b"0123456789" + HEADER.pack(0, DATA, 0, 99, 9000) + bytes(9000)
        )
        two.receive(memoryview(batch))
    assert len(far.inbox) == 1
    assert all(isinstance(piece, bytearray) for piece in far.inbox)
    assert read(two, far) == b"x" + b"0123456789" * 100


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_events_or_a_remote_error(data: bytes) -> None:
    session = Session(dialer=False, limits=LIMITS)
    try:
        session.receive(memoryview(data))
        output(session)
    except RemoteError:
        pass


HEADERS = st.builds(
    lambda kind, flags, stream, length: HEADER.pack(0, kind, flags, stream, length),
    st.integers(0, 3),
    st.sampled_from([0, SYN, ACK, FIN, RST, SYN | FIN, SYN | RST]),
    st.sampled_from([0, 1, 3, 2, 5]),
    st.sampled_from([0, 1, 12, 70_000]),
)


@given(st.lists(HEADERS, max_size=12), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_any_frames_keep_the_books(frames: list[bytes], step: int) -> None:
    session = Session(dialer=False, limits=LIMITS)
    data = b"".join(frames)
    try:
        for start in range(0, len(data), step):
            session.receive(memoryview(data[start : start + step]))
    except RemoteError:
        return
    for stream in session.streams.values():
        assert stream.inbox_bytes == sum(len(piece) for piece in stream.inbox)
        assert stream.inbox_bytes + stream.receive_window <= stream.window_size
    assert session._inbound == len(session.streams)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_traffic_arrives_whole(data: st.DataObject) -> None:
    """Random sends, partial transfers, reads and closes; at the end all bytes are there in order."""
    sessions = pair()
    wires = [bytearray(), bytearray()]
    streams: list[tuple[Stream, Stream | None, bytearray, bytearray]] = []
    record = memoryview(bytearray(RECORD))
    for near in [sessions[0].open() for _ in range(3)]:
        streams.append((near, None, bytearray(), bytearray()))
    fars: dict[int, Stream] = {}

    def deliver(cut: int | None) -> None:
        for number in (0, 1):
            if sessions[number].wants_to_send():
                wires[number] += bytes(record[: sessions[number].fill(record)])
            piece = bytes(wires[number][:cut])
            del wires[number][: len(piece)]
            for event in sessions[1 - number].receive(memoryview(piece)):
                if isinstance(event, Opened):
                    fars[event.stream.id] = event.stream
                assert isinstance(event, Opened | Changed)

    for _ in range(data.draw(st.integers(5, 25))):
        near, _far, sent, got = streams[data.draw(st.integers(0, 2))]
        if not near.pending_bytes:
            piece = bytes([len(sent) % 251]) * data.draw(st.integers(1, 400_000))
            sent += piece
            sessions[0].send(near, [memoryview(piece)])
        deliver(data.draw(st.sampled_from([1, 13, 5000, None])))
        far = fars.get(near.id)
        if far is not None and far.inbox:
            got += bytes(sessions[1].take(far, data.draw(st.integers(1, 300_000))))
    for _ in range(500):
        deliver(None)
        for near, _far, _sent, got in streams:
            far = fars.get(near.id)
            while far is not None and far.inbox:
                got += bytes(sessions[1].take(far, 1 << 20))
        if not any(wires) and not any(session.wants_to_send() for session in sessions):
            break
    for _near, _far, sent, got in streams:
        assert got == sent


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_long_data_goes_from_user_to_user(data: st.DataObject) -> None:
    """In records of their own for what is left behind, into targets of any size, one behind the other."""
    one, two = pair()
    near, far = opened(one, two)
    record = memoryview(bytearray(RECORD))
    sent, got = bytearray(b"x"), bytearray()
    target = bytearray()

    def next_target() -> memoryview:
        nonlocal target
        got.extend(target)
        target = bytearray(data.draw(st.integers(1, 200_000)))
        return memoryview(target)

    far.target, far.filled = next_target(), next_target
    two.pour(far)
    for _ in range(data.draw(st.integers(1, 6))):
        for size in data.draw(st.lists(st.sampled_from([1, 100, 70_000, 300_000]), max_size=3)):
            piece = bytes([len(sent) % 251]) * size
            sent += piece
            one.send(near, [memoryview(piece)])
        one.ping(1)
        while one.wants_to_send():
            beyond = data.draw(st.sampled_from([0, 1, 30_000, 3 * RECORD]))
            two.receive(record[: one.fill(record, beyond)])
            behind = one.behind
            assert len(behind) <= beyond
            while behind:
                piece_of_it, behind = behind[:RECORD], behind[RECORD:]
                place = two.place(len(piece_of_it))
                if place is None:
                    two.receive(piece_of_it)
                else:
                    place[: len(piece_of_it)] = piece_of_it
                    assert two.placed(len(piece_of_it)) == []
        settle(one, two)
    rest = len(target) - len(far.target or b"")
    assert got + target[:rest] == sent
    assert not far.inbox_bytes
    assert not near.pending_bytes


def test_a_reset_ends_the_place_of_its_data() -> None:
    one, two = pair()
    near, far = opened(one, two)
    read(two, far)
    far.target = memoryview(bytearray(200_000))
    one.send(near, [memoryview(bytes(150_000))])
    record = memoryview(bytearray(RECORD))
    two.receive(record[: one.fill(record, 2 * RECORD)])
    place = two.place(len(one.behind) - 5)
    assert place is not None
    assert len(place) == len(one.behind)
    assert two.place(len(one.behind) + 1) is None  # the next frame's header would go astray
    two.reset(far)
    assert two.place(len(one.behind)) is None
    left = len(far.target)
    two.receive(one.behind)
    assert len(far.target) == left
