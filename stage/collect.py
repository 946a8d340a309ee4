"""The present weights of all stages, from replicas that train: for who exports a model of a run as it is.

All stages are asked at once, each its freshest ACTIVE replica first, by ``stage.fetch``, with a guest's pass
(``p2p.passes``): the same questions that a newcomer asks, and the same checks. A donor gives its state as of
about now, and says of which step before the first chunk, so the stages' steps are near each other however
long the downloads take. Of each state the chunks that hold weights are asked for, a third of it.

Limits: those of ``stage.donor``; a stage of which nobody gives anything for ``PATIENCE_S`` ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import attrs
import trio
from torch import Tensor

from p2p.errors import LocalError, P2PError, Refused
from p2p.event import Event
from p2p.host import Host
from p2p.identity import PeerId
from stage.config import ModelConfig
from stage.events import StateFetching
from stage.export import Arriving
from stage.fetch import Fetch, Source
from stage.parameters import Layout, parameter_specs

PATIENCE_S = 30.0
RETRY_S = 3.0


@attrs.frozen
class LivePart:
    """A stage's weights, as a replica had them when it was asked."""

    donor: PeerId
    arrived: Arriving

    @property
    def step(self) -> int:
        return self.arrived.manifest.step

    @property
    def where(self) -> str:
        return self.donor

    def weights(self, _scratch: Path) -> Tensor:
        return self.arrived.weights()


async def collect(
    host: Host,
    model: ModelConfig,
    donors: Sequence[Sequence[Source]],
    passes: Sequence[bytes],
    *,
    scratch: Path,
    files: ExitStack,
    tell: Callable[[int, StateFetching], None],
) -> list[LivePart]:
    """The weights of every stage; ``donors`` and ``passes`` are a stage's each, the best donor first.

    What comes lies in files without a name in ``scratch``, closed with ``files``. ``tell`` hears, with the
    stage, how far a download is. Raises LocalError, alone or in a group, for a stage that nobody gives.
    """
    found: dict[int, LivePart] = {}

    async def one(stage: int) -> None:
        layout = Layout.of(parameter_specs(model, stage))

        def emit(event: Event) -> None:
            if isinstance(event, StateFetching):
                tell(stage, event)

        fetch = Fetch(
            host, stage, floats=layout.size, fingerprint=layout.fingerprint, store=None, emit=emit,
            guest_pass=passes[stage],
        )  # fmt: skip
        why = "it has no ACTIVE replica"
        until = trio.current_time() + PATIENCE_S
        while donors[stage]:
            for first in donors[stage]:
                others = [other for other in donors[stage] if other != first]
                try:
                    begin = partial(Arriving, scratch=scratch, files=files)
                    found[stage] = LivePart(first.peer, await fetch.weights([first, *others], begin))
                    return
                except (P2PError, trio.TooSlowError) as error:
                    why = error.why if isinstance(error, Refused) else str(error) or "it is too slow"
            if trio.current_time() > until:
                break
            await trio.sleep(RETRY_S)
        raise LocalError(f"nobody gives the state of stage {stage}: {why}; agoractl swarm shows the run")

    async with trio.open_nursery() as nursery:
        for stage in range(model.stages):
            nursery.start_soon(one, stage)
    return [found[stage] for stage in range(model.stages)]
