"""multistream-select: exact bytes, every split, and what is no negotiation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import RemoteError, UnsupportedProtocol
from p2p.multistream import Confirmation, Listener, encode, proposal, proposed


def test_bytes_never_move() -> None:
    assert proposal("/noise") == b"\x13/multistream/1.0.0\n\x07/noise\n"
    assert encode("na") == b"\x03na\n"
    assert encode("x" * 199)[:2] == b"\xc8\x01"


def drive(machine: Listener | Confirmation, data: bytes) -> tuple[bytes, bytes]:
    """What the machine answers, and what of ``data`` it left alone."""
    reply = b""
    while machine.missing and data:
        size = machine.missing
        reply += machine.feed(data[:size]) or b""
        data = data[size:]
    return reply, data


def test_listener_echoes_and_leaves_the_payload() -> None:
    listener = Listener({"/a", "/b"}.__contains__)
    reply, rest = drive(listener, proposal("/b") + b"payload")
    assert (listener.protocol, reply, rest) == ("/b", proposal("/b"), b"payload")


def test_listener_says_na_and_hears_on() -> None:
    listener = Listener({"/b"}.__contains__)
    reply, _ = drive(listener, proposal("/a") + encode("/b"))
    assert listener.protocol == "/b"
    assert reply == encode("/multistream/1.0.0") + encode("na") + encode("/b")


def test_byte_by_byte() -> None:
    listener = Listener({"/b"}.__contains__)
    for byte in proposal("/b"):
        assert listener.missing
        listener.feed(bytes([byte]))
    assert listener.protocol == "/b"


def test_confirmation() -> None:
    confirmation = Confirmation("/b")
    assert drive(confirmation, proposal("/b") + b"rest") == (b"", b"rest")
    with pytest.raises(UnsupportedProtocol):
        drive(Confirmation("/b"), encode("/multistream/1.0.0") + encode("na"))
    with pytest.raises(RemoteError):
        drive(Confirmation("/b"), encode("/multistream/1.0.0") + encode("/c"))
    with pytest.raises(RemoteError):
        drive(Confirmation("/b"), encode("na"))


def test_too_many_proposals() -> None:
    with pytest.raises(RemoteError):
        drive(Listener(lambda _wish: False), encode("/multistream/1.0.0") + encode("/x") * 8)


def test_a_first_message_shorter_than_the_greeting() -> None:
    for machine in (Listener({"/b"}.__contains__), Confirmation("/b")):
        with pytest.raises(RemoteError):
            drive(machine, b"\x03na\n" + b"\x07/noise\n" * 3)


@given(st.binary(max_size=300))
def test_any_bytes_end_in_agreement_waiting_or_remote_error(data: bytes) -> None:
    for machine in (Listener({"/b"}.__contains__), Confirmation("/b")):
        try:
            drive(machine, data)
        except RemoteError:
            pass


def test_a_proposal_that_came_in_one_piece_is_read_at_once_and_nothing_else_is() -> None:
    whole = proposal("/agora/x/1")
    assert proposed(whole + b"more") == ("/agora/x/1", len(whole))
    for cut in range(len(whole)):
        assert proposed(whole[:cut]) is None
    assert proposed(proposal("/" + "x" * 125)) == ("/" + "x" * 125, 20 + 1 + 127)
    assert proposed(proposal("/" + "x" * 126)) is None  # its length takes two bytes
    assert proposed(proposal("/ä")) is None
    assert proposed(b"\x13x" + whole[2:]) is None
    assert proposed(whole[:-1] + b"x") is None
    assert proposed(whole[:20] + b"\x01\n") is None
