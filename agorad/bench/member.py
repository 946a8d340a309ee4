"""What a process at the end of a measurement is: a member of the measurement's own run (see ``ends``)."""

from __future__ import annotations

import json
import time
from typing import Any, Final

from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.membership import Membership, Trust

RUN: Final = "bench"
"""The run that ends of a measurement are members of."""


def host(spec: dict[str, Any]) -> Host:
    """A host with the key and the certificate of the spec: gates and counters are those of the daemon."""
    made = Host(Identity.decode(bytes.fromhex(spec["key"])))
    authorities = frozenset([PeerId(spec["authority"])])
    trust = Trust(run=RUN, manifest_hash=b"bench", authorities=authorities, standing={})
    certificate = bytes.fromhex(spec["certificate"])
    made.membership = Membership(trust, lambda: certificate, time.time)
    return made


def say(**facts: Any) -> None:
    """A line for who measures."""
    print(json.dumps(facts), flush=True)
