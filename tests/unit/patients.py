"""A run's folder with one node in it, healthy until a fault is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import tomli_w

from agorad import run
from agorad.cli.targets import Target
from agorad.doctor.diagnose import diagnose
from agorad.doctor.patient import examine
from agorad.join.findings import Finding
from agorad.run import Manifest
from p2p.identity import Identity
from stage.config import ModelConfig

MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1))


@attrs.define
class Place:
    """A run's folder with one node in it, healthy until a fault is planted."""

    folder: Path
    operator: Identity
    keys: dict[str, Identity]
    manifest: Manifest
    role: str = "worker"
    opened: list[Any] = attrs.field(factory=list)

    @property
    def node(self) -> Path:
        return self.folder / "node"

    def set(self, **settings: Any) -> None:
        """Write the settings with these in ``[node]``, or in the section that is given as a table."""
        node = {
            "role": self.role, "run": "../run.toml", "state": ".",
            "listen": ["/ip4/127.0.0.1/tcp/0"], "control": "c.sock",
        }  # fmt: skip
        sections = {name: settings.pop(name) for name in list(settings) if isinstance(settings[name], dict)}
        (self.node / "agorad.toml").write_text(tomli_w.dumps({"node": {**node, **settings}, **sections}))

    def sign(self, **rules: Any) -> None:
        """The manifest with other admission rules."""
        changed = attrs.evolve(self.manifest, admission=attrs.evolve(self.manifest.admission, **rules))
        self.write(changed)

    def write(self, manifest: Manifest, operator: Identity | None = None) -> None:
        run.save(
            attrs.evolve(manifest, content=b"", signature=None).signed(operator or self.operator),
            self.folder / "run.toml",
        )

    def look(self) -> list[Finding]:
        target = Target("node", self.node / "c.sock", self.node / "agorad.toml")
        return diagnose(examine(target), over_the_net=False)
