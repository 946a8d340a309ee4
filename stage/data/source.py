"""Rows by (shard, position): what a trainer makes microbatches of.

A run's data are dealt to ``shards``, so that each block (``catalog``) belongs to one; where there are
fewer blocks than four a shard, every block's rows are dealt instead. A shard's blocks come in a keyed order,
another in every *lap* through the data, in *windows* of about ``WINDOW_BYTES``: a window's rows are mixed,
and have consecutive positions. So positions are dense, go on for ever, and mean the same row on every
machine that has the same data.

How many rows a window has is known once it was read. A ``Cursor`` says at which position a window begins:
``Source.seek`` goes on from one, and ``Source.cursor`` has the one to come back to. Sections (``catalog``)
are gone through one after the other, so a data set of many files needs one of them at a time.

``row`` and ``held_out`` read files, make ids, and may take seconds: call them in a thread. ``at_hand`` does
not. Limits: two windows of each shard in use are kept. The same arguments give the same rows everywhere.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from threading import Lock

import attrs

from p2p.errors import LocalError
from stage.data.catalog import BLOCK_BYTES, Catalog, LocalFiles, Section
from stage.data.rows import Block, Permutation, Row
from stage.data.tokens import Tokens

WINDOW_BYTES = 4 << 20
"""Text of which the rows are mixed with each other."""
BLOCK_ROWS = 128
"""Sequences of one byte a token that a block has room for at least: what is cut off at its end is little."""
_KEPT = 2


@attrs.frozen
class Cursor:
    """Where a window of a shard lies, and the position of its first row."""

    lap: int = 0
    section: int = 0
    window: int = 0
    begin: int = 0


class _Window:
    """Blocks whose rows are mixed."""

    def __init__(self, blocks: list[tuple[Block, int, int]], key: tuple[object, ...]) -> None:
        """Blocks, each with the range of its places that counts."""
        self._blocks = blocks
        self._ends = list(accumulate(high - low for _block, low, high in blocks))
        self.rows = self._ends[-1] if blocks else 0
        self._order = Permutation(self.rows, *key)

    def row(self, number: int, shard: int, position: int) -> Row:
        place = self._order(number)
        index = bisect_right(self._ends, place)
        block, _low, high = self._blocks[index]
        return block.row(high - (self._ends[index] - place), shard, position)


class Source:
    """See the head of this file."""

    def __init__(
        self,
        data: Path | Catalog | None,
        seq: int,
        seed: int,
        *,
        shards: int = 1,
        tokens: Tokens | None = None,
    ) -> None:
        """``data``: a file or folder, the standard library where it is None, or another catalog."""
        if not 1 <= shards <= 1 << 20:
            raise LocalError(f"data: {shards} shards; between 1 and {1 << 20} are possible")
        self._catalog = data if data is not None and not isinstance(data, Path) else LocalFiles(data)
        self.tokens = tokens or Tokens()
        self._bytes = self.tokens.name == Tokens.name
        self.seq = seq
        self.shards = shards
        self._seed = seed
        self._block_bytes = max(BLOCK_BYTES, BLOCK_ROWS * seq)
        self._lock = Lock()
        """Reading is one thread's at a time."""
        self._open: tuple[int, Section] | None = None
        self._readers: dict[int, _Reader] = {}
        self._held_out: list[Block] = []
        self._recent: dict[tuple[int, int], Block] = {}
        """A window's blocks that were read last."""
        known = (self._catalog.name, self.tokens.name, seq, seed, shards)
        self.fingerprint = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
        """Of everything that positions depend on."""
        if self._catalog.sections == 1:  # the others cost a download
            self._look()

    def describe(self) -> str:
        """One line for people: how much from where, and what was left out."""
        troubles = str(self._catalog.troubles)
        return self._catalog.describe() + (f", {troubles}" if troubles else "")

    def row(self, shard: int, position: int) -> Row:
        """The training row of that name. LocalError if it cannot be read, or lies before the cursor."""
        reader = self._reader(shard)
        found = reader.at_hand(position)
        if found is None:
            with self._lock:
                found = reader.read(position)
        return found

    def at_hand(self, shard: int, position: int) -> Row | None:
        """The same, if nothing has to be read for it."""
        return self._reader(shard).at_hand(position)

    def prepare(self, shard: int, position: int) -> None:
        """Read the window behind the one of this position, so that it is at hand."""
        with self._lock:
            self._reader(shard).read_behind(position)

    def unprepared(self, shard: int, position: int) -> bool:
        """Whether ``prepare`` is due: the position's window is half used and the next is not at hand."""
        return self._reader(shard).unprepared(position)

    def seek(self, shard: int, cursor: Cursor) -> None:
        """Go on from there: positions before the cursor's are not to be had any more."""
        self._check_shard(shard)
        self._readers[shard] = _Reader(self, shard, cursor)

    def cursor(self, shard: int, position: int) -> Cursor:
        """What to come back to for this position and all that follow; what is before it is forgotten."""
        return self._reader(shard).forget(position)

    def held_out(self, count: int) -> list[Row]:
        """Rows for evaluation, the same ones for everybody and always; at least one, at most ``count``."""
        with self._lock:
            if not self._held_out:
                self._held_out = self._find_held_out(count)
        rows = [
            block.row(place, 0, 0)
            for place in range(max(block.held_out for block in self._held_out))
            for block in self._held_out
            if place < block.held_out
        ]
        return [attrs.evolve(row, position=number) for number, row in enumerate(rows[:count])]

    def _find_held_out(self, count: int) -> list[Block]:
        """Blocks with rows enough: the first ones that the first shard comes to, which are read anyway."""
        index = self.section_order(0, 0)[0]
        found: list[Block] = []
        places, permuted = self._blocks_of(0, index, 0)
        for place in places:
            block = self.block(index, permuted(place))
            if block.held_out:
                found.append(block)
            if len(found) > 1 and sum(one.held_out for one in found) >= count:
                break
        if not found:
            raise self._too_few(f"no row for evaluation in {self._catalog.describe()}")
        return found

    def section_order(self, shard: int, lap: int) -> list[int]:
        """Sections of a shard in a lap."""
        sections = self._catalog.sections
        order = Permutation(sections, self._seed, "sections", lap)
        step = self.shards if sections >= self.shards else 1
        return [order(index) for index in range(shard if step > 1 else 0, sections, step)]

    def window(self, shard: int, cursor: Cursor) -> tuple[_Window, Cursor]:
        """The window at a cursor, and where the next one begins."""
        order = self.section_order(shard, cursor.lap)
        index = order[cursor.section]
        mine, permuted = self._blocks_of(shard, index, cursor.lap)
        by_rows = self._by_rows(index)
        many = max(1, WINDOW_BYTES // self._block_bytes)
        blocks = []
        for place in mine[cursor.window * many : (cursor.window + 1) * many]:
            block = self.block(index, permuted(place))
            share = (shard, self.shards) if by_rows else (0, 1)
            low, high = (block.trained * (share[0] + i) // share[1] for i in (0, 1))
            if low < high:
                blocks.append((block, block.held_out + low, block.held_out + high))
        key = (self._seed, "window", shard, cursor.lap, cursor.section, cursor.window)
        window = _Window(blocks, key)
        begin = cursor.begin + window.rows
        if (cursor.window + 1) * many < len(mine):
            following = attrs.evolve(cursor, window=cursor.window + 1, begin=begin)
        elif cursor.section + 1 < len(order):
            following = Cursor(cursor.lap, cursor.section + 1, 0, begin)
        else:
            following = Cursor(cursor.lap + 1, 0, 0, begin)
        return window, following

    def _by_rows(self, section: int) -> bool:
        """Whether a section's rows are dealt to the shards: there are few sections, and it has few blocks."""
        return self._catalog.sections < self.shards and self._section(section).blocks < 4 * self.shards

    def _blocks_of(self, shard: int, section: int, lap: int) -> tuple[range, Permutation]:
        """A shard's places in the order of a section's blocks, and that order in a lap."""
        blocks = self._section(section).blocks
        permuted = Permutation(blocks, self._seed, "blocks", section, lap)
        whole = self._catalog.sections >= self.shards or self._by_rows(section)
        places = range(blocks) if whole else range(shard, blocks, self.shards)
        return places, permuted

    def block(self, section: int, block: int) -> Block:
        """The rows of one block."""
        found = self._recent.pop((section, block), None)
        if found is None:
            opened = self._section(section)
            packed = self.tokens.pack(opened.documents(block))
            blocks = opened.blocks * self._catalog.sections
            found = Block(packed, self.seq, blocks=blocks, key=(self._seed, section, block))
        self._recent[section, block] = found
        while len(self._recent) > max(1, WINDOW_BYTES // self._block_bytes):
            self._recent.pop(next(iter(self._recent)))
        return found

    def _section(self, index: int) -> Section:
        if self._open is None or self._open[0] != index:
            self._open = index, self._catalog.section(index, self._block_bytes)
        return self._open[1]

    def _look(self) -> None:
        """LocalError if there is nothing to train on: of few blocks by reading them, of many by one."""
        section = self._section(0)
        if not self._bytes and section.weight > 256 * self.seq * (1 + self.shards):
            for number in range(section.blocks):
                if next(section.documents(number), None) is not None:
                    return  # to make ids of a whole block takes seconds
        few = self._bytes and section.blocks <= WINDOW_BYTES // BLOCK_BYTES
        rows = trained = 0
        for number in range(section.blocks):
            block = self.block(0, number)
            rows, trained = rows + block.rows, trained + block.trained
            if trained >= self.shards and rows > trained and not few:
                return
        if rows < 1 + self.shards or not trained >= self.shards or rows == trained:
            raise self._too_few(
                f"{self._catalog.describe()}, too few for {1 + self.shards} sequences "
                f"of {self.seq + 1} {'bytes' if self._bytes else 'tokens'}"
            )

    def _too_few(self, what: str) -> LocalError:
        troubles = str(self._catalog.troubles)
        left = f" ({troubles})" if troubles else ""
        return LocalError(f"data: {what}{left}; give a larger file or folder")

    def _reader(self, shard: int) -> _Reader:
        self._check_shard(shard)
        if shard not in self._readers:
            self._readers[shard] = _Reader(self, shard, Cursor())
        return self._readers[shard]

    def _check_shard(self, shard: int) -> None:
        if not 0 <= shard < self.shards:
            raise LocalError(f"data: shard {shard} does not exist; there are {self.shards}")


class _Reader:
    """How far one shard was read."""

    def __init__(self, source: Source, shard: int, cursor: Cursor) -> None:
        self._source = source
        self._shard = shard
        self._cursors = [cursor]
        """Ascending; the last one's window was not read yet, unless it is among those that are kept."""
        self._kept: dict[Cursor, _Window] = {}
        self._floor = 0
        """Positions below it are not asked for any more."""

    def at_hand(self, position: int) -> Row | None:
        cursor = self.cursor(position)
        window = self._kept.get(cursor)
        number = position - cursor.begin
        if window is None or number >= window.rows:
            return None
        return window.row(number, self._shard, position)

    def read(self, position: int) -> Row:
        fruitful = self.cursor(position).lap
        while (found := self.at_hand(position)) is None:
            cursor = self.cursor(position)
            if cursor.lap > fruitful + 1:
                raise LocalError(f"data: {self._source.describe()}: a whole lap had no row to train on")
            if self._load(cursor).rows:
                fruitful = cursor.lap
        return found

    def read_behind(self, position: int) -> None:
        behind = self._behind(position)
        if behind is not None and behind not in self._kept:
            self._load(behind)

    def unprepared(self, position: int) -> bool:
        cursor = self.cursor(position)
        window = self._kept.get(cursor)
        if window is None or 2 * (position - cursor.begin) < window.rows:
            return False
        behind = self._behind(position)
        return behind is not None and behind not in self._kept

    def cursor(self, position: int) -> Cursor:
        """The last known one that is not beyond the position."""
        cursors = self._cursors  # the thread that reads may put another list there
        at = bisect_right(cursors, position, key=lambda cursor: cursor.begin)
        if at == 0:
            raise LocalError(f"data: position {position} of shard {self._shard} lies behind us")
        return cursors[at - 1]

    def forget(self, position: int) -> Cursor:
        self._floor = position
        return self.cursor(position)

    def _behind(self, position: int) -> Cursor | None:
        cursors = self._cursors
        at = bisect_right(cursors, position, key=lambda cursor: cursor.begin)
        return cursors[at] if at < len(cursors) else None

    def _load(self, cursor: Cursor) -> _Window:
        window, following = self._source.window(self._shard, cursor)
        if cursor == self._cursors[-1]:
            needed = bisect_right(self._cursors, self._floor, key=lambda known: known.begin)
            self._cursors = [*self._cursors[max(0, needed - 1) :], following]
        self._kept[cursor] = window
        while len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)))
        return window
