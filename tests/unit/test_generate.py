"""``agoractl generate`` against nodes that answer as told: which it asks, what it prints, how it ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from agorad import control, control_server, generating
from agorad.ask import CommandFailed, Unreachable
from agorad.cli import agoractl
from p2p.errors import LocalError

END = {"text": "!", "tokens": 3, "end": "document", "run": "r1", "step": 7}


class Node:
    """A control socket of a node with this role."""

    def __init__(self, path: Path, role: str, items: list[dict[str, Any]], trouble: str = "") -> None:
        self.path, self.asked = path, list[dict[str, Any]]()
        self._role, self._items, self._trouble = role, items, trouble

    async def status(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        return {"role": self._role}

    async def generate(self, request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self.asked.append(dict(request))
        generating.read(request)

        async def items() -> AsyncIterator[dict[str, Any]]:
            for item in self._items:
                yield item
            if self._trouble:
                raise LocalError(self._trouble)

        return items()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        commands: dict[str, control.Command] = {"status": self.status}
        if self._role == "trainer":
            commands["generate"] = self.generate
        await control_server.serve(control.listen(self.path), commands, task_status=task_status)


def says(folder: Path, nodes: list[Node], *words: str) -> Result:
    """What agoractl prints where these are the nodes of a demo."""
    listed = [
        {"name": node.path.stem, "control": str(node.path), "config": str(folder / "none.toml")}
        for node in nodes
    ]
    (folder / "swarm.json").write_text(json.dumps({"nodes": listed}))
    results: list[Result] = []

    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    await nursery.start(node.serve)
                arguments = ["generate", *words, "--dir", str(folder)]
                results.append(await trio.to_thread.run_sync(CliRunner().invoke, agoractl, arguments))
                nursery.cancel_scope.cancel()

    trio.run(main)
    return results[0]


def a_swarm(folder: Path, items: list[dict[str, Any]], trouble: str = "") -> list[Node]:
    return [
        Node(folder / "seed.sock", "seed", []),
        Node(folder / "trainer-0.sock", "trainer", items, trouble),
    ]


def test_the_trainer_is_asked_and_pieces_are_printed(tmp_path: Path) -> None:
    nodes = a_swarm(tmp_path, [{"text": "wor"}, {"text": "ld"}, END])
    how = ("--temperature", "0", "--top-k", "5", "--top-p", "0.5", "--seed", "9", "--max-tokens", "4")
    done = says(tmp_path, nodes, "hello ", *how)
    assert (done.exit_code, done.stdout) == (0, "hello world!\n")
    assert done.stderr.startswith("3 tokens, ")
    assert nodes[1].asked == [
        {"prompt": "hello ", "most": 4, "temperature": 0.0, "top_k": 5, "top_p": 0.5, "seed": 9}
    ]
    document = json.loads(says(tmp_path, nodes, "hello ", *how, "--json").stdout)
    assert document.pop("seconds") > 0
    assert document == {
        "prompt": "hello ", "text": "world!", "tokens": 3, "seed": 9, "end": "document", "run": "r1",
        "steps": [7],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("items", "trouble", "error", "says_why"),
    [
        ([{"text": "a"}], "stage 1 has no live replica", CommandFailed, "stage 1"),
        ([{"text": "a"}], "", LocalError, "trainer-0 ended before the text did"),
    ],
)
def test_a_text_that_breaks_off_is_no_success(
    tmp_path: Path, items: list[dict[str, Any]], trouble: str, error: type[Exception], says_why: str
) -> None:
    done = says(tmp_path, a_swarm(tmp_path, items, trouble), "x")
    assert done.stdout == "xa\n"
    assert isinstance(done.exception, error)
    assert says_why in str(done.exception)


def test_who_is_no_trainer_cannot_ask_the_run(tmp_path: Path) -> None:
    done = says(tmp_path, a_swarm(tmp_path, [])[:1], "x")
    assert isinstance(done.exception, LocalError)
    assert "is a trainer" in str(done.exception)
    down = [Node(tmp_path / "gone" / "trainer-0.sock", "trainer", [])]
    (tmp_path / "swarm.json").unlink()
    listed = {"name": "trainer-0", "control": str(down[0].path), "config": str(tmp_path / "none.toml")}
    (tmp_path / "swarm.json").write_text(json.dumps({"nodes": [listed]}))
    late = CliRunner().invoke(agoractl, ["generate", "x", "--dir", str(tmp_path)])
    assert isinstance(late.exception, Unreachable)


def test_a_prompt_has_a_limit_and_so_has_the_text(tmp_path: Path) -> None:
    nodes = a_swarm(tmp_path, [])
    done = says(tmp_path, nodes, "x" * control.REQUEST_LIMIT)
    assert isinstance(done.exception, LocalError)
    assert "64 KiB" in str(done.exception)
    assert nodes[1].asked == []
    many = says(tmp_path, nodes, "x", "--max-tokens", str(generating.MOST_TOKENS + 1))
    assert isinstance(many.exception, CommandFailed)
    assert str(generating.MOST_TOKENS) in str(many.exception)
