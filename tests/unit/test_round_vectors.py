"""Memory of a round's result: the last one's again, never one that somebody still looks at."""

from __future__ import annotations

import numpy

from p2p.averaging.memory import LARGE, Memory


def test_memory_comes_back_only_when_its_last_view_is_gone() -> None:
    memory = Memory()
    first = memory.fresh(LARGE + 4)
    first[:4] = b"mine"
    assert len(first) == LARGE + 4
    numbers = numpy.frombuffer(first, numpy.float32)
    del first
    second = memory.fresh(LARGE + 4)
    second[:4] = b"else"
    assert numbers[:1].tobytes() == b"mine"
    del second, numbers
    assert bytes(memory.fresh(LARGE + 8)[:4]) == b"else"
    assert bytes(memory.fresh(3 * LARGE)[:4]) == bytes(4)  # another size is other memory
    assert memory.fresh(LARGE - 1).obj is not memory.fresh(LARGE - 1).obj  # small ones are not kept
