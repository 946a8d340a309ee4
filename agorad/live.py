"""A run's present weights from its live replicas, for ``agoractl export``: who is asked, and by whose leave.

The download is a guest's: with a key made for it alone, and a pass for each stage that an authority of the
run signs for who may open its control socket (``p2p.passes``; its audit notes it). The authority also says
who is ACTIVE and where. Nothing listens, and the daemon's own connections are left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agorad.run import Manifest
from p2p.errors import LocalError
from p2p.groups import plain
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.membership import Membership
from p2p.multiaddr import Multiaddr
from stage.fetch import Source

if TYPE_CHECKING:
    from agorad.cli.targets import Target
    from stage.collect import LivePart

ASK_S: Final = 15.0


def states(
    manifest: Manifest, authority: Target, *, scratch: Path, files: ExitStack, tell: Callable[[str], None]
) -> list[LivePart]:
    """Each stage's, into ``scratch``. LocalError where one cannot be had; control errors as they come."""
    swarm = authority.ask("swarm", timeout=ASK_S)
    if swarm["run"] != manifest.run.id:
        raise LocalError(f"{authority.name} is of run {swarm['run']!r}, not of {manifest.run.id!r}")
    identity = Identity.generate()
    passes = [bytes.fromhex(one) for one in authority.ask("passes", peer=identity.peer_id)]
    donors = [_active(stage["replicas"]) for stage in swarm["stages"]]
    try:
        return trio.run(_collect, identity, manifest, donors, passes, scratch, files, tell)
    except BaseExceptionGroup as group:
        raise plain(group) from None


def _active(replicas: Sequence[dict[str, Any]]) -> list[Source]:
    """Those that may be asked, the freshest first."""
    active = [replica for replica in replicas if replica["phase"] == "active"]
    return [
        Source(PeerId(replica["peer_id"]), [Multiaddr.parse(addr) for addr in replica["addrs"]])
        for replica in sorted(active, key=lambda replica: -int(replica["step"]))
    ]


async def _collect(
    identity: Identity,
    manifest: Manifest,
    donors: list[list[Source]],
    passes: list[bytes],
    scratch: Path,
    files: ExitStack,
    tell: Callable[[str], None],
) -> list[LivePart]:
    from stage.collect import collect

    host = Host(identity)
    host.membership = Membership(manifest.trust(), lambda: None, time.time)
    async with host.run([]):
        return await collect(
            host, manifest.model, donors, passes, scratch=scratch, files=files,
            tell=lambda stage, event: tell(f"stage {stage}: {event.bytes} bytes of step {event.step}"),
        )  # fmt: skip
