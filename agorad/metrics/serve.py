"""A node's figures, alive: the book hears of events, the sampler reads, page and control command show.

A page that cannot be had is a warning: a node trains without being looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import trio
from prometheus_client import generate_latest

from agorad.metrics.address import read_address
from agorad.metrics.sampler import Sampler
from p2p.errors import LocalError

if TYPE_CHECKING:
    from agorad.metrics.page import Page
    from agorad.node import Node


async def run(node: Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Until cancelled. Started once the page is there, where the settings want one."""
    book = node.book
    for entry in node.bus.since():
        book.observe(entry)
    node.bus.subscribe(book.observe)
    sampler = Sampler(node, book)

    async def metrics(_request: Mapping[str, Any]) -> str:
        sampler.bring_up_to_date()
        return generate_latest(book.registry).decode()

    node.commands["metrics"] = metrics
    page = _open(node)
    with ExitStack() as stack:
        if page is not None:
            stack.callback(page.close)
            node.metrics_url = page.url
        async with trio.open_nursery() as nursery:
            if node.config.metrics.push:
                _start_push(node, sampler, nursery)
            task_status.started()
            await sampler.run()


def _start_push(node: Node, sampler: Sampler, nursery: trio.Nursery) -> None:
    from agorad.metrics import push  # not for who sends nothing

    path = node.config.metrics.push_token_file
    try:
        token = None if path is None else push.read_token(path)
    except LocalError as error:
        node.warnings["metrics_push"] = str(error)
        return
    nursery.start_soon(push.run, node, token, sampler.bring_up_to_date)


def _open(node: Node) -> Page | None:
    wanted = node.config.metrics.listen
    if not wanted:
        return None
    from agorad.metrics.page import Page  # an HTTP server is much to import for who has none

    try:
        return Page(node.book.registry, *read_address(wanted))
    except LocalError as error:
        node.warnings["metrics"] = str(error)
        return None
