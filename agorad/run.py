"""The run manifest ``run.toml``: the public, operator-signed description of one training run.

Theory of operation. The manifest is the root of trust: everything that members believe about a run,
who its authorities, seeds and trainers are, what is trained and how, stands here, and the operator's
signature covers all of it. It is read as plain TOML tables; signature and hash are over the tables
*as written* (canonical JSON without ``[signature]``: sorted keys, no spaces), not over what this
version makes of them, so that a manifest keeps its hash when later versions add settings. Peers compare
the hash in hello, so a manifest re-signed by another operator is another run.

Names: ``[run]``, ``[[authorities]]``, ``[[seeds]]``, ``[[trainers]]``, ``[model]``, ``[training]``,
``[admission]``, ``[data]``, ``[checkpoint]``, ``[signature]``; unknown settings are errors. Limits: 1 MiB, 64
nodes a list, 16 addresses a node. Source: interfaces "Files", architecture decision 5.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from agorad.settings import read_toml, structure, unstructure
from p2p.errors import LocalError, RemoteError
from p2p.files import write_whole
from p2p.identity import Identity, PeerId, public_key_of, verify
from p2p.membership import Trust
from p2p.multiaddr import Multiaddr
from stage.checkpoints import Line
from stage.config import ModelConfig, TrainingConfig

FORMAT: Final = 1
_DOMAIN: Final = "manifest"
_NODES_LIMIT: Final = 64
_ADDRS_LIMIT: Final = 16


@attrs.frozen(kw_only=True)
class RunInfo:
    """``[run]``: what the run is called and whose it is."""

    format: int = FORMAT
    name: str
    """For people."""
    id: str
    """For protocols and DHT keys: lower-case letters, digits, dashes, at most 64."""
    version: int = 1
    """Grows with every manifest that the operator signs for this run."""
    created: float = 0.0
    """Unix time."""
    operator: PeerId
    """The key that signs."""
    revoked: tuple[PeerId, ...] = ()
    """Former authorities whose certificates count for nothing from this version on: their keys leaked, say.
    Those of others that are no longer listed are honoured for some minutes more."""


@attrs.frozen(kw_only=True)
class NodeRef:
    """A listed node: a member without a certificate, found without the DHT."""

    peer_id: PeerId
    addrs: tuple[str, ...] = ()
    """Multiaddrs."""

    def __attrs_post_init__(self) -> None:
        _check_peer_id(self.peer_id, "a listed node")
        try:
            self.multiaddrs()
        except RemoteError as error:
            raise LocalError(f"the address of {self.peer_id} in the manifest is wrong: {error}") from error

    def multiaddrs(self) -> list[Multiaddr]:
        """The addresses, parsed."""
        return [Multiaddr.parse(addr) for addr in self.addrs]


@attrs.frozen(kw_only=True)
class Admission:
    """``[admission]``: whom the authority lets in."""

    accounts: Literal["file", "huggingface"] = "file"
    """Where accounts come from: the authority's file, or who the hub says that a token is."""
    max_nodes: int = 1000
    max_nodes_per_account: int = 2
    min_vram_gib: float = 0.0
    """Here and below, 0 is no rule."""
    min_ram_gib: float = 0.0
    min_disk_gib: float = 0.0
    """Free, where the node keeps its state."""
    min_mbps: float = 0.0
    """Each way, measured against peers of this run."""
    max_rtt_ms: float = 80.0
    """Median over peers of this run."""
    max_clock_skew_s: float = 30.0
    port_test: bool = True
    """Whether an announced address must be reachable from outside."""
    joins_per_minute: float = 0.0
    """Pace of grants; joins beyond it queue. 0: not paced."""
    moves_per_hour: float = 30.0
    """How often a node of the run may go to another stage where it is missed more. 0: never.

    At most once a minute: until a mover shows at its new stage, others would follow it there.
    """
    queue_limit: int = 2000
    queue_timeout_s: float = 3600.0
    place_kept_s: float = 300.0
    """How long a place in the queue outlives a dropped stream or a restart."""
    max_download_s: float = 0.0
    """A joiner whose download of the state will take longer is told so."""
    min_version: str = ""
    """Oldest agorad that may join or renew, like "0.3.0"."""
    min_version_from: float = 0.0
    """Unix time; before it ``min_version`` is an announcement only."""

    def __attrs_post_init__(self) -> None:
        for name, low, high in _ADMISSION_BOUNDS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise LocalError(f"admission.{name} = {value:g} must be between {low:g} and {high:g}")
        if not re.fullmatch(r"(\d{1,6}(\.\d{1,6}){0,2})?", self.min_version):
            raise LocalError(f"admission.min_version = {self.min_version!r} is not a version like '0.3.0'")

    @property
    def pace_s(self) -> float:
        """Seconds between two grants out of the queue; 0: not paced."""
        return 60.0 / self.joins_per_minute if self.joins_per_minute else 0.0

    @property
    def move_pace_s(self) -> float:
        """Seconds between two nodes that change their stage; infinite: none may."""
        return 3600.0 / self.moves_per_hour if self.moves_per_hour else math.inf


_ADMISSION_BOUNDS: Final = (
    ("max_nodes", 1, 1_000_000),
    ("max_nodes_per_account", 1, 1_000_000),
    ("min_vram_gib", 0, 1e5),
    ("min_ram_gib", 0, 1e5),
    ("min_disk_gib", 0, 1e6),
    ("min_mbps", 0, 1e6),
    ("max_rtt_ms", 0, 60_000),
    ("max_clock_skew_s", 0, 86_400),
    ("joins_per_minute", 0, 1e6),
    ("moves_per_hour", 0, 60),
    ("queue_limit", 1, 100_000),
    ("queue_timeout_s", 0, 30 * 86_400),
    ("place_kept_s", 0, 86_400),
    ("max_download_s", 0, 30 * 86_400),
    ("min_version_from", 0, 1e11),
)


@attrs.frozen(kw_only=True)
class Data:
    """``[data]``: how text becomes token ids."""

    tokens: Literal["bytes", "tokenizer"] = "bytes"
    """Bytes, or what the tokenizer makes that every trainer has as a file of its own."""
    tokenizer_sha256: str = ""
    """Of that file, so that all trainers have the same; empty: not looked at."""


@attrs.frozen(kw_only=True)
class Checkpoint:
    """``[checkpoint]``: where whole states outlive all replicas; see ``stage.checkpoints``."""

    store: str = ""
    """A folder, or a URL that fsspec knows: s3://bucket/folder, hf://datasets/owner/name; empty: none."""
    writers: tuple[PeerId, ...] = ()
    """Workers of the operator's that write it, one or more a stage; only theirs are believed."""
    every: int = 200
    """Steps between two checkpoints of a stage."""
    keep: int = 3
    """Newest ones that are kept."""
    generation: int = 0
    """How often the run was rolled back; see `agoractl run rollback`."""
    back_to: int = 0
    """The step that the last roll-back went back to; the clock goes on."""

    def __attrs_post_init__(self) -> None:
        for name, low, high in _CHECKPOINT_BOUNDS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise LocalError(f"checkpoint.{name} = {value} must be between {low} and {high}")
        for peer in self.writers:
            _check_peer_id(peer, "checkpoint.writers")
        if len(self.writers) > _NODES_LIMIT:
            raise LocalError(f"checkpoint.writers: at most {_NODES_LIMIT}")
        if self.generation and not self.store:
            raise LocalError("checkpoint.generation needs checkpoint.store: a roll-back begins there")

    @property
    def line(self) -> Line:
        """Which checkpoints count."""
        return Line(self.generation, self.back_to)


_CHECKPOINT_BOUNDS: Final = (
    ("every", 1, 1 << 40),
    ("keep", 1, 1000),
    ("generation", 0, 1 << 31),
    ("back_to", 0, 1 << 40),
)


@attrs.frozen(kw_only=True)
class Signature:
    """``[signature]``: the operator's, over everything else."""

    ed25519: str
    """128 hexadecimal digits."""


@attrs.frozen(kw_only=True)
class Manifest:
    """A checked run manifest. ``trust`` and ``hash`` are what the peer-to-peer layer needs of it."""

    run: RunInfo
    authorities: tuple[NodeRef, ...] = ()
    seeds: tuple[NodeRef, ...] = ()
    trainers: tuple[NodeRef, ...] = ()
    model: ModelConfig
    training: TrainingConfig
    admission: Admission = Admission()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    signature: Signature | None = None
    _content: bytes = attrs.field(default=b"", repr=False, eq=False)
    """Canonical bytes of the tables as they were read; empty for one made in memory."""

    def __attrs_post_init__(self) -> None:
        if self.run.format != FORMAT:
            raise LocalError(
                f"run.format = {self.run.format}: this version reads format {FORMAT}; update agorad"
            )
        if not re.fullmatch(r"[a-z0-9-]{1,64}", self.run.id):
            raise LocalError(
                f"run.id = {self.run.id!r} must be 1 to 64 lower-case letters, digits and dashes"
            )
        _check_peer_id(self.run.operator, "run.operator")
        for peer in self.run.revoked:
            _check_peer_id(peer, "run.revoked")
        if both := {node.peer_id for node in self.authorities}.intersection(self.run.revoked):
            raise LocalError(
                f"{min(both)} stands in run.revoked and among the authorities; it is one of them"
            )
        if len(self.run.revoked) > _NODES_LIMIT:
            raise LocalError(f"run.revoked: at most {_NODES_LIMIT} keys")
        for name in ("authorities", "seeds", "trainers"):
            nodes: tuple[NodeRef, ...] = getattr(self, name)
            if len(nodes) > _NODES_LIMIT or any(len(node.addrs) > _ADDRS_LIMIT for node in nodes):
                raise LocalError(f"{name}: at most {_NODES_LIMIT} nodes with {_ADDRS_LIMIT} addresses each")
        if self.data.tokenizer_sha256 and not re.fullmatch("[0-9a-f]{64}", self.data.tokenizer_sha256):
            raise LocalError("data.tokenizer_sha256 must be 64 lower-case hexadecimal digits, or empty")
        if self.data.tokens == "bytes" and self.model.vocab < 256:
            raise LocalError(
                f"model.vocab = {self.model.vocab} must be at least 256, since the data are bytes"
            )

    @property
    def content(self) -> bytes:
        """What the operator signs."""
        return self._content or _canonical(unstructure(self))

    @property
    def hash(self) -> bytes:
        """SHA-256 of the signed content; 32 bytes."""
        return hashlib.sha256(self.content).digest()

    def trust(self) -> Trust:
        """What membership checks are made against."""
        standing: dict[PeerId, str] = {}
        for role, nodes in (
            ("seed", self.seeds),
            ("trainer", self.trainers),
            ("authority", self.authorities),
        ):
            standing.update({node.peer_id: role for node in nodes})
        return Trust(
            run=self.run.id,
            manifest_hash=self.hash,
            authorities=frozenset(node.peer_id for node in self.authorities),
            standing=standing,
            revoked=frozenset(self.run.revoked),
        )

    def signed(self, operator: Identity) -> Manifest:
        """This manifest with the operator's signature."""
        if operator.peer_id != self.run.operator:
            raise LocalError(
                f"the run's operator is {self.run.operator}; the key given is {operator.peer_id}'s"
            )
        signature = operator.sign(_DOMAIN, self.content).hex()
        return attrs.evolve(self, signature=Signature(ed25519=signature), content=self.content)

    def check_signature(self) -> None:
        """``LocalError`` unless the operator signed exactly this content."""
        if self.signature is None:
            raise LocalError(f"the manifest of run {self.run.id!r} is not signed; run `agoractl run sign`")
        try:
            signature = bytes.fromhex(self.signature.ed25519)
        except ValueError:
            signature = b""
        if len(signature) != 64 or not verify(self.run.operator, _DOMAIN, self.content, signature):
            raise LocalError(
                f"the manifest of run {self.run.id!r} was altered after {self.run.operator} signed it; "
                "get it again from the run's operator"
            )

    def table(self) -> dict[str, Any]:
        """As TOML tables, signature included."""
        table: dict[str, Any] = _in_order(json.loads(self.content), unstructure(self))
        if self.signature is not None:
            table["signature"] = {"ed25519": self.signature.ed25519}
        return table


def from_table(table: Mapping[str, Any]) -> Manifest:
    """A manifest from TOML tables; shapes and names are checked, the signature is not."""
    manifest = structure(Manifest, table)
    return attrs.evolve(manifest, content=_canonical(table))


def load(path: Path, *, signed: bool = True) -> Manifest:
    """Read and check ``run.toml``; every fault is one sentence that names the file."""
    try:
        manifest = from_table(read_toml(path, "run manifest"))
        if signed:
            manifest.check_signature()
    except LocalError as error:
        text = str(error)
        raise LocalError(text if str(path) in text else f"{path}: {text}") from error
    return manifest


def save(manifest: Manifest, path: Path) -> None:
    """Write ``run.toml`` so that a reader sees the old file or the whole new one."""
    import tomli_w  # only those who write manifests pay for it

    head = "# Run manifest of agorad: public, signed by the run's operator; edit and sign it again.\n"
    write_whole(path, (head + tomli_w.dumps(manifest.table())).encode())


def _in_order(table: Any, pattern: Any) -> Any:
    """``table`` with its keys in the order of ``pattern``'s, for people; content is sorted."""
    if not isinstance(table, dict) or not isinstance(pattern, dict):
        return table
    ranked = sorted(table, key=list(pattern).index)
    return {key: _in_order(table[key], pattern[key]) for key in ranked}


def _check_peer_id(peer_id: PeerId, where: str) -> None:
    try:
        public_key_of(peer_id)
    except RemoteError as error:
        raise LocalError(f"{where} has a peer id that is none: {error}; copy it again") from error


def _canonical(table: Mapping[str, Any]) -> bytes:
    plain = {key: value for key, value in table.items() if key != "signature"}
    try:
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # TOML dates, inf and nan have no canonical form here
        raise LocalError(f"the manifest holds a value that cannot be signed: {error}") from error
    return text.encode()
