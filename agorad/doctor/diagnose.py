"""All findings of a node, worst first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from agorad import preflight
from agorad.doctor import address, daemon, files, identity, machine, network, sharing
from agorad.doctor.patient import Patient
from agorad.join.findings import Finding
from p2p.errors import LocalError

_ORDER: Final = {"fail": 0, "warn": 1, "ok": 2}


PARTS: Final = ("daemon", "files", "machine", "network")


def diagnose(
    patient: Patient,
    others: Sequence[Patient] = (),
    *,
    over_the_net: bool = True,
    measure: bool = True,
    only: str | None = None,
) -> list[Finding]:
    """What was found; without ``over_the_net`` nothing leaves the machine, ``only`` is one of ``PARTS``.

    ``others``: the machine's, which this one must not share a port or a key with.
    """
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "daemon": lambda: daemon.look(patient),
        "files": lambda: _on_disk(patient, others),
        "machine": lambda: machine.look(patient),
        "network": lambda: (
            *address.look(patient),
            *(network.look(patient, measure=measure) if over_the_net else ()),
        ),
    }
    found = [finding for part in PARTS if only in (None, part) for finding in looks[part]()]
    return sorted(found, key=lambda finding: _ORDER[finding.verdict])


def _on_disk(patient: Patient, others: Sequence[Patient]) -> list[Finding]:
    found = [*files.look(patient), *identity.look(patient), *sharing.look(patient, others)]
    if patient.settings is None or any(finding.verdict == "fail" for finding in found):
        return found
    try:
        preflight.check(patient.settings)
    except LocalError as error:  # what a start would stumble over, and nothing above has named
        start = Finding(
            name="start", verdict="fail", found=str(error),
            remedy="correct that; agorad --check-config says whether it is right",
        )  # fmt: skip
        return [*found, start]
    return found


def verdict(found: list[Finding]) -> str:
    """One line for people."""
    failed = sum(finding.verdict == "fail" for finding in found)
    warned = sum(finding.verdict == "warn" for finding in found)
    passed = len(found) - failed - warned
    return (
        f"{len(found)} checks: {passed} passed, {warned} warning{'s' * (warned != 1)}, {failed} "
        f"problem{'s' * (failed != 1)}"
    )
