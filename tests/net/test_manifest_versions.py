"""Newer manifests over real sockets: members take up what the operator signed, and nothing else."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import manifests
from agorad import run as runs
from agorad.control import BadRequest
from agorad.exitcodes import ExitCode, verdict
from agorad.joining import obtain_certificate
from agorad.node import Node
from agorad.roles import authority
from agorad.run import Manifest, NodeRef
from p2p.identity import Identity
from tests.net.test_authority import Place, idle, living, until_event, within

WATCH_S = 0.3


def signed(place: Place, version: int, by: Identity | None = None, **changes: Any) -> Manifest:
    by = by or place.operator
    info = attrs.evolve(place.manifest.run, version=version, operator=by.peer_id)
    return attrs.evolve(place.manifest, run=info, content=b"", **changes).signed(by)


def lr(place: Place, rate: float) -> dict[str, Any]:
    return {"training": attrs.evolve(place.manifest.training, lr=rate)}


def look_often(node: Node) -> None:
    node.watch_s = WATCH_S
    node.trust.heard_other()  # ends the first pause


async def member(node: Node) -> None:
    look_often(node)
    await obtain_certificate(node)
    await idle(node)


async def publish(node: Node, manifest: Manifest) -> Any:
    assert manifest.signature is not None
    text, signature = manifest.content.decode(), manifest.signature.ed25519
    return await node.commands["publish"]({"content": text, "signature": signature, "by": "test"})


def run(main: Callable[[], Awaitable[None]]) -> None:
    within(main)


def test_a_published_version_is_taken_up_kept_and_refused_where_it_must_be(tmp_path: Path) -> None:
    place = Place(tmp_path)
    newer = signed(place, 2, **lr(place, 0.5))

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as desk:
            await until_event(desk, "ready")
            async with living(place.worker("w"), member) as worker:
                await until_event(worker, "certificate_granted")
                taken: list[float] = []
                worker.manifest_taken.append(lambda: taken.append(worker.manifest.training.lr))
                done = await publish(desk, newer)
                assert done == {"version": 2, "hash": newer.hash.hex(), "changed": ["training.lr"]}
                (event,) = await until_event(worker, "manifest_taken")
                assert (event["version"], event["changed"]) == (2, ["training.lr"])
                assert taken == [0.5]
                assert worker.trust.manifest_hash == newer.hash
                assert worker.status_document()["manifest"]["version"] == 2
                with pytest.raises(BadRequest, match="not newer"):
                    await publish(desk, newer)
                with pytest.raises(BadRequest, match=r"model\.ffn"):
                    await publish(desk, signed(place, 3, model=attrs.evolve(place.manifest.model, ffn=64)))
                with pytest.raises(BadRequest, match="another run"):
                    await publish(desk, signed(place, 3, by=Identity.generate()))
                other = (NodeRef(peer_id=Identity.generate().peer_id),)
                with pytest.raises(BadRequest, match="no longer lists this authority"):
                    await publish(desk, signed(place, 3, authorities=other))
                entries = await desk.commands["audit"]({})
                assert [entry["what"] for entry in entries] == ["manifest"]
            # Both start again from the file of version 1 and go on with what they kept.
            async with living(place.worker("w"), member) as worker:
                assert worker.manifest.hash == newer.hash
        async with living(place.authority_settings(), authority.run) as desk:
            await until_event(desk, "ready")
            assert desk.manifest.hash == newer.hash
            # A newcomer with the old file is let in, and learns of the newer one at once.
            async with living(place.worker("late"), member) as late:
                assert late.manifest.run.version == 1
                await until_event(late, "manifest_taken")
                await until_event(late, "certificate_granted")

    run(main)


def test_what_an_authority_makes_up_is_ignored_and_said_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    model = attrs.evolve(place.manifest.model, ffn=64)
    forgeries = [
        signed(place, 2, by=Identity.generate(), **lr(place, 0.5)),
        signed(place, 2, model=model),
        attrs.evolve(signed(place, 2), **lr(place, 9.0), content=b""),
    ]

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as desk:
            await until_event(desk, "ready")
            async with living(place.worker("w"), member) as worker:
                await until_event(worker, "certificate_granted")
                values: list[Any] = [_page_of(forged) for forged in forgeries]
                values += [{"version": 1 << 31, "x": "y"}]
                for count, value in enumerate(values, 1):
                    key = manifests.key(place.manifest.run.id, 0)
                    await desk.dht.store(key, desk.identity.peer_id, value, ttl=60.0, deadline=5.0)
                    await until_event(worker, "manifest_ignored", count)
                await trio.sleep(3 * WATCH_S)
                ignored = await until_event(worker, "manifest_ignored")
                assert len(ignored) == len(values)
                assert worker.manifest.hash == place.manifest.hash
                assert not worker.stopping.is_set()
                # None of that stands in the way of a good one.
                await publish(desk, signed(place, 2, **lr(place, 0.25)))
                await until_event(worker, "manifest_taken")

    run(main)


def _page_of(manifest: Manifest) -> dict[str, Any]:
    assert manifest.signature is not None
    signature = bytes.fromhex(manifest.signature.ed25519)
    head = {"version": manifest.run.version, "pages": 1, "hash": manifest.hash, "signature": signature}
    return {**head, "part": manifest.content}


def test_a_minimum_version_is_announced_before_it_is_enforced(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as desk:
            await until_event(desk, "ready")
            async with living(place.worker("w"), member) as worker:
                await until_event(worker, "certificate_granted")
                soon = attrs.evolve(
                    place.manifest.admission, min_version="99.0", min_version_from=worker.clock() + 3600
                )
                await publish(desk, signed(place, 2, admission=soon))
                (wanted,) = await until_event(worker, "update_wanted")
                assert "99.0" in wanted["why"]
                assert any("99.0" in line for line in worker.status_document()["warnings"])
                assert not worker.stopping.is_set()
                await publish(desk, signed(place, 3, admission=attrs.evolve(soon, min_version="")))
                await until_event(worker, "manifest_taken", 2)
                assert "version" not in worker.warnings
                now = attrs.evolve(soon, min_version_from=0.0)
                await publish(desk, signed(place, 4, admission=now))
            with pytest.raises(BaseExceptionGroup) as caught:
                async with living(place.worker("late", account="bob"), obtain):
                    await trio.sleep_forever()
            code, why = verdict(caught.value)
            assert (code, "version_too_old" in why) == (ExitCode.REQUIREMENTS, True)

    run(main)


async def obtain(node: Node) -> None:
    await obtain_certificate(node)


def test_who_is_listed_no_longer_ends_with_the_reason(tmp_path: Path) -> None:
    place = Place(tmp_path)
    seed = Identity.generate()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
    place.manifest = signed(place, 2, seeds=(NodeRef(peer_id=seed.peer_id, addrs=(here,)),))
    runs.save(place.manifest, tmp_path / "run.toml")
    (tmp_path / "seed").mkdir()
    seed.save(tmp_path / "seed" / "identity.key")

    settings = place.settings("seed", "seed")
    settings = attrs.evolve(settings, node=attrs.evolve(settings.node, listen=(here,)))

    async def end_of(desk: Node) -> BaseException:
        try:
            async with living(settings, listed) as node:
                await until_event(desk, "dht_joined")
                await publish(desk, signed(place, 3, seeds=()))
                await node.stopping.wait()
        except BaseExceptionGroup as group:
            return group
        raise AssertionError

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as desk:
            await until_event(desk, "ready")
            code, why = verdict(await end_of(desk))
            assert (code, "no longer lists" in why) == (ExitCode.REMOVED, True)

    run(main)


def test_who_waits_goes_on_by_the_newer_rules(tmp_path: Path) -> None:
    place = Place(tmp_path, max_nodes=1, queue_limit=1, max_nodes_per_account=4, max_rtt_ms=0.0)

    def rules(version: int, **changes: Any) -> Manifest:
        return signed(place, version, admission=attrs.evolve(place.manifest.admission, **changes))

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as desk:
            before = desk.host.limits.connections
            async with living(place.worker("a"), joined) as a, contextlib.AsyncExitStack() as others:
                await until_event(a, "certificate_granted")
                b = await others.enter_async_context(living(place.worker("b"), joined))
                await until_event(b, "join_queued")
                await publish(desk, rules(2, queue_limit=3))
                assert desk.host.limits.connections == before + 2
                c = await others.enter_async_context(living(place.worker("c"), joined))
                (queued, *_) = await until_event(c, "join_queued")
                assert queued["position"] == 2
                await publish(desk, rules(3, queue_limit=3, max_nodes=3))
                for node in (b, c):
                    await until_event(node, "certificate_granted")

    run(main)


async def joined(node: Node) -> None:
    await obtain_certificate(node)
    await idle(node)


async def listed(node: Node) -> None:
    look_often(node)
    await idle(node)
