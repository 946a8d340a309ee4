"""Own Kademlia over ``/agora/kad/1``: signed records that expire, found without anybody in charge.

Read ``ids``, ``table``, ``record``, ``store``, ``lookup`` (no IO in any of them), then ``messages``
and ``node``, which drives them over a ``Host``.
"""
