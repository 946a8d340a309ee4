"""Processes that are the ends of a measurement: members of its own run, told what to do by lines of JSON.

An end reads its spec as the first line of its standard input, says facts as lines on its standard output,
and ends with its input. Its standard error is ours.
"""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from agorad.ask import CommandFailed, NoAnswer
from agorad.bench.member import RUN
from p2p.identity import Identity
from p2p.membership import issue

RUN_S: Final = 900.0
"""Life of the longest measurement, and how long an answer is waited for unless told otherwise."""

End = subprocess.Popen[str]
_ENDED: Final = "one end of the measurement ended early; its words are above"


@contextmanager
def end(
    module: str,
    spec: dict[str, Any],
    authority: Identity,
    prefix: list[str] | None = None,
    *,
    stage: int | None = None,
) -> Iterator[End]:
    """A process that runs ``module`` with a key and a certificate; killed when the block ends.

    ``prefix`` is a command to run it through, such as one that enters a network namespace; ``stage`` is
    that of the certificate.
    """
    key, now = Identity.generate(), time.time()
    certificate = issue(
        authority,
        run=RUN,
        account=RUN,
        peer_id=key.peer_id,
        stage=stage,
        issued=now,
        expires=now + RUN_S + 60,
    )
    spec = {
        **spec,
        "key": key.encode().hex(),
        "authority": authority.peer_id,
        "certificate": certificate.encode().hex(),
    }
    command = [*(prefix or []), sys.executable, "-m", module]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        tell(process, spec)
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: End, request: dict[str, Any]) -> None:
    """Send a line to an end; CommandFailed if it is no more."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError as error:
        raise CommandFailed("failed", _ENDED) from error


def said(process: End, deadline: float = RUN_S) -> dict[str, Any]:
    """The next line of an end, which says one at a time.

    CommandFailed if it ended, NoAnswer after ``deadline`` seconds.
    """
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], deadline)
    if not ready:
        raise NoAnswer(f"one end of the measurement said nothing for {deadline:g} s")
    line = process.stdout.readline()
    if not line:
        raise CommandFailed("failed", _ENDED)
    facts: dict[str, Any] = json.loads(line)
    return facts


def spread(values: list[float]) -> dict[str, float | None]:
    """p50, p95 and max; None each where there are no values."""
    if not values:
        return {"p50": None, "p95": None, "max": None}
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
        "max": ordered[-1],
    }
