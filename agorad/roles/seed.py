"""The seed: a node that others find the swarm by.

It serves the hash table, identify and the control socket, and needs no certificate, since the manifest
lists it. Nothing else depends on it once the others know each other.
"""

from __future__ import annotations

from agorad.node import Node


async def run(node: Node) -> None:
    """Serve until asked to stop."""
    node.ready()
    await node.stopping.wait()
