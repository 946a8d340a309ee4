"""What several unit tests share: the CUDA kernels compiled for the CPU, once a session."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests import emulation


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return emulation.load(emulation.build(tmp_path_factory.mktemp("emulated")))
