"""What the kernel does not take at once leaves with the next bytes, in order and soon."""

from __future__ import annotations

import trio

from p2p.transport import REST, Wire
from tests.net.test_wire import MOST, WAIT_S, two_ends

SMALL = 10_000
FULL = 10_000
"""Small writes after which any socket's buffers are full: 100 MB."""


async def read_all(wire: Wire, size: int) -> bytes:
    came = bytearray()
    buffer = memoryview(bytearray(MOST))
    with trio.fail_after(WAIT_S):
        while len(came) < size:
            await wire.readable(MOST)
            came += buffer[: wire.read(buffer) or 0]
    return bytes(came)


def test_a_rest_waits_for_the_next_write_and_comes_before_it() -> None:
    async def main() -> None:
        async with two_ends() as (stream, reader):
            wire, sent = Wire(stream), bytearray()
            for number in range(FULL):
                data = bytes([number % 256]) * SMALL
                sent += data
                with trio.fail_after(WAIT_S):
                    await wire.write(memoryview(data))  # at once: nobody reads, and it fits into a rest
                if wire.rest:
                    break
            assert bytes(sent).endswith(wire.rest)
            sent += b"the end"
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def _write() -> None:
                    await wire.writable()
                    await wire.write(memoryview(b"the end"))
                    while wire.rest:
                        await wire.writable()
                        await wire.write(memoryview(b""))

                assert await read_all(reader, len(sent)) == bytes(sent)
            assert not wire.rest

    trio.run(main)


def test_batches_arrive_as_they_were_written_whatever_the_kernel_takes_of_them() -> None:
    async def main() -> None:
        async with two_ends() as (stream, reader):
            wire, batches = Wire(stream), [bytes([n]) * (MOST + n) for n in range(60)]
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def _write() -> None:
                    for batch in batches:
                        await wire.write(memoryview(batch))
                        assert len(wire.rest) <= REST
                    while wire.rest:
                        await wire.writable()
                        await wire.write(memoryview(b""))

                assert await read_all(reader, sum(map(len, batches))) == b"".join(batches)

    trio.run(main)
