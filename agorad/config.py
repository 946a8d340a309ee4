"""The node's own settings, ``agorad.toml``: which role this process plays and where its things lie.

Theory of operation. Unlike the manifest, nobody else sees this file. It is structured strictly (see
``settings``); ``--role`` and ``--set section.key=value`` of the command line are laid over it before
that. Relative paths, wherever they come from, are meant relative to the folder of the file, so that a
node restarts the same from any working directory.

Defaults follow the state folder: identity ``identity.key``, control socket ``control.sock`` (in /run/agora
where the state is the system's), events ``events.jsonl``. Source: interfaces "Files" and "agorad".
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import attrs

from agorad import hours
from agorad.metrics.address import check_url, read_address
from agorad.settings import override, read_toml, structure
from p2p.errors import LocalError
from stage.config import SLOTS
from stage.settings import ComputeSettings

Role = Literal["seed", "worker", "trainer", "authority"]
ROLES: Final[tuple[str, ...]] = get_args(Role)
DEFAULT_PORT: Final = 49200
PAGE_PORT: Final = 49180
DATABASE_VARIABLE: Final = "AGORA_DATABASE_URL"
SYSTEM_STATE: Final = Path("/var/lib/agora")
SYSTEM_RUNTIME: Final = Path("/run/agora")


@attrs.frozen(kw_only=True)
class NodeSection:
    """``[node]``: what every role has."""

    role: Role
    name: str = ""
    """For people; the role where it is empty."""
    run: Path
    """The run manifest."""
    state: Path
    """Folder of everything this node keeps; one daemon at a time."""
    identity: Path | None = None
    listen: tuple[str, ...] = (f"/ip4/0.0.0.0/tcp/{DEFAULT_PORT}",)
    """Multiaddrs; port 0 lets the kernel choose."""
    announce: tuple[str, ...] = ()
    """Multiaddrs to tell peers instead of the listening ones (port-remapping clouds)."""
    control: Path | None = None
    log: Path | None = None
    """JSON lines go here too; always to stderr."""
    threads: int = 1
    """Threads that computing may use."""
    device: str = "cpu"
    """What computes: auto (a GPU if there is one), cpu, cuda or cuda:N."""


@attrs.frozen(kw_only=True)
class WorkerSection:
    """``[worker]``: a replica of one stage."""

    account: str = ""
    """Name at the authority; the node's name where it is empty."""
    secret_file: Path | None = None
    """Holds the account's secret; needed until the first grant binds the account to the node's key."""
    stage: int | None = None
    """Ask for this stage; the authority chooses where it is not set."""
    slots: int = SLOTS
    """Microbatches accepted before BUSY is answered."""
    snapshot_every: int = 20
    """Steps between two snapshots on disk; 0 writes one only at the end."""


@attrs.frozen(kw_only=True)
class TrainerSection:
    """``[trainer]``: the source of microbatches."""

    data: Path | None = None
    """A text, JSONL or parquet file, or a folder of them; the interpreter's own Python source where it is not
    set."""
    dataset: str = ""
    """Instead of data: a data set of the Hugging Face hub with parquet files, as owner/name,
    owner/name/folder or owner/name@revision."""
    field: str = "text"
    """Where JSONL and parquet have the text."""
    tokenizer: Path | None = None
    """A tokenizer.json, where the manifest's data.tokens is "tokenizer"."""
    credits: int = 0
    """Microbatches in flight; 0 follows what keeps every stage busy."""
    steps: int | None = None
    """Stop when the run's clock reaches this step."""
    seconds: float | None = None
    """Stop after this time."""


@attrs.frozen(kw_only=True)
class AuthoritySection:
    """``[authority]``: who lets peers in."""

    accounts: Path = Path("accounts.toml")
    """The account file: ``[accounts.<name>] secret_sha256 = "…"``."""
    lifetime_s: float = 3600.0
    """Of a certificate; members renew at half of it."""
    grace_s: float = 3600.0
    """How long beyond it members are believed when no authority is there to renew."""
    database: str = attrs.field(default="", repr=False)
    """SQLAlchemy URL; empty: AGORA_DATABASE_URL of the environment, else SQLite in the state folder."""
    hub_endpoint: str = "https://huggingface.co"
    """Who is asked whose a token is, with ``admission.accounts = "huggingface"``."""
    page_listen: str = ""
    """Address and port of the run's web page, like 0.0.0.0:49180; empty: there is none."""


@attrs.frozen(kw_only=True)
class MetricsSection:
    """``[metrics]``: figures for Prometheus; see docs/metrics.md."""

    listen: str = ""
    """Address and port of the page, like 127.0.0.1:49190; empty: none. Port 0 lets the kernel choose."""
    push: str = ""
    """URL of a Pushgateway that the figures are sent to; empty: they leave this machine in no other way."""
    push_token_file: Path | None = None
    """Holds the bearer token that the gateway wants."""
    peak_tflops: float | None = None
    """What the device does at most, for the utilisation of its FLOPs; known for common GPUs."""


@attrs.frozen(kw_only=True)
class LimitsSection:
    """``[limits]``: what a node may take of its machine's line and day; read again on SIGHUP."""

    upload_mbps: float | None = None
    """Mbit/s that this node sends at most, everything counted; no cap where it is not set."""
    download_mbps: float | None = None
    hours: str = ""
    """Local times at which a worker or trainer works, like 22:00-07:30; paused outside of them."""


@attrs.frozen(kw_only=True)
class Config:
    """A checked node configuration; all paths absolute once ``load`` made it."""

    node: NodeSection
    worker: WorkerSection = WorkerSection()
    compute: ComputeSettings = attrs.field(factory=ComputeSettings)
    trainer: TrainerSection = TrainerSection()
    authority: AuthoritySection = AuthoritySection()
    metrics: MetricsSection = MetricsSection()
    limits: LimitsSection = LimitsSection()
    _source: Path | None = None

    def __attrs_post_init__(self) -> None:
        bounds: tuple[tuple[str, float | None, float, float], ...] = (
            ("node.threads", self.node.threads, 1, 1024),
            ("worker.stage", self.worker.stage, 0, 255),
            ("worker.slots", self.worker.slots, 1, 1024),
            ("worker.snapshot_every", self.worker.snapshot_every, 0, 1 << 40),
            ("trainer.credits", self.trainer.credits, 0, 4096),
            ("trainer.steps", self.trainer.steps, 1, 1 << 40),
            ("trainer.seconds", self.trainer.seconds, 0, 1e9),
            ("authority.lifetime_s", self.authority.lifetime_s, 3, 30 * 86400),
            ("authority.grace_s", self.authority.grace_s, 0, 30 * 86400),
            ("limits.upload_mbps", self.limits.upload_mbps, 1, 1e6),
            ("limits.download_mbps", self.limits.download_mbps, 1, 1e6),
            ("metrics.peak_tflops", self.metrics.peak_tflops, 1e-6, 1e6),
        )
        for name, value, low, high in bounds:
            if value is not None and not low <= value <= high:
                raise LocalError(f"{name} = {value} must be between {low} and {high}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.node.device):
            raise LocalError(f"node.device = {self.node.device!r} is none of 'auto', 'cpu', 'cuda', 'cuda:N'")
        hours.parse(self.limits.hours)
        if self.metrics.listen:
            read_address(self.metrics.listen)
        if self.metrics.push:
            check_url(self.metrics.push, self.metrics.push_token_file is not None)
        if self.authority.page_listen:
            read_address(self.authority.page_listen, "authority.page_listen", PAGE_PORT)
        if not self.node.listen:
            raise LocalError("node.listen is empty; name at least one multiaddr, like /ip4/0.0.0.0/tcp/49200")

    @property
    def name(self) -> str:
        """What the node is called in logs and status."""
        return self.node.name or self.node.role

    @property
    def path(self) -> Path | None:
        """The file it was read from."""
        return self._source

    @property
    def identity(self) -> Path:
        """The node's key file."""
        return self.node.identity or self.node.state / "identity.key"

    @property
    def database(self) -> Path | str:
        """An authority's: a file, or an SQLAlchemy URL."""
        url = self.authority.database or os.environ.get(DATABASE_VARIABLE, "")
        return url or self.node.state / "authority.sqlite"

    @property
    def control(self) -> Path:
        """The control socket: of a system's node in /run, emptied at boot; else beside the state."""
        return self.node.control or runtime_of(self.node.state) / "control.sock"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.node.state / "events.jsonl"


def runtime_of(state: Path) -> Path:
    """The folder of a node's socket: in /run where its state is the system's, else the state folder."""
    return SYSTEM_RUNTIME / state.relative_to(SYSTEM_STATE) if state.is_relative_to(SYSTEM_STATE) else state


def secret_of(state: Path) -> Path | None:
    """Where a service is handed its account's secret: a file in memory; None for other nodes.

    A user's service has its folder in memory from systemd (``RuntimeDirectory=``).
    """
    folder = runtime_of(state)
    if folder != state:
        return folder / "secret"
    named = os.environ.get("RUNTIME_DIRECTORY", "")
    return Path(named) / "secret" if named.startswith("/") else None


def default_path() -> Path:
    """The file that is read when none is named: the system's, then the user's."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "agora" / "agorad.toml"
    system = Path("/etc/agora/agorad.toml")
    return system if system.exists() else user


def from_table(
    table: dict[str, Any], base: Path, *, role: str | None = None, assignments: Sequence[str] = ()
) -> Config:
    """A configuration from tables, overrides laid over it, paths made absolute from ``base``."""
    if role is not None:
        assignments = (f"node.role={role}", *assignments)
    config = structure(Config, override(Config, table, assignments))
    return attrs.evolve(
        config,
        node=_absolute(config.node, base),
        worker=_absolute(config.worker, base),
        trainer=_absolute(config.trainer, base),
        authority=_absolute(config.authority, base),
        metrics=_absolute(config.metrics, base),
    )


def load(path: Path, *, role: str | None = None, assignments: Sequence[str] = ()) -> Config:
    """Read and check ``agorad.toml``; every fault is one sentence that names the file."""
    table = read_toml(path, "configuration")
    try:
        config = from_table(table, path.absolute().parent, role=role, assignments=assignments)
    except LocalError as error:
        raise LocalError(f"{path}: {error}") from error
    return attrs.evolve(config, source=path.absolute())


def _absolute(section: Any, base: Path) -> Any:
    changes = {
        field.name: (base / value.expanduser()).resolve()
        for field in attrs.fields(type(section))
        if isinstance(value := getattr(section, field.name), Path)
    }
    return attrs.evolve(section, **changes)
