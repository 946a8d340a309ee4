"""How a worker gets its certificate, and keeps having one.

``obtain_certificate`` asks the run's authorities, in random order, until one grants; it waits and asks
again (jittered, from 0.2 s to 30 s) as long as the trouble may pass, and ends the daemon with code 11
when the answer is a no that asking again cannot change. ``keep_certificate`` renews at half life. The
certificate is kept in the state folder, so that a restart does not need an authority; the account's
secret goes out only while there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from agorad.authority.issue import PROTOCOL, JoinRequest
from agorad.events import CertificateGranted, JoinDelayed
from agorad.exitcodes import DaemonExit, ExitCode
from agorad.node import Node
from agorad.preflight import read_secret
from p2p.errors import LocalError, P2PError, Refused, RemoteError
from p2p.identity import PeerId
from p2p.membership import CERTIFICATE_LIMIT, Certificate

ANSWER_S: Final = 10.0
FIRST_WAIT_S: Final = 0.2
MOST_WAIT_S: Final = 30.0
LONGEST_WAIT_S: Final = 300.0
"""However late the authority says to come again."""
LOOK_S: Final = 30.0
FINAL: Final = frozenset(
    {
        "unknown_account",
        "wrong_secret",
        "secret_needed",
        "banned",
        "identity_bound",
        "account_full",
        "wrong_stage",
    }
)
"""Refusals that asking again does not change."""


async def obtain_certificate(node: Node) -> Certificate | None:
    """A valid certificate, presented by this node from now on and renewed in ``node.nursery``.

    None if the node was asked to stop while it waited for one.
    """
    kept = _read(node)
    if kept is None:
        secret = _secret(node)
        refusal: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_stopping, node, nursery.cancel_scope)
            try:
                kept = await _ask_until_granted(node, secret)
            except (DaemonExit, LocalError) as error:
                refusal = error  # raised below, as it is and not in a group
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal
    if kept is not None:
        node.certificate = kept
        node.nursery.start_soon(keep_certificate, node, kept)
    return kept


async def keep_certificate(node: Node, certificate: Certificate) -> None:
    """Renew at half life, for as long as the node runs."""
    left_s = (certificate.issued + certificate.expires) / 2 - node.clock()
    while True:
        # Spread, so that nodes that joined together do not renew together.
        await pause(left_s * node.rng.uniform(0.9, 1.1), node.clock)
        certificate = await _ask_until_granted(node, None)
        # From here on by our own clock alone: the authority's may be far off.
        left_s = max(1.0, (certificate.expires - certificate.issued) / 2)


async def pause(seconds: float, clock: Callable[[], float]) -> None:
    """Sleep until that much time passed on trio's clock or on ``clock``, whichever is first.

    A machine that was suspended has missed the time on trio's clock; its certificate has not.
    """
    until, steady = clock() + seconds, trio.current_time() + seconds
    while (left_s := min(until - clock(), steady - trio.current_time())) > 0:  # noqa: ASYNC110 (clocks tell nobody)
        await trio.sleep(min(left_s, LOOK_S))


async def _cancel_when_stopping(node: Node, scope: trio.CancelScope) -> None:
    await node.stopping.wait()
    scope.cancel()


async def _ask_until_granted(node: Node, secret: str | None) -> Certificate:
    wait_s = FIRST_WAIT_S
    authorities = [ref.peer_id for ref in node.manifest.authorities]
    if not authorities:
        raise LocalError(f"run {node.manifest.run.id!r} lists no authority that could let this node in")
    while True:
        node.rng.shuffle(authorities)
        why, retry_s = "", wait_s * node.rng.uniform(0.5, 1.5)
        for authority in authorities:
            try:
                certificate = await _ask(node, authority, secret)
            except Refused as refusal:
                if refusal.code in FINAL:
                    raise DaemonExit(
                        ExitCode.REMOVED if refusal.code == "banned" else ExitCode.REFUSED,
                        f"the authority refused: {refusal.why} ({refusal.code})",
                    ) from refusal
                why, retry_s = refusal.why, min(LONGEST_WAIT_S, refusal.retry_after or retry_s)
            except (P2PError, trio.TooSlowError) as error:
                why = str(error) or "no answer"
            else:
                _keep(node, certificate)
                return certificate
        node.emit(JoinDelayed(why=why, retry_s=round(retry_s, 1)))
        await trio.sleep(retry_s)
        wait_s = min(MOST_WAIT_S, 2 * wait_s)


async def _ask(node: Node, authority: PeerId, secret: str | None) -> Certificate:
    settings = node.config.worker
    request = JoinRequest(account=settings.account or node.config.name, secret=secret, stage=settings.stage)
    with trio.fail_after(ANSWER_S):
        async with await node.host.call(authority, PROTOCOL, deadline=ANSWER_S) as call:
            await call.send(request.to_header())
            answer = (await call.receive()).header
    data = answer.get("certificate")
    if answer.get("t") != "granted" or not isinstance(data, bytes):
        raise RemoteError("the authority's answer is not a certificate")
    certificate = Certificate.decode(data)
    node.manifest.trust().check(certificate, node.identity.peer_id, node.clock())
    return certificate


def _keep(node: Node, certificate: Certificate) -> None:
    node.certificate = certificate
    node.emit(
        CertificateGranted(
            account=certificate.account,
            stage=certificate.stage,
            expires=certificate.expires,
            authority=certificate.authority,
        )
    )
    path = _path(node)
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(certificate.encode())
        fresh.replace(path)
    except OSError as error:  # the node works without it; only the next start has to ask
        node.warnings["certificate"] = f"cannot keep the certificate in {path}: {error.strerror}"
    else:
        node.warnings.pop("certificate", None)


def _read(node: Node) -> Certificate | None:
    """The certificate of an earlier life if it still is what this node would ask for."""
    try:
        with _path(node).open("rb") as file:
            certificate = Certificate.decode(file.read(CERTIFICATE_LIMIT + 1))
        node.manifest.trust().check(certificate, node.identity.peer_id, node.clock())
    except (OSError, RemoteError, Refused):
        return None
    wanted = node.config.worker.stage
    fits = certificate.stage is not None and certificate.stage < node.manifest.model.stages
    return certificate if fits and wanted in (None, certificate.stage) else None


def _secret(node: Node) -> str | None:
    path = node.config.worker.secret_file
    return None if path is None else read_secret(path)


def _path(node: Node) -> Path:
    return node.config.node.state / "certificate"
