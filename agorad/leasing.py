"""The leases of a trainer in the hash table: read, acted on, renewed (the rules are ``stage.leases``).

One record a trainer, signed by its key, under ``lease/{run}``. It is stored again every ``LOOK_S``, and a
last time when the trainer ends, so that whoever takes over repeats little. A hash table that does not answer
changes nothing: what is held is worked on, and its claim runs out meanwhile.
"""

from __future__ import annotations

import trio

from agorad.events import ShardLeft, ShardTaken
from agorad.node import Node
from p2p.errors import P2PError
from p2p.records import LeaseRecord, lease_key, read_all
from stage.leases import Leases
from stage.progress import Journal
from stage.trainer import Trainer

LOOK_S = 5.0
SOON_S = 1.0
"""Between two looks of a trainer that has nothing to do but to wait for others."""
READ_S = 5.0
STORE_S = 5.0
TTL_S = 3600.0
"""How long a claim's progress is remembered after its trainer is gone."""


class Leasing:
    """See the head of this file."""

    def __init__(self, node: Node, leases: Leases, trainer: Trainer, journal: Journal) -> None:
        self._node = node
        self._leases = leases
        self._trainer = trainer
        self._journal = journal

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_after(LOOK_S):
                await self._trainer.resting.wait()
                await trio.sleep(SOON_S)
            await self.look()

    async def look(self) -> None:
        """Read what others say, act on it, and say how far this trainer is."""
        node = self._node
        try:
            records = await node.dht.get(lease_key(node.manifest.run.id), deadline=READ_S)
        except (P2PError, trio.TooSlowError):
            records = {}
        found = read_all(LeaseRecord, records, emit=node.emit)
        look = self._leases.look(node.clock(), found)
        for shard, told in look.take:
            self._trainer.take(shard, told)
            node.emit(ShardTaken(shard=shard, mark=self._journal.shard(shard).mark))
        for shard in look.drop:
            self._trainer.drop(shard)
            node.emit(ShardLeft(shard=shard, why="another trainer has it by now"))
        for shard in look.give_back:
            self._trainer.drop(shard)
            if self._trainer.idle(shard):
                self._leases.free(shard)
                node.emit(ShardLeft(shard=shard, why="its own trainer is back"))
        await self.publish()

    async def publish(self) -> None:
        """Say how far this trainer is."""
        node = self._node
        record = self._leases.record(node.clock(), self._journal.shard)
        try:
            await node.dht.store(
                lease_key(node.manifest.run.id),
                node.identity.peer_id,
                record.to_value(),
                ttl=TTL_S,
                deadline=STORE_S,
            )
        except P2PError:
            pass  # the next one is seconds away
