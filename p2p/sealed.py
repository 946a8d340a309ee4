"""What is on the wire of a secured connection: Noise records with yamux in them. Sans-IO.

The ``Opener`` takes what was read, cut anywhere, decrypts it record by record and feeds yamux; records in the
middle of data that is waited for are decrypted to where it belongs at once. The ``Sealer`` encrypts what
yamux has to say, up to ``BATCH`` records for one send, long data from where its user has it.

Where both hellos say that AES is computed in hardware, a sealer that has much to send goes over to
AES-256-GCM: an empty record under the first cipher, then all others under the second. Each direction does so
for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from p2p import noise
from p2p.errors import RemoteError
from p2p.limits import KIB
from p2p.yamux import Session, YamuxEvent

BATCH = 4
"""Records encrypted for one send: 256 KiB, 10 ms at 200 Mbit/s."""
NEAR_BATCH = 8
"""To a peer that is near, where a batch leaves at once and each costs calls, wake-ups and a copied record."""
RECORD = 2 + noise.MAX_RECORD
READ_SIZE = 16 * RECORD
"""With the beginning of a record that is there already: so reads of much data end where records do. As much
as a millisecond's opening: where processors are short, more has come than one batch until a turn comes."""
BUFFER = NEAR_BATCH * RECORD + RECORD
"""Room for a batch, and an empty record before it."""
SMALL = 8 * KIB


def missing(begun: bytes) -> int:
    """Bytes without which the record that begins so cannot be opened."""
    return 2 + (begun[0] << 8 | begun[1]) - len(begun) if len(begun) >= 2 else 1


def _beyond(room: int) -> int:
    """Bytes of plaintext in the records that fit into ``room`` bytes behind a first one."""
    return max(0, room // RECORD - 1) * noise.MAX_PLAINTEXT


@final
class Scratch:
    """Buffers shared by the connections of one host: an idle connection holds none.

    What is read, and a record's plaintext, is done with before anybody else has a turn: one buffer for each.
    A batch is kept while it is sent.
    """

    def __init__(self) -> None:
        self.came = memoryview(bytearray(READ_SIZE))
        self.plain = memoryview(bytearray(noise.MAX_PLAINTEXT))
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        return self._free.pop() if self._free else memoryview(bytearray(BUFFER))

    def give(self, buffer: memoryview) -> None:
        if len(self._free) < 4:
            self._free.append(buffer)


@final
class Opener:
    """The direction from the peer."""

    def __init__(self, cipher: noise.Cipher, session: Session, scratch: Scratch) -> None:
        self.cipher = cipher
        self._session = session
        self._scratch = scratch
        self._aes_promised = False
        """Our hello said that we read AES, and the peer has not begun with it."""
        self._reads_aes = False

    def promise_aes(self) -> None:
        """Our hello is about to say that we compute AES in hardware."""
        if not self._reads_aes:
            self._aes_promised = True

    def open(self, data: memoryview, dispatch: Callable[[list[YamuxEvent]], None]) -> bytes:
        """Take all whole records in; the beginning of the next one. ``dispatch``: told what each brought."""
        offset, end = 0, len(data)
        while end - offset >= 2:
            size = data[offset] << 8 | data[offset + 1]
            if size < noise.TAG:
                raise RemoteError(f"a Noise record of {size} bytes")
            stop = offset + 2 + size
            if stop > end:
                break
            size -= noise.TAG
            if size and (target := self._session.place(size)) is not None:
                offset, filled = self._open_into(target, data, offset)
                dispatch(self._session.placed(filled))
                continue
            plain = self._scratch.plain[:size]
            self.cipher.decrypt_into(data[offset + 2 : stop], plain)
            if size:
                dispatch(self._session.receive(plain))
            elif self._aes_promised:
                self.cipher = self.cipher.faster()
                self._aes_promised, self._reads_aes = False, True
            offset = stop
        return bytes(data[offset:])

    def _open_into(self, target: memoryview, data: memoryview, offset: int) -> tuple[int, int]:
        """Decrypt whole records that belong into ``target``, the first one of which is sure to.

        Where the next record begins, and how much of the target is full.
        """
        decrypt_into, last = self.cipher.decrypt_into, len(data) - 2
        filled, room = 0, len(target)
        while offset <= last:
            sealed = data[offset] << 8 | data[offset + 1]
            stop, full = offset + 2 + sealed, filled + sealed - noise.TAG
            if stop > last + 2 or not filled < full <= room:
                break
            decrypt_into(data[offset + 2 : stop], target[filled:full])
            offset, filled = stop, full
        return offset, filled


@final
class Sealer:
    """The direction to the peer."""

    def __init__(self, cipher: noise.Cipher, session: Session, scratch: Scratch) -> None:
        self.cipher = cipher
        self._session = session
        self._scratch = scratch
        self._aes_agreed = False
        """The peer's hello said so and we compute it, and have not begun with it."""
        self._writes_aes = False

    def agree_aes(self) -> None:
        """The peer's hello said that it computes AES in hardware, and it holds here too."""
        if not self._writes_aes:
            self._aes_agreed = True

    def batch(self, room: int) -> tuple[memoryview, memoryview | None]:
        """Some of what yamux wants to send, in records of ``room`` bytes together, at least one.

        And the buffer of the scratch that they are in, to be given back once they are sent; None: in none.
        """
        session, plain = self._session, self._scratch.plain
        size = session.fill(plain, _beyond(room))
        if size <= SMALL and not session.behind and not session.wants_to_send():
            small = memoryview(bytearray(2 + size + noise.TAG))
            self._seal(plain[:size], small)
            return small, None
        out = self._scratch.take()
        used = 0
        if self._aes_agreed:
            used += self._seal(plain[:0], out)
            self.cipher = self.cipher.faster()
            self._aes_agreed, self._writes_aes = False, True
        while True:
            used += self._seal(plain[:size], out[used:])
            behind = session.behind
            while behind:
                used += self._seal(behind[: noise.MAX_PLAINTEXT], out[used:])
                behind = behind[noise.MAX_PLAINTEXT :]
            if used + RECORD > room or not session.wants_to_send():
                return out[:used], out
            size = session.fill(plain, _beyond(room - used))

    def _seal(self, plain: memoryview, out: memoryview) -> int:
        """One record of ``plain``; bytes written."""
        sealed = len(plain) + noise.TAG
        out[0] = sealed >> 8
        out[1] = sealed & 0xFF
        self.cipher.encrypt_into(plain, out[2 : 2 + sealed])
        return 2 + sealed
