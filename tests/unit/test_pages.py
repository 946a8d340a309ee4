"""Large pages: asked for in torch's own words, and what the operator said stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agorad.pages import use_large_pages

LENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_what_the_operator_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    use_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_torch_hears_it() -> None:
    """Asked before torch's first tensor, a large tensor lies on large pages."""
    if not LENT.is_file() or "[never]" in LENT.read_text():
        pytest.skip("this system lends no large pages")
    program = (
        "from agorad.pages import use_large_pages; use_large_pages(); import torch; "
        "weights = torch.ones(1 << 23); print(open('/proc/self/smaps_rollup').read())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    [line] = [line for line in said.stdout.splitlines() if line.startswith("AnonHugePages")]
    assert int(line.split()[1]) >= 16 << 10  # kB: half of the tensor; memory may be in pieces
