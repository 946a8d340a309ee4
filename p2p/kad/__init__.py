"""Own Kademlia over ``/agora/kad/1``: signed records that expire, found without anybody in charge.

Read ``ids``, ``table``, ``record``, ``store``, ``merge``, ``lookup`` (no IO in any of them), then
``messages``, ``exchange``, ``search``, ``placing``, ``handover`` and ``node``, which drives them over a
``Host``.
"""

from __future__ import annotations

from p2p.kad.node import Dht, Seeds
from p2p.kad.record import Record
from p2p.kad.search import KadLimits
from p2p.kad.table import Contact

__all__ = ["Contact", "Dht", "KadLimits", "Record", "Seeds"]
