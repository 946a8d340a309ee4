"""The rules of admission: each is silent at its limit and speaks beyond it, with figures and a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agorad.authority import admission
from agorad.authority.messages import (
    Bye,
    Checking,
    Facts,
    Granted,
    Join,
    Leave,
    Progress,
    Queued,
    Renew,
    read_answer,
    read_request,
)
from agorad.authority.refusals import REFUSALS, meaning
from agorad.exitcodes import ExitCode
from agorad.run import Admission
from p2p.errors import Refused, RemoteError
from p2p.hello import VERSION

NOW = 1_795_000_000.0
OURS = b"a" * 16
FACTS = Facts(vram_gib=24.0, ram_gib=32.0, disk_gib=100.0, software="0.3.0", version=VERSION, clock=NOW)
JOIN = Join(account="alice", secret="hush", addrs=("/ip4/10.0.0.1/tcp/49200",), session=OURS, facts=FACTS)


@attrs.frozen
class Found:
    reached: bool = True
    why: str = ""
    rtt_ms: float | None = 20.0
    mbps: float | None = 100.0
    session: bytes | None = OURS


def _rules(**settings: Any) -> Admission:
    return Admission(**settings)


CASES: list[tuple[str, Callable[[], object], Callable[[], object], str]] = [
    (
        "protocol_mismatch",
        lambda: admission.check_software(_rules(), VERSION, "0.1", NOW),
        lambda: admission.check_software(_rules(), (VERSION[1] + 1, VERSION[1] + 3), "0.1", NOW),
        f"versions {VERSION[1] + 1} to {VERSION[1] + 3}",
    ),
    (
        "version_too_old",
        lambda: admission.check_software(_rules(min_version="0.3.0"), VERSION, "0.3.0", NOW),
        lambda: admission.check_software(_rules(min_version="0.3.0"), VERSION, "0.2.9", NOW),
        "agorad 0.2.9; the run takes 0.3.0 or newer (admission.min_version)",
    ),
    (
        "clock_off",
        lambda: admission.check_clock(_rules(), NOW - 30, NOW),
        lambda: admission.check_clock(_rules(), NOW - 31, NOW),
        "31 s behind the authority's; at most 30 s are allowed (admission.max_clock_skew_s)",
    ),
    (
        "vram_too_small",
        lambda: admission.check_machine(_rules(min_vram_gib=24), FACTS),
        lambda: admission.check_machine(_rules(min_vram_gib=24.1), FACTS),
        "24.0 GiB of GPU memory; the run asks for 24.1 GiB (admission.min_vram_gib)",
    ),
    (
        "ram_too_small",
        lambda: admission.check_machine(_rules(min_ram_gib=32), FACTS),
        lambda: admission.check_machine(_rules(min_ram_gib=64), FACTS),
        "32.0 GiB of memory; the run asks for 64 GiB (admission.min_ram_gib)",
    ),
    (
        "disk_too_small",
        lambda: admission.check_machine(_rules(min_disk_gib=100), FACTS),
        lambda: admission.check_machine(_rules(min_disk_gib=101), FACTS),
        "100.0 GiB free on disk; the run asks for 101 GiB (admission.min_disk_gib)",
    ),
    (
        "port_closed",
        lambda: admission.check_port(_rules(port_test=False), Found(reached=False), JOIN.addrs),
        lambda: admission.check_port(_rules(), Found(reached=False, why="connection refused"), JOIN.addrs),
        "at /ip4/10.0.0.1/tcp/49200 (connection refused)",
    ),
    (
        "rtt_too_high",
        lambda: admission.check_network(_rules(), Found(rtt_ms=80.0)),
        lambda: admission.check_network(_rules(), Found(rtt_ms=131.4)),
        "131 ms; at most 80 ms are allowed (admission.max_rtt_ms)",
    ),
    (
        "bandwidth_too_low",
        lambda: admission.check_network(_rules(min_mbps=100), Found()),
        lambda: admission.check_network(_rules(min_mbps=100), Found(mbps=12.34)),
        "12.3 Mbit/s; it asks for 100 Mbit/s each way (admission.min_mbps)",
    ),
    (
        "already_running",
        lambda: admission.check_alone(None, OURS),
        lambda: admission.check_alone(b"b" * 16, OURS),
        "another process answers with this node's key",
    ),
    (
        "account_full",
        lambda: admission.check_account_room(_rules(), "alice", 1),
        lambda: admission.check_account_room(_rules(), "alice", 2),
        "account 'alice' has 2 nodes, and 2 are allowed (admission.max_nodes_per_account)",
    ),
    (
        "download_too_slow",
        lambda: admission.check_download(_rules(max_download_s=600), 100.0, 500.0),
        lambda: admission.check_download(_rules(max_download_s=600), 100.0, 501.0),
        "601 s in all; at most 600 s are allowed (admission.max_download_s)",
    ),
]


@pytest.mark.parametrize(("code", "fine", "bad", "says"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_speaks_beyond_its_limit_only(
    code: str, fine: Callable[[], object], bad: Callable[[], object], says: str
) -> None:
    fine()
    with pytest.raises(Refused) as no:
        bad()
    assert no.value.code == code
    assert says in no.value.why
    assert no.value.why.endswith(REFUSALS[code].remedy)


def test_without_rules_everything_passes() -> None:
    none = _rules(max_rtt_ms=0, max_clock_skew_s=0, port_test=False)
    poor = Facts(version=VERSION)
    assert admission.check_software(none, VERSION, "", NOW) == ""
    admission.check_clock(none, 0.0, NOW)
    admission.check_machine(none, poor)
    admission.check_port(none, Found(reached=False), ())
    admission.check_network(none, Found(rtt_ms=9e9, mbps=0.0))
    # Who cannot be reached cannot be measured; who can be and is not has to come again.
    admission.check_network(_rules(min_mbps=5), Found(reached=False, rtt_ms=None, mbps=None))
    for silent in (Found(rtt_ms=None), Found(mbps=None)):
        with pytest.raises(Refused, match="could not be measured") as no:
            admission.check_network(_rules(min_mbps=5), silent)
        assert no.value.code == "busy"
    admission.check_network(_rules(), Found(mbps=None))
    admission.check_download(none, 1e9, 1e9)


def test_a_version_is_announced_before_it_is_enforced() -> None:
    rules = _rules(min_version="0.10", min_version_from=NOW + 7200)
    warning = admission.check_software(rules, VERSION, "0.9.7", NOW)
    assert "in 2.0 h the run takes only 0.10" in warning
    assert admission.check_software(rules, VERSION, "0.10.0", NOW) == ""
    with pytest.raises(Refused) as no:
        admission.check_software(rules, VERSION, "0.9.7", NOW + 7200)
    assert no.value.code == "version_too_old"


@pytest.mark.parametrize(
    ("lower", "higher"), [("0.9", "0.10"), ("", "0.0.0"), ("x", "0"), ("1", "1.0.1"), ("0.3.dev1", "0.3.1")]
)
def test_versions_compare_as_numbers(lower: str, higher: str) -> None:
    assert admission.parts(lower) < admission.parts(higher)


def test_every_refusal_has_an_end_and_a_remedy() -> None:
    for code, entry in REFUSALS.items():
        assert entry.remedy, code
        assert entry.retry == (entry.exit == ExitCode.NETWORK), code
    assert REFUSALS["already_running"].exit == ExitCode.DUPLICATE
    assert REFUSALS["banned"].exit == ExitCode.REMOVED
    assert REFUSALS["port_closed"].exit == ExitCode.PORT
    assert meaning("what_is_this").exit == ExitCode.REFUSED


def test_messages_come_back_as_they_were() -> None:
    for request in (JOIN, Renew(session=OURS, addrs=JOIN.addrs, software="1"), Leave(session=OURS)):
        assert read_request(request.to_header()) == request
    for answer in (
        Checking(what="port"),
        Queued(position=3, eta_s=1.5, paused=False, waitlisted=True, stage=2),
        Granted(certificate=b"c", account="alice", why="since"),
        Bye(),
    ):
        assert read_answer(answer.to_header()) == answer
    for report in (Progress(finished=True), Progress(finished=False, eta_s=4.0)):
        assert Progress.from_header(report.to_header()) == report
    assert "hush" not in repr(JOIN)


BAD = (
    [("t", value) for value in ("granted", None, 1, b"join", ["join"])]
    + [("account", value) for value in (None, 5, "x" * 65, "a\nb", "a\x00")]
    + [("secret", value) for value in (5, b"x", "x" * 257, "a\r\nb: c")]
    + [("stage", value) for value in (-1, 1 << 16, 1.0, True, "1")]
    + [("addrs", value) for value in (None, "x", [1], ["nonsense"], ["/ip4/1.2.3.4/tcp/1"] * 9, ["/" * 300])]
    + [("session", value) for value in (None, b"", b"x" * 15, b"x" * 17, "x" * 16)]
    + [("facts", value) for value in (None, [], "x")]
)
BAD_FACTS = (
    [("vram_gib", value) for value in (None, "1", -1.0, math.nan, math.inf, True, 1e9)]
    + [("gpu", value) for value in (None, 1, "x" * 101, "a\x1b[0m")]
    + [("version", value) for value in (None, [1], [1, 2, 3], [1, "2"], [0, 1 << 16], "12")]
    + [("clock", value) for value in (None, math.nan, -5.0, "now")]
)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_join_with_a_field_out_of_bounds_is_none(name: str, value: object) -> None:
    with pytest.raises(RemoteError):
        read_request({**JOIN.to_header(), name: value})


@pytest.mark.parametrize(("name", "value"), BAD_FACTS)
def test_facts_out_of_bounds_are_none(name: str, value: object) -> None:
    header = JOIN.to_header()
    with pytest.raises(RemoteError):
        read_request({**header, "facts": {**header["facts"], name: value}})


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=16)
)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars, max_size=3)
names = st.sampled_from(
    ["t", "account", "secret", "stage", "addrs", "session", "facts", "position", "eta_s", "paused",
     "waitlisted", "certificate", "why", "what", "software"]
)  # fmt: skip


@given(
    st.sampled_from(["join", "renew", "leave", "checking", "queued", "granted", "bye"]),
    st.dictionaries(names, values, max_size=6),
)
def test_whatever_comes_is_read_or_refused(kind: str, header: dict[str, Any]) -> None:
    for read in (read_request, read_answer):
        try:
            read({"t": kind, **header})
        except RemoteError:
            pass
