"""Averaging rounds among the replicas of one stage.

Reading order: ``shares`` and ``roster`` (what members agree on), ``lobby`` and ``matchmaking`` (who is in),
``verdict`` (which parts count), ``result`` (what is held), ``schedule`` (who is given up when), ``butterfly``
(how parts move), then the trio shells ``line``, ``match``, ``session`` and ``averager``.
"""

from p2p.averaging.averager import Averager, MemberDropped, RosterCommitted
from p2p.averaging.lobby import RoundConfig
from p2p.averaging.outcome import NobodyCame, Outcome, RoundFailed
from p2p.averaging.reducer import MakeReducer, PlainReducer, Reducer

__all__ = [
    "Averager",
    "MakeReducer",
    "MemberDropped",
    "NobodyCame",
    "Outcome",
    "PlainReducer",
    "Reducer",
    "RosterCommitted",
    "RoundConfig",
    "RoundFailed",
]
