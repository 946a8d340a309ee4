"""Every series of a node, in a registry of its own, and how events move them.

``Book.observe`` is a subscriber of the bus: whatever can be counted is counted from events, so that
figures, log and ``events.jsonl`` say the same. What is a state (phase, peers, bytes of memory) the sampler
sets.

Labels are bounded: kinds are written here, event names and refusal codes are those of the code (at most
``MOST_VALUES`` of each label, then ``other``), and no label holds a peer, an account, an address or a path.
Conventions: ``agora_`` first, units last, ``_total`` for what only grows, ratios from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

MOST_VALUES: Final = 64
OTHER: Final = "other"
PHASES: Final = ("joining", "queued", "downloading", "syncing", "warming", "active", "paused", "leaving")
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FRACTIONS: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
OPEN_ROUNDS: Final = 8
"""Rounds whose beginning is remembered until they end."""

Entry = Mapping[str, Any]


class LateGauge:
    """A gauge that is there once it was set: 0 would be a statement about what nobody has looked at yet."""

    def __init__(self, registry: CollectorRegistry, name: str, what: str) -> None:
        self._gauge = Gauge(name, what, registry=None)
        self._registry = registry
        self._there = False

    def set(self, value: float) -> None:
        """It is this now."""
        self._gauge.set(value)
        if not self._there:
            self._registry.register(self._gauge)
            self._there = True


class Book:
    """See the file's opening. Events and gauges come from the trio thread, pages are made on any."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry or CollectorRegistry()
        self._values: dict[str, set[str]] = {}
        self._began: dict[int, float] = {}
        self._define_node()
        self._define_training()
        self._define_rounds()
        self._define_network()
        self._define_authority()
        self._define_machine()
        self._handlers: dict[str, Callable[[Entry], None]] = self._table()

    # Making series

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """A series that only grows; the name without ``agora_`` and ``_total``."""
        return Counter(f"agora_{name}", what, labels, registry=self.registry)

    def gauge(self, name: str, what: str) -> LateGauge:
        """A series that goes up and down, without labels."""
        return LateGauge(self.registry, f"agora_{name}", what)

    def gauges(self, name: str, what: str, *labels: str) -> Gauge:
        """The same by labels."""
        return Gauge(f"agora_{name}", what, labels, registry=self.registry)

    def histogram(
        self, name: str, what: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        """A distribution."""
        return Histogram(f"agora_{name}", what, labels, buckets=buckets, registry=self.registry)

    def bounded(self, label: str, value: str) -> str:
        """``value``, or ``other`` once the label has ``MOST_VALUES`` of them."""
        known = self._values.setdefault(label, set())
        if value not in known:
            if len(known) >= MOST_VALUES:
                return OTHER
            known.add(value)
        return value

    def _define_node(self) -> None:
        self.info = self.gauges(
            "node_info", "1; what this node is.", "name", "role", "run", "peer_id", "version", "stage"
        )
        self.started = self.gauge("start_timestamp_seconds", "When the process began.")
        self.ready = self.gauge("ready_seconds", "From the process's beginning to readiness.")
        self.phase = self.gauges("phase", "1 for the phase that the node is in, 0 for the others.", "phase")
        self.step = self.gauge("step", "Step of the run's clock that this node has followed to.")
        self.loss = self.gauge("loss", "Training loss that this node saw last (a trainer: a moving mean).")
        self.warnings = self.gauge("warnings", "Troubles that agoractl status shows at present.")
        self.queue_position = self.gauge("queue_position", "Place in the authority's queue, 0 when in.")
        self.queue_eta = self.gauge("queue_eta_seconds", "How long the queue may still take, 0 if unknown.")
        self.points = self.gauges("points", "PFLOP that this node has been credited, by kind.", "kind")
        self.events = self.counter("events", "Events of this process, by name.", "event")
        self.unwritten = self.counter("events_unwritten", "Events that the disk did not take.")
        self.troubles = self.counter("troubles", "Troubles that supervision reacted to, by kind.", "kind")
        self.lag = self.histogram("loop_lag_seconds", "How late the event loop woke up, looked at regularly.")
        self.beat = self.gauge("loop_beat_timestamp_seconds", "When the event loop last turned.")

    def _define_training(self) -> None:
        self.microbatches = self.counter("microbatches", "Microbatches, by what became of them.", "outcome")
        self.in_progress = self.gauge("microbatches_in_progress", "Microbatches being worked on.")
        self.slots = self.gauges("slots", "Microbatches that this worker takes at a time, by state.", "state")
        self.tokens = self.counter("tokens", "Tokens in microbatches that a trainer saw completed.")
        self.run_samples = self.counter("run_samples", "Samples of the whole run, by its signed clock.")
        self.steps = self.counter("steps", "Steps of the clock that this replica followed.")
        self.step_samples = self.counter("step_samples", "Samples that this replica's updates averaged.")
        self.bad_gradients = self.counter("bad_gradients", "Gradients thrown away because not finite.")
        self.norm = self.gauge("gradient_norm", "Of the last update's mean gradient, before clipping.")
        self.rate = self.gauge("learning_rate", "Learning rate of the last update.")
        self.evaluation = self.gauge("evaluation_loss", "Mean loss over the held-out rows, last evaluation.")
        self.evaluation_step = self.gauge("evaluation_step", "Step of the last evaluation.")
        self.compute_s = self.counter("compute_seconds", "Time that the device was busy, by job.", "job")
        self.jobs = self.counter("compute_jobs", "Jobs that the device did, by job.", "job")
        self.utilisation = self.gauge("compute_utilisation_ratio", "Share of the last interval it was busy.")
        self.flops = self.counter("compute_flops", "Floating point operations of microbatches added here.")
        self.mfu = self.gauge("mfu_ratio", "Those of the last interval against the device's peak.")
        self.snapshots = self.counter("snapshots", "Snapshots on disk, by outcome.", "outcome")
        self.snapshot_bytes = self.gauge("snapshot_bytes", "Size of the last snapshot.")
        self.snapshot_at = self.gauge("snapshot_timestamp_seconds", "When the last snapshot was written.")
        self.snapshot_step = self.gauge("snapshot_step", "Step of the last snapshot.")
        self.fetches = self.counter("state_fetches", "Downloads of a stage-mate's state.", "outcome")
        self.fetched_bytes = self.counter("state_fetched_bytes", "Bytes of state that were installed.")
        self.fetched_line = self.counter("state_line_bytes", "Bytes that came over the line for them.")
        self.bad_chunks = self.counter("state_chunks_bad", "Chunks that were not what their manifest said.")

    def _define_rounds(self) -> None:
        self.rounds = self.counter("rounds", "Averaging rounds of this replica, by outcome.", "outcome")
        self.round_fraction = self.histogram(
            "round_fraction_ratio", "Share of the slice that a finished round averaged.", buckets=FRACTIONS
        )
        self.round_members = self.gauge("round_members", "Members who finished the last round.")
        self.round_s = self.histogram("round_exchange_seconds", "From a round's roster to its end.")
        self.round_at = self.gauge("round_timestamp_seconds", "When the last round finished.")
        self.drops = self.counter("round_drops", "Members dropped from rounds, as seen here.")
        self.disagreement = self.gauge("disagreement_ratio", "Distance to the mates' average, last round.")
        self.reroutes = self.counter("reroutes", "Microbatches sent on to another replica.")

    def _define_network(self) -> None:
        self.peers = self.gauge("peers", "Peers that this node has a connection to.")
        self.connections = self.counter("connections", "Connections that came up, by who dialled.", "by")
        self.disconnections = self.counter("disconnections", "Connections that ended.")
        self.handshakes_failed = self.counter("handshakes_failed", "Connections that never got to speak.")
        self.refusals = self.counter("refusals", "Streams refused, by the code that was answered.", "code")
        self.handlers_failed = self.counter("handlers_failed", "Bugs: handlers that raised.")
        self.limit_drops = self.counter("limit_drops", "What a written limit turned away, by limit.", "limit")
        self.sent = self.counter("sent_bytes", "Bytes sent, by what they are.", "kind")
        self.network = self.counter("network_bytes", "Bytes on sockets, framing included.", "direction")
        self.payload = self.counter(
            "protocol_payload_bytes", "Payload bytes by protocol.", "protocol", "direction"
        )
        self.hops = self.counter("boundary_hops", "Microbatches that crossed a stage boundary.", "direction")
        self.dht_peers = self.gauge("dht_peers", "Nodes in this node's routing table.")
        self.dht_records = self.gauge("dht_records", "Records that this node keeps for the swarm.")
        self.dht_asked = self.counter("dht_questions", "Questions put to the hash table.", "operation")
        self.dht_s = self.counter("dht_questions_seconds", "Time that these took.", "operation")
        self.dht_isolations = self.counter("dht_isolations", "Times that no node of the table answered.")
        self.records_refused = self.counter("dht_records_refused", "Records not kept, by code.", "code")
        self.skew = self.gauge("clock_skew_seconds", "Peer's clock less ours, where it was last too much.")

    def _define_authority(self) -> None:
        self.joins = self.counter("joins_answered", "Joins and renewals that were answered.", "outcome")
        self.waiting = self.gauge("queue_waiting", "Joiners who wait in this authority's queue.")
        self.receipts = self.counter("receipts", "Receipts of work, by what became of them.", "outcome")
        self.receipts_waiting = self.gauge("receipts_waiting", "Receipts that no authority has taken yet.")
        self.certificate_ends = self.gauge("certificate_expiry_timestamp_seconds", "Of this node's own.")

    def _define_machine(self) -> None:
        self.memory = self.gauges("host_memory_bytes", "Of the machine, or of what it lets us have.", "state")
        self.resident = self.gauge("resident_memory_bytes", "Memory of this process.")
        self.cpu = self.counter("cpu_seconds", "Processor time of this process.")
        self.load = self.gauge("host_load_ratio", "Runnable tasks a processor, mean of the last minute.")
        self.descriptors = self.gauges("descriptors", "File descriptors, by state.", "state")
        self.disk = self.gauges("state_disk_bytes", "Of the disk that the state folder is on.", "state")
        self.vram = self.gauges("accelerator_memory_bytes", "Of the accelerator.", "state")

    # Events

    def observe(self, entry: Entry) -> None:
        """Count one event."""
        name = entry["event"]
        self.events.labels(self.bounded("event", name)).inc()
        if (handler := self._handlers.get(name)) is not None:
            handler(entry)

    def counts(self, name: str) -> bool:
        """Whether an event of this name moves more than the count of events."""
        return name in self._handlers

    def _table(self) -> dict[str, Callable[[Entry], None]]:
        def outcome(counter: Counter, value: str) -> Callable[[Entry], None]:
            child = counter.labels(value)
            return lambda _entry: child.inc()

        def bump(counter: Counter) -> Callable[[Entry], None]:
            return lambda _entry: counter.inc()

        return {
            "ready": lambda e: self.ready.set(e["seconds"]),
            "microbatch_issued": outcome(self.microbatches, "issued"),
            "microbatch_added": outcome(self.microbatches, "added"),
            "microbatch_completed": outcome(self.microbatches, "completed"),
            "microbatch_failed": outcome(self.microbatches, "failed"),
            "reused": outcome(self.microbatches, "reused"),
            "reused_stale": outcome(self.microbatches, "reused_stale"),
            "busy": outcome(self.microbatches, "busy"),
            "rerouted": bump(self.reroutes),
            "step": self._step,
            "bad_gradient": bump(self.bad_gradients),
            "bad_output": outcome(self.microbatches, "not_finite"),
            "trouble": lambda e: self.troubles.labels(self.bounded("trouble", e["kind"])).inc(),
            "evaluated": self._evaluated,
            "saved": self._saved,
            "save_failed": outcome(self.snapshots, "failed"),
            "state_fetched": self._fetched,
            "fetch_failed": outcome(self.fetches, "failed"),
            "chunk_bad": bump(self.bad_chunks),
            "roster_committed": self._round_began,
            "round_finished": self._round_finished,
            "gradients_averaged": self._averaged,
            "round_abandoned": outcome(self.rounds, "abandoned"),
            "member_dropped": bump(self.drops),
            "connected": lambda e: self.connections.labels("us" if e["dialed"] else "them").inc(),
            "disconnected": bump(self.disconnections),
            "handshake_failed": bump(self.handshakes_failed),
            "peer_refused": lambda e: self.refusals.labels(self.bounded("refusal", e["why"])).inc(),
            "handler_failed": bump(self.handlers_failed),
            "dht_isolated": bump(self.dht_isolations),
            "record_refused": lambda e: self.records_refused.labels(self.bounded("record", e["code"])).inc(),
            "clock_skewed": lambda e: self.skew.set(e["seconds"]),
            "join_answered": lambda e: self.joins.labels(self.bounded("join", e["outcome"])).inc(),
            "certificate_granted": lambda e: self.certificate_ends.set(e["expires"]),
            "receipts_submitted": self._receipts_submitted,
            "receipts_delayed": lambda e: self.receipts_waiting.set(e["waiting"]),
            "receipts_dropped": lambda e: self.receipts.labels("dropped").inc(e["count"]),
            "receipts_credited": self._receipts_credited,
        }

    def _step(self, entry: Entry) -> None:
        self.steps.inc()
        self.step_samples.inc(entry["samples"])

    def _evaluated(self, entry: Entry) -> None:
        self.evaluation.set(entry["loss"])
        self.evaluation_step.set(entry["step"])

    def _saved(self, entry: Entry) -> None:
        self.snapshots.labels("saved").inc()
        self.snapshot_bytes.set(entry["bytes"])
        self.snapshot_at.set(entry["at"])
        self.snapshot_step.set(entry["step"])

    def _fetched(self, entry: Entry) -> None:
        self.fetches.labels("installed").inc()
        self.fetched_bytes.inc(entry["bytes"])
        self.fetched_line.inc(entry["line"])

    def _round_began(self, entry: Entry) -> None:
        self.rounds.labels("begun").inc()
        self._began[entry["round"]] = entry["at"]
        while len(self._began) > OPEN_ROUNDS:
            del self._began[next(iter(self._began))]

    def _round_finished(self, entry: Entry) -> None:
        self.disagreement.set(entry["disagreement"])
        self._averaged(entry)

    def _averaged(self, entry: Entry) -> None:
        self.rounds.labels("complete" if entry["fraction"] >= 1 else "partial").inc()
        self.round_fraction.observe(entry["fraction"])
        self.round_members.set(len(entry["members"]))
        self.round_at.set(entry["at"])
        began = self._began.pop(entry["round"], None)
        if began is not None:
            self.round_s.observe(max(0.0, entry["at"] - began))

    def _receipts_submitted(self, entry: Entry) -> None:
        for outcome in ("new", "known", "refused"):
            self.receipts.labels(outcome).inc(entry[outcome])
        self.receipts_waiting.set(entry["waiting"])

    def _receipts_credited(self, entry: Entry) -> None:
        for outcome in ("new", "known", "refused"):
            self.receipts.labels(outcome).inc(entry[outcome])


class Follow:
    """Keeps a counter equal to a total that somebody else keeps."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last: dict[tuple[str, ...], float] = {}

    def to(self, total: float, *labels: str) -> None:
        """The total is this now; one that fell (its owner began anew) counts from there."""
        grown = total - self._last.get(labels, 0.0)
        self._last[labels] = total
        child = self._counter.labels(*labels) if labels else self._counter
        child.inc(max(0.0, grown))
