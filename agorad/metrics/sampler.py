"""Reads a node's states into its book, and watches how late the event loop is.

One task. Every ``BEAT_S`` it measures by how much it woke too late: the loop's lag, which everything else
that waits sees too. Every ``SAMPLE_S`` it reads states and totals, among them a few /proc files.
``bring_up_to_date`` does the same at once, for who asks over the control socket.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import trio

from agorad import __version__
from agorad.metrics import machine
from agorad.metrics.book import PHASES, Book, Follow

if TYPE_CHECKING:
    from agorad.metrics.readings import Readings
    from agorad.node import Node

BEAT_S: Final = 0.25
SAMPLE_S: Final = 5.0


class Sampler:
    """See the file's opening."""

    def __init__(self, node: Node, book: Book) -> None:
        self._node = node
        self._book = book
        self._follow: dict[str, Follow] = {}
        self._looked_at = trio.current_time()
        self._busy_s = 0.0
        self._flops = 0.0
        self._info: tuple[str, ...] = ()
        book.started.set(node.started_at)

    async def run(self) -> None:
        """Until cancelled."""
        due = trio.current_time()
        while True:
            if trio.current_time() >= due:
                self.bring_up_to_date()
                due = trio.current_time() + SAMPLE_S
            woken = trio.current_time() + BEAT_S
            await trio.sleep_until(woken)
            self._book.lag.observe(max(0.0, trio.current_time() - woken))
            self._book.beat.set(time.time())

    def bring_up_to_date(self) -> None:
        """Read everything now."""
        self._node.update_status()
        self._look_at_node()
        self._look_at_network()
        self._look_at_machine()
        self._look_at_role(self._node.readings())

    def _look_at_node(self) -> None:
        node, book = self._node, self._book
        status = node.status
        stage = status.get("stage")
        info = (
            node.config.name, node.config.node.role, node.manifest.run.id, node.identity.peer_id,
            __version__, "" if stage is None else str(stage),
        )  # fmt: skip
        if info != self._info:
            book.info.clear()
            book.info.labels(*info).set(1)
            self._info = info
        now_in = status.get("phase", "joining")
        for phase in PHASES:
            book.phase.labels(phase).set(phase == now_in)
        book.step.set(status.get("step") or 0)
        if (loss := status.get("loss")) is not None:
            book.loss.set(loss)
        book.warnings.set(len(node.warnings))
        queue: dict[str, Any] = status.get("queue") or {}
        book.queue_position.set(queue.get("position") or 0)
        book.queue_eta.set(queue.get("eta_s") or 0)
        for kind, amount in (status.get("points") or {}).items():
            book.points.labels(book.bounded("points", kind)).set(amount)
        self._total("unwritten", node.bus.unwritten)

    def _look_at_network(self) -> None:
        node, book = self._node, self._book
        host = node.host
        traffic = node.traffic()
        for kind in ("boundary", "averaging", "control"):
            self._total("sent", getattr(traffic, kind), kind)
        self._total("hops", traffic.forward_hops, "forward")
        self._total("hops", traffic.backward_hops, "backward")
        self._total("network", host.counters.bytes_out, "out")
        self._total("network", host.counters.bytes_in, "in")
        for protocol, (sent, received) in host.counters.protocols.items():
            name = book.bounded("protocol", protocol)
            self._total("payload", sent, name, "out")
            self._total("payload", received, name, "in")
        for limit, count in host.counters.dropped.items():
            self._total("limit_drops", count, book.bounded("limit", limit))
        book.peers.set(len(host.connections))
        book.dht_peers.set(len(node.dht.table))
        book.dht_records.set(len(node.dht.records))
        for operation, (count, seconds) in node.dht.asked.items():
            self._total("dht_asked", count, operation)
            self._total("dht_s", seconds, operation)

    def _look_at_machine(self) -> None:
        book, now = self._book, machine.look(self._node.config.node.state)
        book.memory.labels("total").set(now.memory_total)
        book.memory.labels("available").set(now.memory_available)
        book.resident.set(now.resident)
        self._total("cpu", now.cpu_s)
        book.load.set(now.load)
        book.descriptors.labels("open").set(now.descriptors)
        book.descriptors.labels("most").set(now.descriptors_most)
        book.disk.labels("total").set(now.disk_total)
        book.disk.labels("free").set(now.disk_free)

    def _look_at_role(self, now: Readings) -> None:
        book = self._book
        if now.in_progress is not None:
            book.in_progress.set(now.in_progress)
        if now.slots is not None and now.slots_free is not None:
            book.slots.labels("all").set(now.slots)
            book.slots.labels("free").set(now.slots_free)
        if now.gradient_norm is not None:
            book.norm.set(now.gradient_norm)
        if now.learning_rate is not None:
            book.rate.set(now.learning_rate)
        if now.samples is not None:
            self._total("run_samples", now.samples)
        if now.tokens_a_sample:
            self._total("tokens", now.tokens_a_sample * self._node.bus.counts["microbatch_completed"])
        if now.waiting is not None:
            book.waiting.set(now.waiting)
        for state, size in now.vram.items():
            book.vram.labels(state).set(size)
        if now.compute_s:
            self._look_at_compute(now)

    def _look_at_compute(self, now: Readings) -> None:
        book = self._book
        for job, seconds in now.compute_s.items():
            self._total("compute_s", seconds, job)
        for job, count in now.jobs.items():
            self._total("jobs", count, job)
        flops = float(now.microbatch_flops * self._node.bus.counts["microbatch_added"])
        self._total("flops", flops)
        busy_s, at = sum(now.compute_s.values()), trio.current_time()
        interval_s = at - self._looked_at
        if interval_s < SAMPLE_S / 2:
            return  # a share of a moment says nothing
        book.utilisation.set(min(1.0, max(0.0, busy_s - self._busy_s) / interval_s))
        if now.peak_flops:
            book.mfu.set((flops - self._flops) / interval_s / now.peak_flops)
        self._busy_s, self._flops, self._looked_at = busy_s, flops, at

    def _total(self, series: str, total: float, *labels: str) -> None:
        if series not in self._follow:
            self._follow[series] = Follow(getattr(self._book, series))
        self._follow[series].to(total, *labels)
