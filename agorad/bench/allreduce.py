"""``bench allreduce``: averaging rounds of processes over loopback or over the lines of a lab.

Some of the members may die or be slow.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.ask import CommandFailed, NoAnswer
from agorad.bench.ends import End, end, said, tell
from agorad.bench.stolen import NOTABLE, Stolen
from agorad.lab.network import Line, Place, lab
from p2p.averaging.roster import MAX_FLOATS, MAX_MEMBERS
from p2p.averaging.shares import FLOAT_BYTES
from p2p.identity import Identity
from stage.codec import CODECS

MODULE: Final = "agorad.bench.allreduce_peer"
STAGE: Final = 0
ANSWER_S: Final = 120.0
ROUND_S: Final = 120.0
"""What members are given for a round: enough for the slowest that still makes sense."""
BASE_BYTES: Final = 60_000_000
COPIES: Final = 4
"""Vectors that a member holds at most: its own, what others sent, the result, and what the check makes."""


@attrs.frozen
class Kill:
    """A member that ends ``seconds`` after the roster's commit, at once and without a word."""

    member: int
    seconds: float


def parse_kill(text: str) -> Kill:
    """``2@0.5``; ValueError with a sentence."""
    member, _, seconds = text.partition("@")
    try:
        kill = Kill(int(member), float(seconds))
    except ValueError as error:
        raise ValueError(f"{text!r} is not MEMBER@SECONDS, such as 2@0.5") from error
    if not 0 <= kill.seconds <= ROUND_S:
        raise ValueError(
            f"{text!r}: seconds count from the commit of the roster, from 0 to {ROUND_S:g}; "
            "before it there is no round to disturb"
        )
    return kill


def check(peers: int, floats: int, kills: list[Kill], slow: list[int]) -> None:
    """ValueError with a sentence for what cannot be measured."""
    if not 2 <= peers <= MAX_MEMBERS:
        raise ValueError(
            f"a round has 2 to {MAX_MEMBERS} members, not {peers}: alone there is nobody to average with"
        )
    if not 0 <= floats <= MAX_FLOATS:
        raise ValueError(f"a vector has 0 to {MAX_FLOATS} floats, not {floats}")
    for member in [*(kill.member for kill in kills), *slow]:
        if not 0 <= member < peers:
            raise ValueError(f"there is no member {member}: the {peers} members are numbered from 0")
    if len({kill.member for kill in kills}) < len(kills):
        raise ValueError("a member can be killed once only")
    needed = peers * (BASE_BYTES + COPIES * floats * FLOAT_BYTES)
    if needed > (free := _free_bytes()):
        raise ValueError(
            f"{peers} members with {floats} floats each need about {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free here: ask for fewer of either"
        )


def run(
    peers: int,
    floats: int,
    dtype: str,
    repeat: int,
    kills: list[Kill],
    slow: list[int],
    link: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Measure; the result is what ``--json`` prints. NoAnswer, CommandFailed when a member hangs or ends.

    ``link``: Mbit/s of each member's line, each way, and milliseconds of a round trip between two of them;
    NoLab where that cannot be had.
    """
    authority = Identity.generate()
    with ExitStack() as stack:
        places: list[Place] = []
        if link is not None:
            line = Line(up_mbps=link[0], down_mbps=link[0], delay_ms=link[1] / 4)
            places = stack.enter_context(lab([line] * peers))
        ends: list[End] = []
        for index in range(peers):
            due = [kill.seconds for kill in kills if kill.member == index]
            spec = {
                "index": index,
                "address": places[index].addr if places else "127.0.0.1",
                "floats": floats,
                "dtype": dtype,
                "slow": index in slow,
                "kill_s": due[0] if due else None,
            }
            prefix = places[index].command() if places else []
            ends.append(stack.enter_context(end(MODULE, spec, authority, prefix, stage=STAGE)))
        for process in ends:
            said(process, ANSWER_S)
        mates: dict[str, str] = {}
        for process in ends:
            tell(process, {"seeds": list(mates.values())[:1]})
            facts = said(process, ANSWER_S)
            mates[facts["peer"]] = facts["addr"]
        for process in ends:
            tell(process, {"mates": mates})
        rounds, stolen = [], []
        # The first round does not count, unless somebody dies in it: connections are made then.
        for number in range(1 if kills else repeat + 1):
            with Stolen() as away:
                rounds.append(_round(ends, number, mortal={kill.member for kill in kills}))
            stolen.append(away.share)
        counted = rounds if kills else rounds[1:]
        last = counted[-1]
        for index, facts in last.items():
            if "failed" not in facts:
                tell(ends[index], {"check": True})
                facts |= said(ends[index], ANSWER_S)
    where = None if link is None else {"mbps": link[0], "rtt_ms": link[1]}
    summed = _summed(peers, floats, dtype, list(mates), counted)
    return summed | {"link": where, "stolen": stolen[-len(counted) :]}


def _round(ends: list[End], number: int, mortal: set[int]) -> dict[int, dict[str, Any]]:
    """One round of all; what each member said of it, without those that died."""
    for process in ends:
        tell(process, {"round": number, "seconds": ROUND_S})
    answers: dict[int, dict[str, Any]] = {}
    for index, process in enumerate(ends):
        try:
            answers[index] = said(process, ROUND_S + ANSWER_S)
        except CommandFailed:
            if index not in mortal:
                raise
    if not answers:
        raise NoAnswer("every member was killed: there is nobody left to ask")
    return answers


def _summed(
    peers: int, floats: int, dtype: str, names: list[str], rounds: list[dict[int, dict[str, Any]]]
) -> dict[str, Any]:
    last = rounds[-1]
    finished = {index: facts for index, facts in last.items() if "failed" not in facts}
    hashes = [facts["hash"] for facts in finished.values()]
    seconds = [
        max(facts["ended_at"] for facts in answers.values())
        - min(facts["committed_at"] for facts in answers.values())
        for answers in rounds
    ]
    drops = {tuple(drop) for facts in finished.values() for drop in facts["drops"]}
    return {
        "peers": peers,
        "floats": floats,
        "dtype": dtype,
        "seconds": seconds,
        "payload_mb_per_s": CODECS[dtype].size(floats * FLOAT_BYTES) / statistics.median(seconds) / 1e6,
        "max_error": max((facts["max_error"] for facts in finished.values()), default=None),
        "hashes": hashes,
        "fraction": min((facts["fraction"] for facts in finished.values()), default=0.0),
        "identical": len(set(hashes)) <= 1,
        "survivors": len(last),
        "drops": [{"peer": peer, "reason": reason} for peer, reason in sorted(drops)],
        "killed": [names[index] for index in range(peers) if index not in last],
        "failed": [
            {"peer": names[index], "reason": facts["failed"]}
            for index, facts in last.items()
            if "failed" in facts
        ],
        "bytes_out": [facts["bytes_out"] for facts in finished.values()],
        "rss_mb_most": max(facts["rss_mb"] for facts in last.values()),
    }


def lines(result: dict[str, Any]) -> str:
    """For people."""
    median = statistics.median(result["seconds"])
    alike = "the same bytes on all" if result["identical"] else "DIFFERENT BYTES"
    finished = len(result["hashes"])
    out = [
        f"{result['peers']} members, {result['floats']} floats: {median:.3f} s a round (median of "
        f"{len(result['seconds'])}), {result['payload_mb_per_s']:.1f} MB/s of payload a member",
        f"{finished} of {result['survivors']} survivors finished, {result['fraction'] * 100:.1f} % averaged, "
        f"{alike}",
    ]
    if result["link"] is not None and result["bytes_out"]:
        least = max(result["bytes_out"]) * 8 / result["link"]["mbps"] / 1e6
        out.append(f"what a member sent needs {least:.3f} s of its line: {least / median:.2f} of the round")
    if result["max_error"] is not None:
        out.append(f"largest distance to the exact weighted mean {result['max_error']:.1e}")
    taken = [share for share in result["stolen"] if share is not None and share > NOTABLE]
    if taken:
        out.append(
            f"this machine's own host took up to {max(taken) * 100:.0f} % of its processors away: "
            f"{len(taken)} of {len(result['stolen'])} rounds are slower than the machine"
        )
    out += [f"failed  {one['peer']}: {one['reason']}" for one in result["failed"]]
    out += [f"dropped {one['peer']}: {one['reason']}" for one in result["drops"]]
    return "\n".join(out)


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("a kernel that does not say MemAvailable")
