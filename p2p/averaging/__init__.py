"""Averaging rounds among the replicas of one stage.

Reading order: ``shares`` and ``roster`` (what members agree on), ``matchmaking`` (who is in),
``butterfly`` (how parts move), ``verdict`` (which parts count), ``averager`` (the trio shell).
"""
