"""``agoractl bench``: measurements on this machine that drive the program's own code."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from agorad.ask import CommandFailed
from agorad.pages import use_large_pages

_SIZES: Final = ("demo", "100m", "1b", "8b")


@click.group()
def bench() -> None:
    """Measure what this machine does: kernels, net, dht, allreduce."""


@bench.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to measure.")
@click.option("--size", "names", multiple=True, type=click.Choice(_SIZES), help="Shapes of this preset; all.")
@click.option("--kernel", "wanted", multiple=True, help="Only this kernel; all.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; torch's own number.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Compare with torch.compile at 8b.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def kernels(
    device: str,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    threads: int | None,
    compiled: bool,
    as_json: bool,
) -> None:
    """Each kernel beside a copy of the same bytes, torch eager and torch.compile, in one run.

    Takes a few minutes and, at 8b, 6 GB of memory.

    Example: agoractl bench kernels --size 8b --no-compile
    """
    use_large_pages()
    import torch

    from agorad.bench import kernels as benchmark

    unknown = [name for name in wanted if name not in benchmark.KERNELS]
    if unknown:
        raise click.BadParameter(f"no kernel {unknown[0]!r}; there are {', '.join(benchmark.KERNELS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandFailed(
            "no device",
            "no CUDA device can be used here: torch finds none; measure with --device cpu, or install a "
            "driver and a torch built with CUDA",
        )
    if threads:
        torch.set_num_threads(threads)

    def say(line: str) -> None:
        click.echo(f"measuring {line}", err=True)

    result = benchmark.run(
        torch.device(device), names or _SIZES, wanted or benchmark.KERNELS, compiled=compiled, say=say
    )
    click.echo(json.dumps(result) if as_json else _table(result))


@bench.command()
@click.option(
    "--bytes", "size", type=click.IntRange(1 << 20, 1 << 33), default=256_000_000, help="Of one run."
)
@click.option("--repeat", type=click.IntRange(1, 100), default=5, help="Runs; the median counts.")
@click.option("--link", metavar="MBPS/RTT_MS", help="Over a line of this speed and delay; needs root.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def net(size: int, repeat: int, link: str | None, as_json: bool) -> None:
    """Bulk between two processes, encrypted and multiplexed, and small calls beside it.

    Beside it in the same run: a bare loop that only cuts, encrypts and sends, and the cipher alone. Over a
    line the first run has the ramp of a new TCP connection in it, and so has the bare loop's one run.
    Example: agoractl bench net --bytes 100000000 --link 200/80 --repeat 1
    """
    from agorad.bench import net as benchmark
    from agorad.lab.network import NoLab

    try:
        result = benchmark.run(size, repeat, benchmark.parse_link(link))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    except NoLab as error:
        raise CommandFailed("no lab", str(error)) from error
    click.echo(json.dumps(result) if as_json else benchmark.lines(result))


@bench.command()
@click.option("--peers", type=click.IntRange(2, 256), default=32, help="Processes; 32.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def dht(peers: int, as_json: bool) -> None:
    """A hash table of real processes: joining, storing and reading, one thing at a time.

    Takes about a minute and 3 GB of memory with 64 peers.
    Example: agoractl bench dht --peers 64
    """
    from agorad.bench import dht as benchmark

    result = benchmark.run(peers)
    click.echo(json.dumps(result) if as_json else benchmark.lines(result))


@bench.command()
@click.option("--peers", type=int, default=4, help="Members, each a process; 4.")
@click.option("--floats", type=int, default=10_000_000, help="In each vector.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "int8"]), default="fp32", help="Of parts on the wire."
)
@click.option("--repeat", type=click.IntRange(1, 100), default=3, help="Rounds; the median counts.")
@click.option(
    "--kill", "kills", multiple=True, metavar="MEMBER@SECONDS", help="Ends it then, from the commit."
)
@click.option("--slow", type=int, multiple=True, metavar="MEMBER", help="Its link carries 20 Mbit/s.")
@click.option("--link", metavar="MBPS/RTT_MS", help="Each over a line of its own, each way; needs root.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def allreduce(
    peers: int,
    floats: int,
    dtype: str,
    repeat: int,
    kills: tuple[str, ...],
    slow: tuple[int, ...],
    link: str | None,
    as_json: bool,
) -> None:
    """Averaging rounds of processes over loopback or lines, encrypted, as members of a run.

    With --kill there is one round, and what counts is what the survivors hold. Exits with 1 if a survivor did
    not finish, or not with the same bytes.
    Example: agoractl bench allreduce --peers 5 --floats 10000000 --kill 2@0.3
    """
    from agorad.bench import allreduce as benchmark
    from agorad.bench.net import parse_link
    from agorad.lab.network import NoLab

    try:
        deaths = [benchmark.parse_kill(text) for text in kills]
        benchmark.check(peers, floats, deaths, list(slow))
        result = benchmark.run(peers, floats, dtype, repeat, deaths, list(slow), parse_link(link))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    except NoLab as error:
        raise CommandFailed("no lab", str(error)) from error
    click.echo(json.dumps(result) if as_json else benchmark.lines(result))
    if result["failed"] or not result["identical"]:
        raise SystemExit(1)


def _table(result: dict[str, Any]) -> str:
    head = (
        f"{'kernel':<20}{'size':<6}{'dtype':<7}{'MB':>9}{'ms':>10}{'GB/s':>8}"
        f"{'of copy':>9}{'eager':>8}{'compile':>9}"
    )
    lines = [
        f"{result['device']}, {result['threads']} threads, copy {result['copy_gb_per_s']:.1f} GB/s "
        "(MB = 10^6 bytes; a ratio over 1: ours is faster)",
        head,
    ]
    for row in result["rows"]:
        compiled = "-" if row["vs_compile"] is None else f"{row['vs_compile']:.2f}"
        lines.append(
            f"{row['kernel']:<20}{row['size']:<6}{row['dtype']:<7}{row['bytes'] / 1e6:>9.1f}"
            f"{row['seconds'] * 1e3:>10.3f}{row['gb_per_s']:>8.1f}{row['of_copy']:>9.2f}"
            f"{row['vs_eager']:>8.2f}{compiled:>9}"
        )
    return "\n".join(lines)
