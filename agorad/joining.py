"""How a worker gets its certificate, and keeps having one.

``obtain_certificate`` gives a certificate that holds. One that an earlier life kept in the state folder is
used at once and renewed in the background; without one the node asks the run's authorities, in random order,
and stays on the stream of the first that talks: it is told what is checked and its place in the queue, and
reports how its download is doing. When an authority cannot be reached, or says to come again, it asks again
(jittered, from 0.2 s to 30 s); a no that asking again cannot change ends the daemon with the code that
``agorad.authority.refusals`` has for it.

``keep_certificate`` renews at half life, and at once at another authority when a newer manifest no longer
lists the one that signed. With the authorities away it goes on trying until the grace of the certificate
ends; then nobody believes the node any more and it ends with code 13. The account's secret or token leaves
this machine only while the node holds no certificate, once a request, and is kept nowhere here. A node that
stops gives its place back (``Leave``), within ``LEAVE_S``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import attrs
import trio

from agorad import __version__, facts
from agorad.addresses import observe
from agorad.authority.messages import (
    ADDRS_LIMIT,
    PROTOCOL,
    Checking,
    Granted,
    Join,
    Leave,
    Progress,
    Queued,
    Renew,
    read_answer,
)
from agorad.authority.refusals import meaning
from agorad.config import secret_of
from agorad.events import CertificateGranted, JoinChecking, JoinDelayed, JoinQueued, RenewalOverdue
from agorad.exitcodes import RETRYABLE, DaemonExit, ExitCode
from agorad.node import Node
from agorad.preflight import read_secret
from p2p.errors import LocalError, P2PError, PeerGone, Refused, RemoteError
from p2p.files import read_small, write_whole
from p2p.groups import plain
from p2p.identity import PeerId
from p2p.membership import CERTIFICATE_LIMIT, Certificate
from p2p.rpc import Call

ANSWER_S: Final = 90.0
"""Between two words of an authority that checks something."""
RENEWAL_S: Final = 45.0
LEAVE_S: Final = 1.0
FIRST_WAIT_S: Final = 0.2
MOST_WAIT_S: Final = 30.0
LONGEST_WAIT_S: Final = 300.0
"""However late the authority says to come again."""
LOOK_S: Final = 30.0
PROGRESS_S: Final = 5.0


class Download(Protocol):
    """Fetching the state while queued: ``stage.ahead`` is one. It runs in a task of its owner."""

    finished: bool
    eta_s: float | None

    def offered(self, stage: int, guest_pass: bytes | None) -> None:
        """The probable stage, and what lets a guest download its state."""


async def obtain_certificate(node: Node, download: Download | None = None) -> Certificate | None:
    """A valid certificate, presented by this node from now on and renewed in ``node.nursery``.

    None if the node was asked to stop while it waited for one.
    """
    certificate = _read(node)
    fresh = certificate is None
    if certificate is not None:
        node.nursery.start_soon(observe, node)
    else:
        secret = _secret(node)
        ending: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_stopping, node, nursery.cancel_scope)
            try:
                await observe(node)
                certificate = await _join_until_granted(node, secret, download)
            except (DaemonExit, LocalError) as error:
                ending = error  # raised below, as it is and not in a group
            nursery.cancel_scope.cancel()
        node.status.pop("queue", None)
        if ending is not None:
            if not isinstance(ending, DaemonExit) or ending.code not in RETRYABLE:
                _forget_secret(node)
            raise ending
    if certificate is not None:
        node.certificate = certificate
        node.farewells.append(lambda: _leave(node))
        node.nursery.start_soon(keep_certificate, node, certificate, fresh)
    return certificate


async def obtain_move(node: Node, stage: int) -> None:
    """A certificate for another stage, on disk for the next start; the one in force stays until then.

    Raises P2PError or trio.TooSlowError if no authority grants one now.
    """
    authorities = [ref.peer_id for ref in node.manifest.authorities]
    node.rng.shuffle(authorities)
    trouble: P2PError = PeerGone("the run lists no authority")
    for authority in authorities:
        try:
            granted = await _join(node, authority, await _request(node, None, stage), None)
            certificate = Certificate.decode(granted.certificate)
            node.trust.check(certificate, node.identity.peer_id, node.clock())
            if certificate.stage != stage:
                raise RemoteError(f"the authority gave stage {certificate.stage} instead of {stage}")
            write_whole(_path(node), certificate.encode())
        except P2PError as error:
            trouble = error
        except OSError as error:
            raise LocalError(f"cannot keep the certificate of stage {stage}: {error.strerror}") from error
        else:
            return
    raise trouble


async def keep_certificate(node: Node, certificate: Certificate, fresh: bool = True) -> None:
    """Renew at half life, for as long as the node runs; at once if it is one of an earlier life."""
    left_s = (certificate.issued + certificate.expires) / 2 - node.clock() if fresh else 0.0
    while True:
        # Spread, so that nodes that joined together do not renew together.
        await _until_due(node, certificate, left_s * node.rng.uniform(0.9, 1.1))
        try:
            certificate = await _renew_until_granted(node, certificate)
        except DaemonExit as end:
            node.end(end)
            return
        # From here on by our own clock alone: the authority's may be far off.
        left_s = max(1.0, (certificate.expires - certificate.issued) / 2)


async def pause(seconds: float, clock: Callable[[], float]) -> None:
    """Sleep until that much time passed on trio's clock or on ``clock``, whichever is first.

    A machine that was suspended has missed the time on trio's clock; its certificate has not.
    """
    until, steady = clock() + seconds, trio.current_time() + seconds
    while (left_s := min(until - clock(), steady - trio.current_time())) > 0:  # noqa: ASYNC110 (clocks tell nobody)
        await trio.sleep(min(left_s, LOOK_S))


async def _until_due(node: Node, certificate: Certificate, seconds: float) -> None:
    """Until this time has passed, or the certificate's authority is no longer one."""
    with trio.CancelScope() as scope:

        def look() -> None:
            if certificate.authority not in node.trust.authorities:
                scope.cancel()

        node.manifest_taken.append(look)
        look()
        try:
            await pause(seconds, node.clock)
        finally:
            node.manifest_taken.remove(look)


async def _cancel_when_stopping(node: Node, scope: trio.CancelScope) -> None:
    await node.stopping.wait()
    scope.cancel()


async def _join_until_granted(node: Node, secret: str | None, download: Download | None) -> Certificate:
    async def ask(authority: PeerId) -> Granted:
        join = await _request(node, secret, node.config.worker.stage)
        return await _join(node, authority, join, download)

    waits = _Waits(node)
    while True:
        found, trouble = await _from_any(node, ask)
        if found is not None:
            return found
        await waits.after(trouble)


async def _renew_until_granted(node: Node, certificate: Certificate) -> Certificate:
    waits = _Waits(node)
    last = max(certificate.expires, certificate.grace_until)
    while True:
        found, trouble = await _from_any(node, lambda authority: _renew(node, authority))
        if found is None and isinstance(trouble, Refused) and trouble.code == "unknown_peer":
            # We left before, were away for long, or the authority's memory is a new one: join.
            found, trouble = await _from_any(node, lambda authority: _join_again(node, authority, last))
        if found is not None:
            node.warnings.pop("renewal", None)
            return found
        now = node.clock()
        if now > last:
            raise DaemonExit(
                ExitCode.NETWORK,
                f"no authority renewed the certificate, and its grace ended {now - last:.0f} s ago "
                f"({trouble}); start again once the run's authorities can be reached",
            )
        if now > certificate.expires:
            if "renewal" not in node.warnings:
                node.emit(RenewalOverdue(why=str(trouble), grace_until=last))
            node.warnings["renewal"] = (
                f"no authority renews the certificate; members believe it for another {last - now:.0f} s"
            )
        await waits.after(trouble, at_most_s=max(0.1, last - now))


class _Waits:
    """Longer and longer between two rounds through the authorities; a newer manifest ends the wait."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._wait_s = FIRST_WAIT_S

    async def after(self, trouble: Exception, at_most_s: float = LONGEST_WAIT_S) -> None:
        retry_s = self._wait_s * self._node.rng.uniform(0.5, 1.5)
        why = str(trouble) or "no answer"
        if isinstance(trouble, Refused):
            why, retry_s = trouble.why, trouble.retry_after or retry_s
        retry_s = min(retry_s, LONGEST_WAIT_S, at_most_s)
        self._node.emit(JoinDelayed(why=why, retry_s=round(retry_s, 1)))
        with trio.CancelScope() as scope:
            self._node.manifest_taken.append(scope.cancel)  # it may list other authorities
            try:
                await pause(retry_s, self._node.clock)
            finally:
                self._node.manifest_taken.remove(scope.cancel)
        self._wait_s = min(MOST_WAIT_S, 2 * self._wait_s)


async def _from_any(
    node: Node, ask: Callable[[PeerId], Awaitable[Granted]]
) -> tuple[Certificate | None, Exception]:
    """A certificate of the first authority that grants one; else None and the last trouble.

    Raises DaemonExit for a refusal that is final.
    """
    authorities = [ref.peer_id for ref in node.manifest.authorities]
    if not authorities:
        raise LocalError(
            f"run {node.manifest.run.id!r} lists no authority that could let this node in; "
            "get the run's newest manifest from its operator"
        )
    node.rng.shuffle(authorities)
    trouble: Exception = PeerGone("no answer")
    for authority in authorities:
        try:
            granted = await ask(authority)
            certificate = Certificate.decode(granted.certificate)
            node.trust.check(certificate, node.identity.peer_id, node.clock())
        except Refused as refusal:
            # Some authority may not have heard of the newest manifest yet.
            behind = refusal.code == "manifest_mismatch" and node.trust.known
            trouble = refusal if behind else _judged(refusal)
        except trio.TooSlowError:
            trouble = PeerGone("an authority took too long to answer")
        except P2PError as error:
            trouble = error
        else:
            _keep(node, certificate, granted.why)
            return certificate, trouble
    return None, trouble


def _judged(refusal: Refused) -> Refused:
    """The refusal, if asking again may help; DaemonExit if not."""
    if meaning(refusal.code).retry:
        return refusal
    known = meaning(refusal.code)
    remedy = "" if refusal.why.endswith(known.remedy) else f"; {known.remedy}"
    said = f"the authority refused: {refusal.why}{remedy} ({refusal.code})"
    raise DaemonExit(known.exit, said) from refusal


async def _join(node: Node, authority: PeerId, join: Join, download: Download | None) -> Granted:
    with trio.fail_after(ANSWER_S):
        call = await node.host.call(authority, PROTOCOL, deadline=ANSWER_S)
    try:
        async with call, trio.open_nursery() as nursery:
            await call.send(join.to_header())
            granted = await _listen(node, call, nursery, download)
            nursery.cancel_scope.cancel()
        return granted
    except BaseExceptionGroup as group:
        raise plain(group) from None
    finally:
        if node.status.pop("queue", None) is not None and node.certificate is None:
            node.status["phase"] = "joining"


async def _listen(node: Node, call: Call, nursery: trio.Nursery, download: Download | None) -> Granted:
    """Follow the authority's words to the last."""
    patience_s, reporting = ANSWER_S, False
    while True:
        with trio.fail_after(patience_s):
            answer = read_answer((await call.receive()).header)
        if isinstance(answer, Granted):
            return answer
        if isinstance(answer, Checking):
            node.emit(JoinChecking(what=answer.what))
        elif isinstance(answer, Queued):
            # The connection's pings find a dead authority; a paused queue has no news.
            patience_s = math.inf
            _queued(node, answer)
            if download is not None:
                download.offered(answer.stage, answer.guest_pass)
                if not reporting:
                    reporting = True
                    nursery.start_soon(_report, call, download)
        else:
            raise RemoteError("the authority says goodbye to a join")


def _queued(node: Node, place: Queued) -> None:
    if node.certificate is None:
        node.status["phase"] = "queued"
    told = attrs.asdict(place)
    del told["guest_pass"]
    node.emit(JoinQueued(**told))
    del told["stage"]
    node.status["queue"] = told


async def _report(call: Call, download: Download) -> None:
    while True:
        finished = download.finished
        await call.send(Progress(finished=finished, eta_s=download.eta_s).to_header())
        if finished:
            return
        await trio.sleep(PROGRESS_S)


async def _renew(node: Node, authority: PeerId) -> Granted:
    request = Renew(session=node.session, addrs=_addrs(node), software=__version__)
    with trio.fail_after(RENEWAL_S):
        async with await node.host.call(authority, PROTOCOL, deadline=RENEWAL_S) as call:
            await call.send(request.to_header())
            answer = read_answer((await call.receive()).header)
    if not isinstance(answer, Granted):
        raise RemoteError("the authority's answer to a renewal is no certificate")
    return answer


async def _join_again(node: Node, authority: PeerId, until: float) -> Granted:
    """A join of a node that works already: its stage is fixed, and its certificate ends at ``until``."""
    stage = None if node.certificate is None else node.certificate.stage
    with trio.fail_after(max(0.0, until - node.clock())):
        return await _join(node, authority, await _request(node, _secret(node), stage), None)


async def _request(node: Node, secret: str | None, stage: int | None) -> Join:
    # Gathered anew each time: the clock is among the facts.
    known = await trio.to_thread.run_sync(facts.gather, node.config, node.clock())
    return Join(
        account=_account(node),
        secret=secret,
        stage=stage,
        addrs=_addrs(node),
        session=node.session,
        facts=attrs.evolve(known, clock=node.clock()),
    )


async def _leave(node: Node) -> None:
    """Give the place back: one authority is enough, and none is no trouble."""
    with trio.move_on_after(LEAVE_S):
        for ref in node.manifest.authorities:
            try:
                async with await node.host.call(ref.peer_id, PROTOCOL, deadline=LEAVE_S) as call:
                    await call.send(Leave(session=node.session).to_header())
                    await call.receive()
                return
            except P2PError:
                continue


def _keep(node: Node, certificate: Certificate, why: str) -> None:
    node.certificate = certificate
    _forget_secret(node)  # from now on the account is bound to this node's key
    node.emit(
        CertificateGranted(
            account=certificate.account,
            stage=certificate.stage,
            expires=certificate.expires,
            authority=certificate.authority,
            why=why,
        )
    )
    path = _path(node)
    try:
        write_whole(path, certificate.encode())
    except OSError as error:  # the node works without it; only the next start has to ask
        node.warnings["certificate"] = f"cannot keep the certificate in {path}: {error.strerror}"
    else:
        node.warnings.pop("certificate", None)


def _read(node: Node) -> Certificate | None:
    """The certificate of an earlier life if it still is what this node would ask for."""
    try:
        certificate = Certificate.decode(read_small(_path(node), CERTIFICATE_LIMIT + 1))
        node.trust.check(certificate, node.identity.peer_id, node.clock())
    except (OSError, RemoteError, Refused):
        return None
    wanted = node.config.worker.stage
    fits = certificate.stage is not None and certificate.stage < node.manifest.model.stages
    return certificate if fits and wanted in (None, certificate.stage) else None


def _account(node: Node) -> str:
    named = node.config.worker.account
    if node.manifest.admission.accounts == "huggingface":
        return named  # the hub knows whose the token is
    return named or node.config.name


def _addrs(node: Node) -> tuple[str, ...]:
    return tuple(str(addr) for addr in node.host.addrs[:ADDRS_LIMIT])


def _secret(node: Node) -> str | None:
    if node.secret is not None:
        return node.secret
    path = node.config.worker.secret_file
    if path is not None:
        return read_secret(path)
    handed = _handed_over(node)
    return read_secret(handed) if handed is not None and handed.exists() else None


def _handed_over(node: Node) -> Path | None:
    """A service's secret lies beside its control socket, in memory, until it is granted or refused."""
    return secret_of(node.config.node.state)


def _forget_secret(node: Node) -> None:
    node.secret = None
    if (handed := _handed_over(node)) is not None:
        with contextlib.suppress(OSError):
            handed.unlink(missing_ok=True)


def _path(node: Node) -> Path:
    return node.config.node.state / "certificate"
