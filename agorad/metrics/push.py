"""A node's figures sent to a Pushgateway, for who asks for it: ``metrics.push``. Off unless set.

What leaves the machine is the page, as ``/metrics`` shows it, and nothing else; docs/metrics.md lists it.
It is PUT every ``EVERY_S`` under the node's own peer id, so that the newest one replaces the one before,
and taken back when the node leaves. A gateway that does not answer costs nothing but a warning: the next
attempt comes later and later, up to ``MOST_S``, and what was not sent is not kept. Redirects are not
followed: the token is for one host.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from agorad.events import PushFailed
from p2p.errors import LocalError
from p2p.files import read_small

if TYPE_CHECKING:
    from agorad.node import Node

EVERY_S: Final = 30.0
MOST_S: Final = 900.0
TIMEOUT_S: Final = 10.0
FAREWELL_S: Final = 2.0
TOKEN_LIMIT: Final = 4096
TELL_EVERY: Final = 20
"""Failures between two events about them."""


class PushError(Exception):
    """A push did not arrive; says why in one sentence."""


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any) -> None:
        """Go nowhere else."""


def read_token(path: Path) -> str:
    """The token in a file. Raises LocalError, which says nothing of what is in it."""
    try:
        token = read_small(path, TOKEN_LIMIT + 2).decode().strip()
    except OSError as error:
        raise LocalError(f"cannot read metrics.push_token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isascii() or not token.isprintable() or len(token) > TOKEN_LIMIT:
        raise LocalError(f"metrics.push_token_file {path} does not hold one line of ASCII: a token")
    return token


def send(url: str, body: bytes | None, token: str | None, timeout_s: float = TIMEOUT_S) -> None:
    """PUT the page, or DELETE what was put. Raises PushError."""
    request = urllib.request.Request(url, data=body, method="DELETE" if body is None else "PUT")
    request.add_header("Content-Type", CONTENT_TYPE_LATEST)
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_Stay()).open(request, timeout=timeout_s) as answer:
            answer.read(1024)
    except urllib.error.HTTPError as error:
        error.close()
        raise PushError(f"the gateway answered {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PushError(f"the gateway could not be reached: {str(reason)[:200]}") from None


async def run(node: Node, token: str | None, refresh: Callable[[], None], every_s: float = EVERY_S) -> None:
    """Until cancelled."""
    place = f"{node.config.metrics.push.rstrip('/')}/metrics/job/agorad/instance/{node.identity.peer_id}"
    failures = 0
    try:
        while True:
            refresh()
            page = generate_latest(node.book.registry)
            try:
                await trio.to_thread.run_sync(send, place, page, token, abandon_on_cancel=True)
            except PushError as error:
                failures += 1
                node.warnings["metrics_push"] = f"figures are not sent to metrics.push: {error}"
                if failures % TELL_EVERY == 1:
                    node.emit(PushFailed(why=str(error), failures=failures))
            else:
                failures = 0
                node.warnings.pop("metrics_push", None)
            await trio.sleep(min(MOST_S, every_s * 2.0 ** min(failures, 16)) * node.rng.uniform(0.9, 1.1))
    finally:
        with trio.move_on_after(FAREWELL_S) as scope:
            scope.shield = True
            if not failures:
                await trio.to_thread.run_sync(_take_back, place, token, abandon_on_cancel=True)


def _take_back(place: str, token: str | None) -> None:
    try:
        send(place, None, token, FAREWELL_S)
    except PushError:
        return  # the gateway shows when it heard of this node last
