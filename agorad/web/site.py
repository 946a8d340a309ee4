"""Which address gives what, made once for each state of the run however many ask; and how often one may ask.

Pages and documents are rendered in a thread, one at a time, and kept until there are newer facts; charts,
which cost most, are drawn every ``DRAW_S`` at most. Everything has an ETag and may be cached for ``FRESH_S``.
The content policy allows this server's own style sheet and script and nothing else.

Limits: ``Meter`` for each reader, ``KEPT`` rendered things, ``LISTENERS`` streams of news and ``EACH`` a
reader, each of which ends after ``LISTEN_S`` (browsers come back by themselves).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import attrs
import tomli_w
import trio

from agorad.web import facts as say
from agorad.web import pages, parts, static
from agorad.web.facts import Facts
from agorad.web.limits import Meter
from agorad.web.server import OWN, Request, Response

if TYPE_CHECKING:
    from agorad.web.watch import Watch

FRESH_S: Final = 2
DRAW_S: Final = 6.0
KEPT: Final = 256
LISTENERS: Final = 128
EACH: Final = 8
LISTEN_S: Final = 1800.0
BEAT_S: Final = 15.0
SAID: Final = 5
"""Comings and goings told with one piece of news."""

POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SAFE: Final = (
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=()"),
)
HTML: Final = "text/html; charset=utf-8"
JSON: Final = "application/json"
ENDPOINTS: Final = (
    ("/api/v1/swarm", "The run now: step, loss, throughput, stages and their replicas, trainers."),
    ("/api/v1/history", "Curves, evaluations, rounds, joins and departures."),
    ("/api/v1/leaderboard", "Accounts by what they have earned."),
    ("/api/v1/join", "What a node needs, who waits, and how long a newcomer would."),
    ("/api/v1/nodes/PEER", "One node."),
    ("/api/v1/live", "Server-sent events: news, whenever the others have something new."),
    ("/run.toml", "The run's signed manifest."),
)
_HOST: Final = re.compile(r"[A-Za-z0-9.\-]{1,80}(:\d{1,5})?|\[[0-9a-fA-F:.]{2,45}\](:\d{1,5})?")
_PEER: Final = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,64}")


@attrs.frozen
class Made:
    """Something rendered."""

    kind: str
    body: bytes
    packed: bytes
    tag: str
    version: int
    control: str
    status: int = 200


class Site:
    """See the module's head."""

    def __init__(self, watch: Watch, clock: Callable[[], float] = trio.current_time) -> None:
        self._watch = watch
        self._clock = clock
        self._meter = Meter()
        self._kept: OrderedDict[str, Made] = OrderedDict()
        self._making = trio.Lock()
        self._drawn: tuple[float, pages.Drawn] | None = None
        self._listening: Counter[str] = Counter()

    async def answer(self, request: Request) -> Response:
        """For ``server.Server``."""
        if request.method not in ("GET", "HEAD"):
            return _plain(405, "only GET and HEAD are possible here", ("allow", "GET, HEAD"))
        if request.reader != OWN:
            wait = self._meter.spend(request.reader, self._clock())
            if wait:
                return _plain(429, "you ask very often; wait a moment", ("retry-after", f"{wait:.0f}"))
        if request.path == "/api/v1/live":
            return self._live(request)
        if request.path == "/node":
            peer = parse_qs(request.query, max_num_fields=4).get("peer", [""])[0].strip()[:100]
            where = f"/node/{peer}" if _PEER.fullmatch(peer) else "/node/"
            return _plain(303, where, ("location", where))
        if request.path.startswith("/static/"):
            return _with(request, self._static(request.path))
        self._watch.wanted()
        return _with(request, await self._made(request))

    async def _made(self, request: Request) -> Made:
        facts = self._watch.facts
        make, key = self._maker(request, facts)
        made = self._kept.get(key)
        if made is None or made.version != facts.version:
            async with self._making:
                facts = self._watch.facts
                made = self._kept.get(key)
                if made is None or made.version != facts.version:
                    made = await trio.to_thread.run_sync(make, facts)
                    self._kept[key] = made
                    while len(self._kept) > KEPT:
                        self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return made

    def _maker(self, request: Request, facts: Facts) -> tuple[Callable[[Facts], Made], str]:
        """What makes the answer, and what it is kept under."""
        path = request.path
        if path in _DOCUMENTS:
            return partial(_document, _DOCUMENTS[path]), path
        if path == "/":
            return self._swarm, path
        if path in _PAGES:
            return partial(_page, _PAGES[path]), path
        if path == "/join":
            host = request.headers.get("host", "")
            host = host if _HOST.fullmatch(host) else "localhost"
            return partial(_page, lambda facts: pages.join(facts, host)), f"/join {host}"
        if path == "/run.toml":
            return _manifest, path
        for start, make in (("/node/", _node_page), ("/api/v1/nodes/", _node_document)):
            peer = path.removeprefix(start)
            if path.startswith(start) and _PEER.fullmatch(peer) and facts.knows(peer):
                return partial(make, peer), path
        missing = _no_node if path.startswith("/node/") else _no_page
        return (_no_document, "no document") if path.startswith("/api/") else (missing, missing.__name__)

    def _swarm(self, facts: Facts) -> Made:
        if self._drawn is None or not 0 <= facts.at - self._drawn[0] < DRAW_S:
            self._drawn = facts.at, pages.draw(facts)
        drawn = self._drawn[1]
        return _page(lambda facts: pages.swarm(facts, drawn), facts)

    def _static(self, path: str) -> Made:
        name = next((name for name in static.NAMES if static.path(name) == path), None)
        if name is None:
            return _no_page(self._watch.facts)
        made = self._kept.get(path)
        if made is None:
            kind = static.TYPES["." + name.rpartition(".")[2]]
            control = "public, max-age=31536000, immutable"
            made = self._kept[path] = _rendered(static.content(name), kind, 0, control)
        return made

    # news

    def _live(self, request: Request) -> Response:
        if sum(self._listening.values()) >= LISTENERS or (
            request.reader != OWN and self._listening[request.reader] >= EACH
        ):
            return _plain(503, "as many listen as can; look again instead", ("retry-after", "30"))
        headers = (("content-type", "text/event-stream"), ("cache-control", "no-store"), *SAFE)
        return Response(headers=(*headers, ("x-accel-buffering", "no")), stream=self._news(request.reader))

    async def _news(self, reader: str) -> AsyncGenerator[bytes, None]:
        self._listening[reader] += 1
        until = trio.current_time() + LISTEN_S
        told = self._watch.facts.at
        try:
            yield b"retry: 5000\n\n"
            while trio.current_time() < until:
                self._watch.wanted()
                version = self._watch.facts.version
                with trio.move_on_after(BEAT_S):
                    await self._watch.news()
                facts = self._watch.facts
                if facts.version == version:
                    yield b": still here\n\n"
                    continue
                said = [parts.sentence(one) for one in facts.history.changes if one.at > told][-SAID:]
                told = facts.at
                data = json.dumps({"version": facts.version, "said": said})
                yield f"event: news\ndata: {data}\n\n".encode()
        finally:
            self._listening[reader] -= 1
            if not self._listening[reader]:
                del self._listening[reader]


_DOCUMENTS: Final[dict[str, Callable[[Facts], dict[str, Any]]]] = {
    "/api/v1/swarm": say.swarm,
    "/api/v1/history": say.past,
    "/api/v1/leaderboard": say.leaderboard,
    "/api/v1/join": say.joining,
}
_PAGES: Final[dict[str, Callable[[Facts], str]]] = {
    "/leaderboard": pages.leaderboard,
    "/api/v1/": lambda facts: pages.api(facts, ENDPOINTS),
}


def _rendered(body: bytes, kind: str, version: int, control: str = "", status: int = 200) -> Made:
    tag = f'W/"{hashlib.sha256(body).hexdigest()[:20]}"'
    fresh = control or f"public, max-age={FRESH_S}, stale-while-revalidate=10"
    return Made(kind, body, gzip.compress(body, 5, mtime=0), tag, version, fresh, status)


def _page(make: Callable[[Facts], str], facts: Facts, status: int = 200) -> Made:
    return _rendered(make(facts).encode(), HTML, facts.version, status=status)


def _document(make: Callable[[Facts], dict[str, Any]], facts: Facts, status: int = 200) -> Made:
    body = json.dumps(make(facts), ensure_ascii=False, allow_nan=False).encode()
    return _rendered(body, JSON, facts.version, status=status)


def _manifest(facts: Facts) -> Made:
    head = "# Run manifest of agorad: public, signed by the run's operator.\n"
    body = (head + tomli_w.dumps(facts.manifest.table())).encode()
    return _rendered(body, "application/toml; charset=utf-8", facts.version)


def _node_page(peer: str, facts: Facts) -> Made:
    return _page(lambda facts: pages.node(facts, peer), facts)


def _node_document(peer: str, facts: Facts) -> Made:
    return _document(lambda facts: say.node(facts, peer), facts)


def _no_page(facts: Facts) -> Made:
    return _page(lambda facts: pages.problem(facts, "No such page", "Nothing is here."), facts, 404)


def _no_node(facts: Facts) -> Made:
    said = "This run's authority knows no such node. It knows one once it waits in the queue or is in."
    return _page(lambda facts: pages.problem(facts, "No such node", said), facts, 404)


def _no_document(facts: Facts) -> Made:
    return _document(lambda _facts: {"error": "nothing is here; /api/v1/ lists what is"}, facts, 404)


def _with(request: Request, made: Made) -> Response:
    """The answer, as short as the reader's headers allow."""
    headers: tuple[tuple[str, str], ...] = (
        ("etag", made.tag),
        ("cache-control", made.control),
        ("vary", "accept-encoding"),
        *SAFE,
    )
    if made.status == 200 and _matches(request.headers.get("if-none-match", ""), made.tag):
        return Response(status=304, headers=headers)
    headers = (("content-type", made.kind), *headers)
    coding = request.headers.get("accept-encoding", "").lower()
    if len(made.packed) < len(made.body) and re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", coding):
        return Response(
            status=made.status, headers=(*headers, ("content-encoding", "gzip")), body=made.packed
        )
    return Response(status=made.status, headers=headers, body=made.body)


def _matches(wanted: str, tag: str) -> bool:
    bare = tag.removeprefix("W/")
    return wanted.strip() == "*" or any(part.strip().removeprefix("W/") == bare for part in wanted.split(","))


def _plain(status: int, said: str, *more: tuple[str, str]) -> Response:
    headers = (("content-type", "text/plain; charset=utf-8"), ("cache-control", "no-store"), *SAFE, *more)
    return Response(status=status, headers=headers, body=f"{said}\n".encode())
