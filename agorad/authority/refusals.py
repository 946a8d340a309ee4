"""Every no of an authority: how the worker that hears it goes on or ends, and what its user should do.

A table and nothing else, so that daemon, ``agoractl join`` and documents agree. ``retry`` means that the
worker asks again by itself; everything else ends the daemon with ``exit``. The sentence that the authority
sends (``Refused.why``) has the measured value, the limit and its setting; ``remedy`` is what to do about it.
"""

from __future__ import annotations

from typing import Final

import attrs

from agorad.exitcodes import ExitCode


@attrs.frozen
class Refusal:
    """What one code means to the node that is refused."""

    exit: ExitCode
    remedy: str
    retry: bool = False


def _final(exit: ExitCode, remedy: str) -> Refusal:
    return Refusal(exit, remedy)


def _again(remedy: str) -> Refusal:
    return Refusal(ExitCode.NETWORK, remedy, retry=True)


_REQUIREMENTS: Final = ExitCode.REQUIREMENTS
_REFUSED: Final = ExitCode.REFUSED

REFUSALS: Final[dict[str, Refusal]] = {
    # who
    "wrong_secret": _final(_REFUSED, "copy the secret again, or ask the run's operator for a new one"),
    "unknown_account": _final(_REFUSED, "ask the run's operator for an account"),
    "secret_needed": _final(_REFUSED, "give the account's secret, or a Hugging Face token, this once"),
    "bad_token": _final(_REFUSED, "make a new token at huggingface.co/settings/tokens and join again"),
    "identity_bound": _final(
        _REFUSED, "join with the account that this key belongs to, or give the node a new key"
    ),
    "account_full": _final(_REFUSED, "stop one of the account's other nodes for good, or use its key here"),
    "banned": _final(ExitCode.REMOVED, "write to the run's operator"),
    "revoked": _final(ExitCode.REMOVED, "write to the run's operator"),
    "already_running": _final(
        ExitCode.DUPLICATE, "stop the other node, or give this one a key of its own (--identity-path)"
    ),
    # what
    "wrong_stage": _final(_REFUSED, "leave the choice to the authority: remove worker.stage"),
    "vram_too_small": _final(_REQUIREMENTS, "use a GPU with more memory"),
    "ram_too_small": _final(_REQUIREMENTS, "use a machine with more memory"),
    "disk_too_small": _final(_REQUIREMENTS, "free some space, or move node.state to another disk"),
    "clock_off": _final(_REQUIREMENTS, "set the clock: timedatectl set-ntp true"),
    "version_too_old": _final(_REQUIREMENTS, "update agorad and start again"),
    "protocol_mismatch": _final(_REQUIREMENTS, "update agorad and start again"),
    "version_mismatch": _final(_REQUIREMENTS, "update agorad and start again"),
    "wrong_run": _final(_REFUSED, "get the manifest of the run that is meant"),
    "manifest_mismatch": _final(_REFUSED, "get the run's newest manifest from its operator"),
    # network
    "port_closed": _final(
        ExitCode.PORT, "open or forward the port, or announce the address that others reach (node.announce)"
    ),
    "bandwidth_too_low": _final(_REQUIREMENTS, "stop other downloads, or use a faster line"),
    "rtt_too_high": _final(_REQUIREMENTS, "use a wired line, or a machine nearer to the run's others"),
    "download_too_slow": _final(_REQUIREMENTS, "stop other downloads, or use a faster line"),
    # later
    "queue_timeout": _final(_REFUSED, "join again later"),
    "queue_full": _again("join again later"),
    "full": _again("wait for a place; nodes come and go"),
    "joins_paused": _again("wait until the operator opens the run again"),
    "busy": _again("wait a moment"),
    "no_move": _again("wait; nodes change their stage one at a time, where the run allows it"),
    "unavailable": _again("wait a moment; if it lasts, tell the run's operator"),
    "hub_unavailable": _again("wait a moment; the Hugging Face hub does not answer the authority"),
    "unknown_peer": _again("join again; the authority does not remember this node"),
}


def meaning(code: str) -> Refusal:
    """What a code means. One that this version does not know is final if nothing says otherwise."""
    return REFUSALS.get(code, Refusal(_REFUSED, "ask the run's operator"))
