"""The key space of the hash table: 256-bit numbers with XOR as the distance.

A node's place is the SHA-256 of its public key, so nobody chooses where to sit without searching for
a key pair that lands there; a key's place is the SHA-256 of its text. Distances are plain Python
integers: comparing two of them is what a lookup does all day, and integers do that fastest.

Source: Maymounkov and Mazières, *Kademlia* (2002), section 2; S/Kademlia (2007) for ids from keys.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from random import Random

from p2p.identity import PeerId, public_key_of

BITS = 256
BYTES = BITS // 8


@lru_cache(maxsize=8192)
def node_id(peer: PeerId) -> int:
    """Where a peer sits. Raises RemoteError when the text is not a peer id that carries its key."""
    return int.from_bytes(hashlib.sha256(public_key_of(peer)).digest(), "big")


@lru_cache(maxsize=1024)
def key_id(key: str) -> int:
    """Where a key's records live."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")


def bucket_index(own: int, other: int) -> int:
    """Number of leading bits two ids share; the bucket of ``other`` in the table of ``own``."""
    return BITS - (own ^ other).bit_length()


def random_in_bucket(own: int, index: int, rng: Random) -> int:
    """A random id whose first ``index`` bits are ours and whose next bit differs."""
    rest = BITS - index - 1
    flipped = (own >> rest) ^ 1
    return (flipped << rest) | (rng.getrandbits(rest) if rest else 0)
