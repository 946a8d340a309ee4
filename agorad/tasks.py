"""Where a running daemon is: its tasks, as the tree that they are, and its threads, each with its stack.

For who looks into a node that does not do what it should (``agoractl debug stacks``, ``bugreport``). Only the
frames of this project are told, innermost last, and of a stack without any the innermost alone: what trio and
torch do inside is the same everywhere. Limits: ``MOST`` tasks, ``DEEP`` frames each.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import trio

MOST: Final = 2000
DEEP: Final = 8
_HOME: Final = Path(__file__).parent.parent
_OURS: Final = tuple(f"{_HOME / room}/" for room in ("agorad", "p2p", "stage"))

Frame = tuple[str, int, str]
"""File, line, function."""


def document() -> dict[str, Any]:
    """All of it; to be called in the daemon's trio thread."""
    root = trio.lowlevel.current_root_task()
    tasks = [] if root is None else [told for told, _ in zip(_tree(root, 0), range(MOST), strict=False)]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    here = threading.get_ident()
    threads = [
        {"name": names.get(number, str(number)), "frames": _told(_stack(frame))}
        for number, frame in sys._current_frames().items()
        if number != here
    ]
    return {"tasks": tasks, "threads": threads}


def _tree(task: trio.lowlevel.Task, depth: int) -> Iterator[dict[str, Any]]:
    """A task, then what it started."""
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in task.iter_await_frames()
    ]
    yield {"name": task.name, "depth": depth, "frames": _told(frames)}
    for nursery in task.child_nurseries:
        for child in sorted(nursery.child_tasks, key=lambda found: found.name):
            yield from _tree(child, depth + 1)


def _stack(frame: FrameType | None) -> Iterable[Frame]:
    found: list[Frame] = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return reversed(found)


def _told(frames: Iterable[Frame]) -> list[str]:
    """``p2p/host.py:210 _accept``, ours only."""
    found = list(frames)
    ours = [frame for frame in found if frame[0].startswith(_OURS)] or found[-1:]
    return [f"{_short(file)}:{line} {function}" for file, line, function in ours[-DEEP:]]


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_HOME)) if path.is_relative_to(_HOME) else path.name
