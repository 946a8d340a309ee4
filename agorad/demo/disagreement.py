"""How far replicas are from their stage's mean at the end of a demo, from the snapshots that they left."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from p2p.errors import LocalError
from stage.snapshot import SnapshotStore


def mean_distance(stages: list[list[Path]]) -> float | None:
    """Mean over replicas of ‖w − mean‖ / ‖mean‖; None if no stage has two readable replicas."""
    distances: list[float] = []
    for folders in stages:
        weights = []
        for folder in folders:
            try:
                state = SnapshotStore(folder).load_newest()
            except LocalError:
                continue
            if state is not None:
                weights.append(state.vectors[0])
        if len(weights) < 2:
            continue
        mean = torch.stack(weights).mean(0)
        norm = float(torch.linalg.vector_norm(mean))
        distances += [float(torch.linalg.vector_norm(w - mean)) / norm for w in weights]
    return math.fsum(distances) / len(distances) if distances else None
