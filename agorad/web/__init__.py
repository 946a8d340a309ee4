"""The run's public page, served by an authority: see ``service``.

``watch`` gathers facts, ``history`` keeps what curves are made of, ``document`` makes the JSON of them,
``pages`` and ``charts`` the HTML; ``desk`` answers requests from a cache of these; ``server`` speaks HTTP.
"""
