"""The result of a round as one member has it: which parts are held, by whose word, and which are on the way.

Sans-IO. A part is pending, then held or missing. Its mean may be put into the vector while it still comes
(``place``); it is held once its reducer's signature was found good. What waits to be sent points into the
vector and what comes is written there, so bytes that may not change under either are left behind: the result
goes on with a copy (``_renew``).

Limits: the roster's. Memory: one vector; where parts travel in a coded form, that of the held ones too.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Any, Final, final

import attrs
from blake3 import blake3

from p2p.averaging.memory import Memory
from p2p.averaging.reducer import Buffer, Codec, PlainCodec
from p2p.averaging.roster import Roster, Sign, Verify
from p2p.averaging.verdict import DIGEST, NOTHING
from p2p.errors import RemoteError

_DOMAIN: Final = "round-part"


class Part(Enum):
    """What this member knows of a part."""

    PENDING = "pending"
    HELD = "held"
    MISSING = "missing"


@attrs.frozen
class Proof:
    """By whose word a part is held."""

    reducer: int
    contributors: int
    """Whose numbers are in the mean, a bit mask of members."""
    signature: bytes = attrs.field(repr=False)


@final
class Result:
    """One member's parts. Members are indices into the roster."""

    def __init__(self, roster: Roster, codec: Codec, sign: Sign, verify: Verify, memory: Memory) -> None:
        self.vector = memory.fresh(roster.floats * 4)
        """fp32; what it says of a part that is not held means nothing."""
        self.status = [Part.PENDING] * len(roster.spans)
        self.pending = len(roster.spans)
        """How many parts are."""
        self.digests = [NOTHING] * len(roster.spans)
        self.proofs: dict[int, Proof] = {}
        """Of held parts."""
        self._coming: dict[int, tuple[int, memoryview]] = {}
        """Of pending parts, whose mean is put into the vector as it comes, and where."""
        self._coded: dict[int, Buffer] = {}
        """Of held parts, what was signed and is handed on, where that is not the vector itself."""
        self._replaced = False
        self._roster = roster
        self._spans = roster.spans
        self._codec = codec
        self._plain = isinstance(codec, PlainCodec)
        self._sign = sign
        self._verify = verify

    def place(self, sender: int, part: int, size: int) -> memoryview | None:
        """Where a mean of so many bytes may lie as it comes; None: it would be in the way of another."""
        begin, end = self._spans[part]
        if self.status[part] is not Part.PENDING or part in self._coming:
            return None
        if not self._plain or size != end - begin:
            return None
        view = self.vector[begin:end]
        self._coming[part] = (sender, view)
        return view

    def lost(self, member: int) -> None:
        """Nothing more comes from ``member``."""
        self._coming = {part: one for part, one in self._coming.items() if one[0] != member}

    def hold(
        self, part: int, coded: Buffer, reducer: int, contributors: int, signature: bytes | None
    ) -> None:
        """Keep a mean: ``signature`` None where this member reduced it and signs now."""
        digest = blake3(coded).digest()
        said = b"%b%d/%d/%b" % (self._roster.group, part, contributors, digest)
        if signature is None:
            signature = self._sign(_DOMAIN, said)
        elif not self._verify(self._roster.peers[reducer], _DOMAIN, said, signature):
            raise RemoteError("a mean that its reducer did not sign")
        begin, end = self._spans[part]
        _, place = self._coming.pop(part, (-1, None))
        if place is not coded:
            if place is not None:
                self._renew()
            self._codec.decode_into(coded, self.vector[begin:end])
        if not self._plain:
            self._coded[part] = bytes(coded)  # coding what was decoded may give other bytes
        self.digests[part] = digest[:DIGEST]
        self.proofs[part] = Proof(reducer, contributors, signature)
        self.pending -= self.status[part] is Part.PENDING
        self.status[part] = Part.HELD

    def replace(self, part: int, coded: Buffer, reducer: int, contributors: int, signature: bytes) -> None:
        """Keep another mean in the place of this member's own."""
        if not self._replaced:  # messages not sent yet may point into the first one
            self._replaced = True
            self._renew()
        self.hold(part, coded, reducer, contributors, signature)

    def miss(self, part: int) -> None:
        """A part that was pending will not come."""
        self.pending -= 1
        self.status[part] = Part.MISSING

    def disown(self, part: int) -> None:
        """Report a held part as not held: it counts for nobody then."""
        self.digests[part] = NOTHING

    def message(self, part: int) -> tuple[dict[str, Any], Buffer]:
        """Header and payload that hand a held part on."""
        begin, end = self._spans[part]
        proof = self.proofs[part]
        by, sig = proof.contributors, proof.signature
        header = {"t": "mean", "p": part, "rd": proof.reducer, "by": by, "sig": sig}
        return header, self._coded.get(part, self.vector[begin:end])

    def finish(self, counted: Collection[int], own: memoryview) -> memoryview:
        """The whole vector: of parts that do not count, the member's own numbers."""
        others = set(range(len(self._spans))) - set(counted)
        if self._coming or any(self.status[part] is Part.HELD for part in others):
            self._renew()
        for begin, end in (self._spans[part] for part in others):
            self.vector[begin:end] = own[begin:end]
        return self.vector

    def _renew(self) -> None:
        """Go on with a copy: what waits to be sent may point into the vector, what comes go there."""
        self.vector = memoryview(bytearray(self.vector))
        self._coming.clear()
