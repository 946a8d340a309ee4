"""``bench net``: what one stream between two processes carries, and what a small call waits beside it."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any, Final

from agorad.bench.ends import end, said, spread
from agorad.lab.network import Line, lab
from p2p.identity import Identity

MODULE: Final = "agorad.bench.net_peer"


def parse_link(text: str | None) -> tuple[float, float] | None:
    """``200/80`` as Mbit/s and milliseconds of round trip; ValueError with a sentence."""
    if text is None:
        return None
    try:
        mbps, rtt_ms = (float(word) for word in text.split("/"))
    except ValueError as error:
        raise ValueError(f"{text!r} is not MBPS/RTT_MS, such as 200/80") from error
    if not (0.1 <= mbps <= 10_000 and 0 <= rtt_ms <= 10_000):
        raise ValueError(f"{text!r}: speed from 0.1 to 10000 Mbit/s, round trip up to 10000 ms")
    return mbps, rtt_ms


def run(size: int, repeat: int, link: tuple[float, float] | None) -> dict[str, Any]:
    """Measure; the result is what ``--json`` prints. NoLab where a link is asked for and cannot be."""
    authority = Identity.generate()
    with ExitStack() as stack:
        near: list[str] = []
        far: list[str] = []
        address = "127.0.0.1"
        if link is not None:
            line = Line(up_mbps=link[0], delay_ms=link[1] / 4)
            here, there = stack.enter_context(lab([line, line]))
            near, far, address = here.command(), there.command(), there.addr
        listener = stack.enter_context(end(MODULE, {"end": "listen", "address": address}, authority, far))
        where = said(listener)
        spec = {
            "end": "send",
            "address": address,
            **where,
            "bytes": size,
            "repeat": repeat,
            # Over a line one is enough: its first seconds are those of a new connection, as in our first run.
            "bare_runs": repeat if link is None else 1,
        }
        sender = stack.enter_context(end(MODULE, spec, authority, near))
        measured = said(sender)
    seconds = measured["seconds"]
    framing = measured["framing_seconds"]
    return {
        "bytes": size,
        "seconds": seconds,
        "mb_per_s": size / statistics.median(seconds) / 1e6,
        "framing_mb_per_s": size / statistics.median(framing) / 1e6 if framing else None,
        "aead_mb_per_s": measured["aead_mb_per_s"],
        "link": None if link is None else {"mbps": link[0], "rtt_ms": link[1]},
        "call_ms": {"idle": measured["idle_ms"], **spread(measured["call_ms"])},
    }


def lines(result: dict[str, Any]) -> str:
    """For people."""
    calls, link = result["call_ms"], result["link"]
    out = [f"one stream    {result['mb_per_s']:8.1f} MB/s  ({result['mb_per_s'] * 8:.0f} Mbit/s)"]
    if result["framing_mb_per_s"] is not None:
        ours = result["mb_per_s"] if link is None else result["bytes"] / result["seconds"][0] / 1e6
        ratio, run = ours / result["framing_mb_per_s"], "" if link is None else "; both on new connections"
        out.append(f"bare loop     {result['framing_mb_per_s']:8.1f} MB/s  (we reach {ratio:.2f} of it{run})")
    if link is not None:
        share = result["mb_per_s"] * 8 / link["mbps"]
        out.append(
            f"line          {link['mbps'] / 8:8.1f} MB/s  (we reach {share:.2f} of it), {link['rtt_ms']:g} ms"
        )
    out.append(f"cipher alone  {result['aead_mb_per_s']:8.1f} MB/s")
    out.append(
        f"1 KB call     {calls['idle']:8.1f} ms idle; beside the bulk {calls['p50']:.1f} (p50), "
        f"{calls['p95']:.1f} (p95), {calls['max']:.1f} (max)"
    )
    return "\n".join(out)
