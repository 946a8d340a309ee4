"""Whole nodes look at each other: an authority's inspections, presence, and rosters from the hash table."""

from __future__ import annotations

import time
from pathlib import Path

import attrs
import pytest
import trio

from agorad import probing
from p2p import selfreport
from p2p.errors import Refused
from p2p.identity import Identity, PeerId
from p2p.records import StageRecord
from tests.net.probers import listening, within
from tests.net.whole_nodes import Place, living


def test_an_authority_inspects_from_several_places(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with (
            living(place.settings("authority", "authority")) as office,
            living(place.settings("seed", "seed")),
            living(place.settings("w", "worker")) as worker,
        ):
            await office.dht.joined.wait()  # it began before the seed, and does not dial it again at once
            peer, addrs = worker.identity.peer_id, [str(addr) for addr in worker.host.addrs]
            # A guest's stream stays open on the connection that it has, as a join's does.
            kept = await worker.host.connect(office.identity.peer_id, deadline=5)
            found = await probing.inspect(office, peer, addrs)
            assert found.reached
            assert found.session == worker.session
            assert found.places == 2  # the trainer is not there, which is its own affair
            assert found.rtt_ms is not None
            assert found.mbps is None
            measured = await probing.inspect(office, peer, addrs, bytes=1_000_000, enough_mbps=1.0)
            assert measured.mbps is not None
            assert measured.mbps > 10
            assert worker.host.connections[office.identity.peer_id] is kept
            assert kept.usable

            async with living(place.settings("trainer", "trainer")):
                for _ in range(100):
                    if (await probing.inspect(office, peer, addrs)).places == 3:
                        break
                    await trio.sleep(0.1)  # nor the trainer, which it has just missed
                else:
                    raise AssertionError("the trainer never looked")
            best = await probing.inspect(office, peer, addrs, bytes=4_000_000)
            assert best.mbps is not None

            async def again_and_again() -> None:
                for _ in range(4):
                    await probing.inspect(office, peer, addrs, bytes=4_000_000)

            with pytest.raises(Refused) as refusal:
                await again_and_again()
            assert refusal.value.code == "busy"
            assert refusal.value.retry_after is not None

            closed = await probing.inspect(office, peer, ["/ip4/127.0.0.1/tcp/1"])
            assert not closed.reached
            assert "/ip4/127.0.0.1/tcp/1" in closed.why
            assert await probing.session_of(office, peer, addrs) == worker.session
            assert await probing.session_of(office, peer, ["/ip4/127.0.0.1/tcp/1"]) is None
            with pytest.raises(Refused):
                async with await worker.host.call(
                    office.identity.peer_id, selfreport.PROTOCOL, deadline=5
                ) as call:
                    await selfreport.who(call)

    within(main)


def test_one_inspection_of_a_peer_at_a_time(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.settings("authority", "authority")) as office:
            with listening() as (_server, addr):
                peer = Identity.generate().peer_id
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(probing.inspect, office, peer, [addr])
                    await trio.sleep(0.1)
                    with pytest.raises(Refused) as refusal:
                        await probing.inspect(office, peer, [addr])
                    assert refusal.value.code == "busy"
                    nursery.cancel_scope.cancel()
            closed = await probing.inspect(office, peer, [addr])  # it is free again after a cancelled one
            assert not closed.reached

    within(main)


def test_presence_is_what_answers(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with (
            living(place.settings("authority", "authority")) as office,
            living(place.settings("w", "worker")) as worker,
        ):
            ghost = Identity.generate().peer_id
            here = [str(addr) for addr in worker.host.addrs]
            seen: list[tuple[PeerId, float]] = []
            thrice = trio.Event()

            async def rosters() -> dict[PeerId, list[str]]:
                return {
                    worker.identity.peer_id: here,
                    ghost: [str(worker.host.addrs[0].bare())],
                    office.identity.peer_id: [str(addr) for addr in office.host.addrs],
                }

            async def on_seen(peer: PeerId, now: float) -> None:
                seen.append((peer, now))
                if len(seen) == 3:
                    thrice.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: probing.watch_presence(office, rosters, on_seen, every_s=0.1))
                await thrice.wait()
                nursery.cancel_scope.cancel()
            assert {peer for peer, _now in seen} == {worker.identity.peer_id}
            assert abs(seen[-1][1] - time.time()) < 10

    within(main)


def test_rosters_are_read_from_the_hash_table(tmp_path: Path) -> None:
    from p2p.membership import issue
    from p2p.records import stage_key

    place = Place(tmp_path)

    async def main() -> None:
        async with (
            living(place.settings("authority", "authority")) as office,
            living(place.settings("w", "worker")) as worker,
        ):
            now = time.time()
            office_key = Identity.load_or_create(place.folder / "authority" / "identity.key")
            worker.certificate = issue(
                office_key,
                run="t-1",
                account="a",
                peer_id=worker.identity.peer_id,
                stage=1,
                issued=now,
                expires=now + 60,
            )
            here = tuple(str(addr) for addr in worker.host.addrs)
            record = StageRecord(
                addrs=here,
                phase="active",
                step=0,
                slots=1,
                rate=0.0,
                certificate=worker.certificate.encode(),
            )
            read = probing.stage_rosters(office)
            for phase, expected in (("active", {worker.identity.peer_id: list(here)}), ("leaving", {})):
                value = attrs.evolve(record, phase=phase).to_value()
                key, subkey = stage_key("t-1", 1), worker.identity.peer_id
                while await read() != expected:
                    await worker.dht.store(key, subkey, value, ttl=15, deadline=5)
                    await trio.sleep(0.1)

    within(main)
