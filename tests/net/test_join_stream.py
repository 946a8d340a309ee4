"""Joins as streams: places and pauses are pushed, outlive both sides' restarts, and end in the right word."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import run
from agorad.authority.desk import Outside
from agorad.authority.messages import PROTOCOL, Facts, Granted, Join, Queued, read_answer
from agorad.authority.store import Store
from agorad.exitcodes import DaemonExit, ExitCode
from agorad.joining import obtain_certificate
from agorad.living import run_node
from agorad.node import Node
from agorad.roles import authority
from p2p.errors import Refused
from p2p.identity import PeerId
from p2p.membership import issue
from tests.net.test_authority import Place, idle, living, until_event, within
from tests.sentences import complete


def crowd(folder: Path, **admission: Any) -> Place:
    return Place(folder, **{"max_nodes_per_account": 99, **admission})


def operator(place: Place, name: str, value: str) -> None:
    """What the operator's command does: the authority looks at its database."""
    store = Store(place.folder / "authority" / "authority.sqlite")
    store.set_setting(name, value, "operator", 0.0)
    store.close()


def places(node: Node) -> list[tuple[int, bool, bool]]:
    found = [entry for entry in node.bus.since() if entry["event"] == "join_queued"]
    return [(entry["position"], entry["paused"], entry["waitlisted"]) for entry in found]


@asynccontextmanager
async def serving(place: Place) -> AsyncIterator[Node]:
    async with living(place.authority_settings(), authority.run) as office:
        await until_event(office, "ready")
        yield office


async def until_queued(node: Node, *place: Any) -> None:
    while not places(node) or places(node)[-1] != place:  # noqa: ASYNC110
        await trio.sleep(0.02)


async def ends(settings: Any, code: str, exit: ExitCode, **changes: Any) -> str:
    """The sentence that a worker ends with."""
    async with living(settings, idle) as node:
        for name, value in changes.items():
            setattr(node, name, value)
        with pytest.raises(DaemonExit, match=rf"\({code}\)") as end:
            await obtain_certificate(node)
    assert end.value.code == exit
    complete(end.value.why)
    return end.value.why


@pytest.mark.catalogue(26)
def test_a_pause_is_told_and_its_end_too(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with (
            serving(place),
            living(place.worker("w"), idle) as node,
            trio.open_nursery() as nursery,
        ):
            operator(place, "joins_paused", "1")
            nursery.start_soon(obtain_certificate, node)
            await until_queued(node, 1, True, False)
            status = node.status_document()
            assert status["phase"] == "queued"
            assert status["queue"] == {"position": 1, "eta_s": None, "paused": True, "waitlisted": False}
            operator(place, "joins_paused", "")
            await until_event(node, "certificate_granted")
            assert node.status_document()["queue"] is None
            assert node.bus.counts["join_delayed"] == 0

    within(main)


@pytest.mark.catalogue(22, 23)
def test_a_full_run_has_a_waitlist(tmp_path: Path) -> None:
    place = crowd(tmp_path, max_nodes=1)

    async def main() -> None:
        async with (
            serving(place),
            living(place.worker("b"), idle) as second,
            living(place.worker("c"), idle) as third,
            trio.open_nursery() as nursery,
        ):
            async with living(place.worker("a"), idle) as first:
                assert await obtain_certificate(first) is not None
                nursery.start_soon(obtain_certificate, second)
                await until_queued(second, 1, False, True)
                nursery.start_soon(obtain_certificate, third)
                await until_queued(third, 2, False, True)
            # The first one left, and said so.
            await until_event(second, "certificate_granted")
            await until_queued(third, 1, False, True)
            operator(place, "max_nodes", "2")
            await until_event(third, "certificate_granted")

    within(main)


def test_a_pace_is_kept_in_order(tmp_path: Path) -> None:
    place = crowd(tmp_path, joins_per_minute=150)
    order: list[str] = []

    async def main() -> None:
        async with serving(place):

            async def join(name: str) -> None:
                async with living(place.worker(name), idle) as node:
                    assert await obtain_certificate(node) is not None
                    order.append(name)

            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                for index in range(4):
                    nursery.start_soon(join, f"w{index}")
                    await trio.sleep(0.08)
            assert order == ["w0", "w1", "w2", "w3"]
            assert trio.current_time() - began >= 1.2

    within(main)


@pytest.mark.catalogue(18)
def test_places_outlive_restarts_of_both_sides(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with living(place.worker("a"), idle) as first, trio.open_nursery() as nursery:
            async with serving(place):
                operator(place, "joins_paused", "yes")
                async with living(place.worker("b"), idle) as second, trio.open_nursery() as inner:
                    inner.start_soon(obtain_certificate, second)
                    await until_queued(second, 1, True, False)
                    nursery.start_soon(obtain_certificate, first)
                    await until_queued(first, 2, True, False)
                    second.stop("back in a moment")
                async with living(place.worker("b"), idle) as second, trio.open_nursery() as inner:
                    inner.start_soon(obtain_certificate, second)
                    await until_queued(second, 1, True, False)
                    second.stop("and once more")
            # The authority is a new process now; the first worker comes back by itself, before the second.
            seen = len(places(first))
            async with serving(place):
                while len(places(first)) == seen:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                assert places(first)[-1] == (2, True, False)
                async with living(place.worker("b"), idle) as second, trio.open_nursery() as inner:
                    inner.start_soon(obtain_certificate, second)
                    await until_queued(second, 1, True, False)
                    operator(place, "joins_paused", "")
                    await until_event(second, "certificate_granted")
                await until_event(first, "certificate_granted")

    within(main)


@pytest.mark.catalogue(24)
def test_waiting_ends_with_a_word(tmp_path: Path) -> None:
    place = crowd(tmp_path, queue_timeout_s=0.3)

    async def main() -> None:
        async with serving(place):
            operator(place, "joins_paused", "1")
            why = await ends(place.worker("w"), "queue_timeout", ExitCode.REFUSED)
            assert "admission.queue_timeout_s" in why

    within(main)


@attrs.define
class Slow:
    finished: bool = False
    eta_s: float | None = 900.0
    stage: int | None = None

    def offered(self, stage: int, guest_pass: bytes | None) -> None:
        assert guest_pass is not None
        self.stage = stage


@pytest.mark.catalogue(19)
def test_a_slow_download_is_told_so(tmp_path: Path) -> None:
    place = crowd(tmp_path, max_download_s=600)

    async def main() -> None:
        async with (
            serving(place),
            living(place.worker("w", stage=2), idle) as node,
        ):
            operator(place, "joins_paused", "1")
            slow = Slow()
            with pytest.raises(DaemonExit, match=r"would take 90\d s in all; at most 600 s") as end:
                await obtain_certificate(node, slow)
            assert end.value.code == ExitCode.REQUIREMENTS
            assert slow.stage == 2

    within(main)


@pytest.mark.catalogue(15, 25)
def test_what_a_run_asks_for_ends_with_code_10(tmp_path: Path) -> None:
    async def main() -> None:
        for index, (code, admission, says) in enumerate(
            (
                ("ram_too_small", {"min_ram_gib": 1e5}, "the run asks for 100000 GiB"),
                ("disk_too_small", {"min_disk_gib": 1e6}, "the run asks for 1e+06 GiB"),
                ("vram_too_small", {"min_vram_gib": 24.0}, "0.0 GiB of GPU memory"),
                ("version_too_old", {"min_version": "99.1"}, "takes 99.1 or newer"),
            )
        ):
            (folder := tmp_path / str(index)).mkdir()
            place = crowd(folder, **admission)
            async with serving(place):
                assert says in await ends(place.worker("w"), code, ExitCode.REQUIREMENTS)

    within(main)


def test_a_wrong_clock_is_measured(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with serving(place):
            why = await ends(
                place.worker("w"), "clock_off", ExitCode.REQUIREMENTS, clock=lambda: time.time() - 100
            )
            assert "100 s behind" in why

    within(main)


def test_another_manifest_does_not_join(tmp_path: Path) -> None:
    place = crowd(tmp_path)
    changed = attrs.evolve(place.manifest.admission, max_rtt_ms=1.0)
    altered = attrs.evolve(place.manifest, admission=changed, content=b"", signature=None)
    run.save(altered.signed(place.operator), tmp_path / "altered.toml")

    async def main() -> None:
        settings = place.worker("w")
        other = attrs.evolve(settings, node=attrs.evolve(settings.node, run=tmp_path / "altered.toml"))
        async with serving(place):
            assert "newest" in await ends(other, "manifest_mismatch", ExitCode.REFUSED)

    within(main)


def test_a_removed_node_and_a_removed_account_end_with_code_17(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with serving(place):
            store = Store(tmp_path / "authority" / "authority.sqlite")
            store.ban("account", "alice", "sold spam", None, "operator", time.time())
            assert "sold spam" in await ends(place.worker("w"), "banned", ExitCode.REMOVED)
            store.close()

    within(main)


@attrs.frozen
class Found:
    reached: bool = True
    why: str = ""
    rtt_ms: float | None = 1.0
    mbps: float | None = None
    session: bytes | None = None


def test_looking_from_outside(tmp_path: Path) -> None:
    """Port, line and a second process with the same key, as the looker finds them."""
    place = crowd(tmp_path)
    found = Found()
    asked: list[tuple[PeerId, Sequence[str], float]] = []

    class Looker(Outside):
        async def inspect(self, peer: PeerId, addrs: Sequence[str], enough_mbps: float) -> Found:
            asked.append((peer, addrs, enough_mbps))
            return found

        async def session_of(self, peer: PeerId, addrs: Sequence[str]) -> bytes | None:
            return found.session

    async def role(node: Node) -> None:
        await authority.run(node, Looker(node))

    async def main() -> None:
        nonlocal found
        async with living(place.authority_settings(), role):
            found = Found(reached=False, why="connection refused")
            why = await ends(place.worker("w"), "port_closed", ExitCode.PORT)
            assert "connection refused" in why
            assert "node.announce" in why
            found = Found(rtt_ms=200.0)
            assert "200 ms" in await ends(place.worker("w"), "rtt_too_high", ExitCode.REQUIREMENTS)
            found = Found(session=b"?" * 16)
            assert "another process" in await ends(place.worker("w"), "already_running", ExitCode.DUPLICATE)
            found = Found()
            async with living(place.worker("w"), idle) as node:
                assert await obtain_certificate(node) is not None
                whats = [entry["what"] for entry in node.bus.since() if entry["event"] == "join_checking"]
                assert whats == ["port", "network"]
                assert asked[-1][0] == node.identity.peer_id
                assert list(asked[-1][1]) == [str(addr) for addr in node.host.addrs]
                first = node.session
            # The kept certificate is used at once; the renewal finds the other process still answering.
            store = Store(tmp_path / "authority" / "authority.sqlite")
            grant = store.grant_of(node.identity.peer_id)
            assert grant is not None
            assert grant.session == first
            later = attrs.evolve(grant, expires=time.time() + 600)
            store.grant(later, max_nodes=9, max_per_account=9, now=time.time())
            store.close()
            found = Found(session=first)
            with pytest.raises(BaseException) as end:  # noqa: PT012
                async with living(place.worker("w"), idle) as node:
                    assert await obtain_certificate(node) is not None
                    await node.stopping.wait()
            assert any(
                isinstance(leaf, DaemonExit) and leaf.code == ExitCode.DUPLICATE
                for leaf in _leaves(end.value)
            )

    within(main)


@pytest.mark.catalogue(28)
def test_at_the_end_of_grace_a_worker_leaves_with_code_13(tmp_path: Path) -> None:
    place = crowd(tmp_path)
    settings = place.worker("w")

    async def role(node: Node) -> None:
        now = node.clock()
        kept = issue(
            place.authority,
            run="t-1",
            account="alice",
            peer_id=node.identity.peer_id,
            stage=1,
            issued=now - 60,
            expires=now + 0.5,
            grace_until=now + 1.2,
        )
        (settings.node.state / "certificate").write_bytes(kept.encode())
        assert await obtain_certificate(node) == kept
        await until_event(node, "renewal_overdue")
        assert "renewal" in node.warnings
        await node.stopping.wait()
        assert node.clock() > now + 1.2

    async def main() -> None:
        with pytest.raises(BaseException) as end:
            await run_node(settings, role, started_at=time.time())
        exits = [leaf for leaf in _leaves(end.value) if isinstance(leaf, DaemonExit)]
        assert [(leaf.code, "grace ended" in leaf.why) for leaf in exits] == [(ExitCode.NETWORK, True)]

    within(main)


def test_an_authority_that_forgot_everything_is_joined_again(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with living(place.worker("w", stage=2), idle) as node:
            async with serving(place):
                assert await obtain_certificate(node) is not None
            for path in (tmp_path / "authority").glob("authority.sqlite*"):
                path.unlink()
        async with (
            living(place.worker("w"), idle) as node,
            serving(place),
        ):
            kept = await obtain_certificate(node)
            assert kept is not None
            await until_event(node, "certificate_granted")
            assert node.certificate is not None
            assert node.certificate.issued > kept.issued
            assert node.certificate.stage == 2

    within(main)


def test_members_in_their_grace_renew_before_newcomers_take_their_slots(tmp_path: Path) -> None:
    place = crowd(tmp_path, max_nodes=1)

    async def main() -> None:
        async with (
            serving(place),
            living(place.worker("w"), idle) as node,
        ):
            assert await obtain_certificate(node) is not None
            peer = node.identity.peer_id
        store = Store(tmp_path / "authority" / "authority.sqlite")
        grant = store.grant_of(peer)
        assert grant is not None
        now = time.time()
        ran_out = attrs.evolve(grant, issued=now - 700, expires=now - 100)
        store.grant(ran_out, max_nodes=9, max_per_account=9, now=now)
        store.close()
        async with (
            serving(place),
            living(place.worker("new"), idle) as new,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(obtain_certificate, new)
            await until_queued(new, 1, False, True)
            async with living(place.worker("w"), idle) as node:  # with its kept certificate
                assert await obtain_certificate(node) is not None
                await until_event(node, "certificate_granted")
            await until_event(new, "certificate_granted")

    within(main)


def test_one_stream_a_peer(tmp_path: Path) -> None:
    place = crowd(tmp_path, port_test=False, max_rtt_ms=0.0)

    async def main() -> None:
        async with (
            serving(place),
            living(place.worker("w"), idle) as node,
        ):
            operator(place, "joins_paused", "1")
            join = Join(
                account="alice", secret=place.secret, session=node.session, facts=Facts(clock=time.time())
            )
            there = place.authority.peer_id
            async with await node.host.call(there, PROTOCOL, deadline=5) as call:
                await call.send(join.to_header())
                assert isinstance(read_answer((await call.receive()).header), Queued)
                async with await node.host.call(there, PROTOCOL, deadline=5) as second:
                    await second.send(join.to_header())
                    with pytest.raises(Refused) as no:
                        await second.receive()
                    assert no.value.code == "busy"
                operator(place, "joins_paused", "")
                assert isinstance(read_answer((await call.receive()).header), Granted)

    within(main)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
