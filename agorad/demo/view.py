"""The live view of a demo: a table on a terminal, a line now and then elsewhere. Writes to stderr."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agorad.demo.swarm import Running, Swarm

LINE_S: Final = 5.0


class View:
    """Use as a context manager; call ``show`` after each poll."""

    def __init__(self, swarm: Swarm, goal: str) -> None:
        self._swarm = swarm
        self._goal = goal
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._began = time.monotonic()
        self._next_line = 0.0

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line for people."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def show(self) -> None:
        if self._console.is_terminal:
            self._live.update(self.frame(), refresh=True)
            return
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_S
            self.say(self._headline())

    def _headline(self) -> str:
        swarm = self._swarm
        losses = [r.status.get("loss") for r in swarm.of_role("trainer")]
        known = [loss for loss in losses if loss is not None]
        loss = f"loss {sum(known) / len(known):.3f}" if known else "no loss yet"
        workers = swarm.of_role("worker")
        active = sum(r.answers and r.status.get("phase") == "active" for r in workers)
        elapsed = time.monotonic() - self._began
        return (
            f"{elapsed:.0f} s  step {swarm.step}{self._goal}  {swarm.completed} microbatches  {loss}  "
            f"{active} of {len(workers)} replicas active"
        )

    def frame(self) -> Group:
        """The headline and one row a node, within 80 columns."""
        # Without borders it fits 80 columns; a row never takes two lines.
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("node", "stage", "phase", "step", "batches", "loss", "last round", "peers"):
            left = column in ("node", "phase")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for running in self._swarm.nodes:
            status = running.status if running.answers else {}
            work = status.get("microbatches") or {}
            last = status.get("round")
            table.add_row(
                running.node.name,
                "-" if running.node.stage is None else str(running.node.stage),
                status.get("phase") or _without_word(running),
                str(status.get("step", "-")),
                str(work.get("added", work.get("completed", "-"))),
                "-" if status.get("loss") is None else f"{status['loss']:.3f}",
                "-" if not last else f"{last['number']}: {last['fraction']:.0%} of {last['members']}",
                str(status.get("peers", "-")),
            )
        return Group(Text(self._headline(), overflow="ellipsis", no_wrap=True), table)


def _without_word(running: Running) -> str:
    """What to call a node that does not answer."""
    code = running.process.poll()
    if code is None:
        return "silent" if running.status else "starting"
    return "ended" if code == 0 else "gone"
