"""The simulated network: the same protocols in memory and virtual time. See ``network`` and ``replay``."""

from p2p.sim.network import Link, SimNetwork, SimStream, SimTransport
from p2p.sim.replay import run

__all__ = ["Link", "SimNetwork", "SimStream", "SimTransport", "run"]
