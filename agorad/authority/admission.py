"""The rules of ``[admission]``, a function each: silent, or ``Refused`` with measurement, limit and remedy.

Pure: everything that a rule looks at is an argument, times are unix seconds. The order in which the
authority applies them is in ``desk``; what a refusal means to the refused, and what its user should do, is
the table in ``agorad.authority.refusals``. A limit of 0 is no rule.
"""

from __future__ import annotations

from typing import Final, Protocol

from agorad.authority.messages import Facts
from agorad.authority.refusals import meaning
from agorad.run import Admission
from p2p.errors import Refused
from p2p.hello import VERSION

UNMEASURED_S: Final = 10.0
_PARTS: Final = 3


class Findings(Protocol):
    """What a look at a joiner from outside found; ``agorad.probing`` makes them."""

    @property
    def reached(self) -> bool:
        """Whether one of the announced addresses led to this key."""

    @property
    def why(self) -> str:
        """What went wrong where it did not."""

    @property
    def rtt_ms(self) -> float | None:
        """Median over several peers of the run; None if not measured."""

    @property
    def mbps(self) -> float | None:
        """The slower of both ways; None if not measured."""

    @property
    def session(self) -> bytes | None:
        """Of the process that answered."""


def refusal(code: str, why: str, retry_after: float | None = None) -> Refused:
    """``Refused`` whose sentence ends with the remedy of its code."""
    return Refused(code, f"{why}; {meaning(code).remedy}", retry_after)


def check_software(rules: Admission, version: tuple[int, int] | None, software: str, now: float) -> str:
    """Protocols in common (None: hello saw to that), and new enough. Returns a warning about a version that
    is soon to be refused, or "".
    """
    low, high = version or VERSION
    if low > VERSION[1] or high < VERSION[0]:
        raise refusal(
            "protocol_mismatch",
            f"this node speaks protocol versions {low} to {high}, the run {VERSION[0]} to {VERSION[1]}",
        )
    if not rules.min_version or parts(software) >= parts(rules.min_version):
        return ""
    said = f"this node runs agorad {software or 'of no version'}"
    if now >= rules.min_version_from:
        raise refusal(
            "version_too_old", f"{said}; the run takes {rules.min_version} or newer (admission.min_version)"
        )
    return (
        f"{said}; in {(rules.min_version_from - now) / 3600:.1f} h the run takes only {rules.min_version}"
        " or newer (admission.min_version): update before that"
    )


def check_clock(rules: Admission, theirs: float, now: float) -> None:
    """``theirs`` is what the joiner's clock said when it asked."""
    off = theirs - now
    if rules.max_clock_skew_s and abs(off) > rules.max_clock_skew_s:
        way = "ahead of" if off > 0 else "behind"
        raise refusal(
            "clock_off",
            f"this machine's clock is {abs(off):.0f} s {way} the authority's; at most "
            f"{rules.max_clock_skew_s:g} s are allowed (admission.max_clock_skew_s)",
        )


def check_machine(rules: Admission, facts: Facts) -> None:
    """Memory and disk, as the machine says of itself; who lies fails later, alone."""
    checks = (
        ("vram_too_small", "of GPU memory", facts.vram_gib, rules.min_vram_gib, "min_vram_gib"),
        ("ram_too_small", "of memory", facts.ram_gib, rules.min_ram_gib, "min_ram_gib"),
        ("disk_too_small", "free on disk", facts.disk_gib, rules.min_disk_gib, "min_disk_gib"),
    )
    for code, what, found, least, setting in checks:
        if found < least:
            raise refusal(
                code,
                f"this machine has {found:.1f} GiB {what}; the run asks for {least:g} GiB "
                f"(admission.{setting})",
            )


def check_port(rules: Admission, findings: Findings, addrs: tuple[str, ...]) -> None:
    """Somebody else reached this key at an address that it announced."""
    if rules.port_test and not findings.reached:
        where = ", ".join(addrs) or "any address: it announced none"
        raise refusal(
            "port_closed",
            f"nobody could reach this node at {where} ({findings.why or 'no answer'}) (admission.port_test)",
        )


def check_network(rules: Admission, findings: Findings) -> None:
    """Time and bandwidth, measured by peers of the run.

    Who can be reached is measured before it is let in, or nobody who keeps silent would be; who cannot be
    reached (and need not be: ``port_test``) cannot be measured, which is no fault.
    """
    rtt, mbps = findings.rtt_ms, findings.mbps
    if findings.reached and ((rules.max_rtt_ms and rtt is None) or (rules.min_mbps and mbps is None)):
        raise refusal(
            "busy",
            f"this node can be reached but its line could not be measured ({findings.why or 'no answer'})",
            UNMEASURED_S,
        )
    if rules.max_rtt_ms and rtt is not None and rtt > rules.max_rtt_ms:
        raise refusal(
            "rtt_too_high",
            f"the way to the run's other nodes and back takes {rtt:.0f} ms; at most {rules.max_rtt_ms:g} ms "
            "are allowed (admission.max_rtt_ms)",
        )
    if rules.min_mbps and mbps is not None and mbps < rules.min_mbps:
        raise refusal(
            "bandwidth_too_low",
            f"peers of the run measured {mbps:.1f} Mbit/s; it asks for {rules.min_mbps:g} Mbit/s each way "
            "(admission.min_mbps)",
        )


def check_alone(found: bytes | None, session: bytes) -> None:
    """``found``: the session that answered with this key; ``session`` is the joiner's own process."""
    if found not in (None, session):
        raise refusal("already_running", "another process answers with this node's key at this moment")


def check_account_room(rules: Admission, account: str, nodes: int) -> None:
    """``nodes``: how many of the account's there are besides this one."""
    if nodes >= rules.max_nodes_per_account:
        raise refusal(
            "account_full",
            f"account {account!r} has {nodes} nodes, and {rules.max_nodes_per_account} are allowed "
            "(admission.max_nodes_per_account); one that was stopped counts until its certificate ends",
        )


def check_download(rules: Admission, waited_s: float, eta_s: float | None) -> None:
    """A queued joiner's download of the state: what it took so far, and what it says that it will take."""
    needs_s = waited_s + (eta_s or 0.0)
    if rules.max_download_s and needs_s > rules.max_download_s:
        raise refusal(
            "download_too_slow",
            f"downloading the state would take {needs_s:.0f} s in all; at most {rules.max_download_s:g} s "
            "are allowed (admission.max_download_s)",
        )


def parts(version: str) -> tuple[int, ...]:
    """A version as numbers, for comparing: "0.3" and "0.3.0.dev1" are (0, 3, 0); what is none is (-1,)."""
    numbers = []
    for part in version.split(".")[:_PARTS]:
        if not (part.isascii() and part.isdigit() and len(part) <= 6):
            break
        numbers.append(int(part))
    return tuple([*numbers, 0, 0][:_PARTS]) if numbers else (-1,)
