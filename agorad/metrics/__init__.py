"""Figures of one node for Prometheus: what they are (``book``), how they are read (``sampler``), who may
fetch them (``page``) and where they may be sent (``push``). Names and meanings: docs/metrics.md.
"""
