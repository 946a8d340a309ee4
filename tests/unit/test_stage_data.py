"""Rows by (shard, position): from texts, lines of JSON, parquet; as bytes and as tokens; what is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from p2p.errors import LocalError
from stage.data import Cursor, Row, Source
from stage.data import source as source_module
from stage.data.catalog import LocalFiles, Section
from stage.data.files import DOCUMENT_LIMIT, Troubles, open_file
from stage.data.tokens import Document, Tokenizer
from tests.tokens import trained

SEQ = 16


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def numbered(path: Path, count: int) -> Path:
    """Distinct 16-byte records, so that a row tells where it came from."""
    return write(path, "".join(f"<{i:013d}>\n" for i in range(count)))


def text_of(row: Row) -> str:
    return row.ids.decode("utf-32-le")


def lap(source: Source, shard: int = 0) -> list[Row]:
    """All rows of a shard, once."""
    rows = []
    for position in itertools.count():
        row = source.row(shard, position)
        if source.cursor(shard, position).lap:
            return rows
        rows.append(row)
    raise AssertionError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows so small that a few KB have many."""
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(source_module, "BLOCK_ROWS", 1)
    monkeypatch.setattr(source_module, "WINDOW_BYTES", 4000)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_every_row_has_one_owner_in_few_blocks(tmp_path: Path, shards: int) -> None:
    source = Source(numbered(tmp_path / "a.txt", 1000), SEQ, 5, shards=shards)
    held_out = {text_of(row) for row in source.held_out(1000)}
    assert len(held_out) == 15
    owned = [text_of(row) for shard in range(shards) for row in lap(source, shard)]
    assert len(owned) + len(held_out) == 1000
    assert len(set(owned) | held_out) == 1000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shards", [1, 3, 7])
def test_every_row_has_one_owner_in_many_blocks(tmp_path: Path, shards: int) -> None:
    source = Source(numbered(tmp_path / "a.txt", 5000), SEQ, 5, shards=shards)
    laps = [lap(source, shard) for shard in range(shards)]
    owned = [text_of(row) for rows in laps for row in rows]
    assert len(owned) == len(set(owned))
    held_out = [text_of(row) for row in source.held_out(8)]
    assert len(set(held_out)) == 8
    assert not set(owned) & set(held_out)
    assert 4700 < len(owned) < 5000 - 40  # some are held out in every block, and each loses a row at its end
    assert all([row.position for row in rows] == list(range(len(rows))) for rows in laps)


@pytest.mark.usefixtures("small")
def test_rows_are_mixed_and_come_in_another_order_in_the_next_lap(tmp_path: Path) -> None:
    source = Source(numbered(tmp_path / "a.txt", 2000), SEQ, 5)
    first = [text_of(row) for row in lap(source)]
    second = [text_of(source.row(0, len(first) + i)) for i in range(len(first))]
    assert set(first) == set(second)
    assert first != second
    assert first != sorted(first)


def test_rows_are_reproducible_and_follow_the_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.txt", 200)
    first, second, other = (Source(path, SEQ, seed) for seed in (5, 5, 6))
    rows = [first.row(0, i) for i in range(50)]
    assert rows == [second.row(0, i) for i in range(50)]
    assert rows != [other.row(0, i) for i in range(50)]
    assert all(len(row.ids) == 4 * (SEQ + 1) for row in rows)
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert first.held_out(3) == second.held_out(3)


@pytest.mark.usefixtures("small")
def test_a_cursor_leads_to_the_same_rows_without_reading_what_is_before(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.txt", 5000)
    source = Source(path, SEQ, 5, shards=2)
    rows = [source.row(1, position) for position in range(6000)]  # more than two laps
    for position in (0, 1, 777, 2400, 2600, 5999):
        fresh = Source(path, SEQ, 5, shards=2)
        fresh.row(1, 0)
        known = Source(path, SEQ, 5, shards=2)
        for before in range(0, position + 1, 100):
            known.row(1, before)
        known.row(1, position)
        cursor = known.cursor(1, position)
        assert cursor.begin <= position < cursor.begin + 300
        fresh.seek(1, cursor)
        read: list[int] = []
        fresh.block = counted(fresh.block, read)  # type: ignore[method-assign]
        assert fresh.row(1, position) == rows[position]
        assert len(read) <= 4
        if cursor.begin:
            with pytest.raises(LocalError, match="lies behind us"):
                fresh.row(1, cursor.begin - 1)


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return call


@pytest.mark.usefixtures("small")
def test_the_next_window_is_prepared_ahead(tmp_path: Path) -> None:
    source = Source(numbered(tmp_path / "a.txt", 5000), SEQ, 5)
    assert source.at_hand(0, 0) is None
    assert not source.unprepared(0, 0)
    source.row(0, 0)
    assert source.at_hand(0, 1) is not None
    assert not source.unprepared(0, 1)
    late = next(position for position in itertools.count() if source.unprepared(0, position))
    behind = next(position for position in itertools.count() if source.at_hand(0, position) is None)
    assert late == -(-behind // 2)
    source.prepare(0, late)
    assert source.at_hand(0, behind) is not None
    assert not source.unprepared(0, late)
    assert source.at_hand(0, behind) == Source(tmp_path / "a.txt", SEQ, 5).row(0, behind)


def test_ids_are_little_endian_uint32(tmp_path: Path) -> None:
    row = Source(write(tmp_path / "a.txt", "abcdefgh" * 100), 7, 5).row(0, 0)
    assert len(row.ids) == 4 * 8
    assert row.ids[:8] == bytes([row.ids[0], 0, 0, 0, row.ids[4], 0, 0, 0])
    assert "abcdefgh" in 2 * text_of(row)


def test_folder_in_sorted_order_with_document_boundaries(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.md", "second" * 10)
    write(tmp_path / "a.txt", "first!" * 10)
    write(tmp_path / ".hidden", "no" * 100)
    write(tmp_path / "image.bin", b"\x89\0\0" * 100)
    write(tmp_path / "latin", "caf\xe9".encode("latin-1") * 10)
    write(tmp_path / "empty.txt", "")
    source = Source(tmp_path, SEQ, 5)
    assert "3 files, 2 files left out" in source.describe()
    rows = [*lap(source), *source.held_out(100)]
    starts = [row for row in rows if row.starts]
    assert len(starts) == 2
    for row in starts:
        for start in row.starts:
            assert row.ids[4 * (start - 1) : 4 * start] == bytes(4)


def test_default_is_the_standard_library() -> None:
    source = Source(None, 128, 1)
    assert "def " in "".join(text_of(source.row(0, i)) for i in range(64))
    assert len(source.held_out(8)) == 8


def jsonl(path: Path, records: Iterable[Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def documents(path: Path, cuts: list[int], field: str = "text") -> tuple[list[bytes], Troubles]:
    """Of a file that is read in parts, cut there."""
    troubles = Troubles()
    file = open_file(path, field)
    edges = [0, *cuts, file.units]
    parts = [file.read(a, b, troubles) for a, b in itertools.pairwise(edges)]
    return [document.text for part in parts for document in part], troubles


def test_lines_of_json_cut_anywhere_are_read_once(tmp_path: Path) -> None:
    texts = ["one", "zwei – 2", "three\nlines\n", "x" * 40, "", "five"]
    path = jsonl(tmp_path / "a.jsonl", ({"text": text, "id": 3} for text in texts))
    with path.open("ab") as stream:
        stream.write(b'\n  \n{"text": "last"}')  # empty lines, and no newline at the end
    wanted = [text.encode() for text in [*texts, "last"] if text]
    size = path.stat().st_size
    for cut in range(1, size):
        assert documents(path, [cut])[0] == wanted
    assert documents(path, list(range(1, size)))[0] == wanted


def test_a_text_cut_anywhere_has_whole_characters(tmp_path: Path) -> None:
    text = "aé–𝄞" * 5
    path = write(tmp_path / "a.txt", text)
    size = len(text.encode())
    for cut in range(1, size):
        parts = documents(path, [cut])[0]
        assert "".join(part.decode() for part in parts) == text
    assert b"".join(documents(path, list(range(1, size)))[0]).decode() == text
    garbage = bytes([0x80, 0xC3, 0xBF, 0x85, 0x86, 0x87, 0x88, 0x89, 0xFF] * 9)
    path = write(tmp_path / "b.txt", garbage)
    for cut in range(1, len(garbage)):
        assert b"".join(documents(path, [cut])[0]) == garbage


def test_lines_that_are_none_are_left_out_and_told(tmp_path: Path) -> None:
    good = '{"text": "good"}\n'
    path = write(
        tmp_path / "a.jsonl", good + '{"text": 3}\nno\n["text"]\n{"text": "cut\n' + "[" * 9999 + "\n" + good
    )
    found, troubles = documents(path, [])
    assert found == [b"good"] * 2
    assert troubles.counts == {
        "lines left out without a text in 'text'": 2,
        "lines left out that are no JSON": 3,
    }


def test_a_huge_line_is_left_out_in_bounded_memory(tmp_path: Path) -> None:
    """Wherever the file is cut, and however many cuts are in it."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        for _ in range(24):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "behind"}\n')
    size = path.stat().st_size
    tracemalloc.start()
    try:
        for cuts in ([19], list(range(1 << 20, size, 1 << 20)), [size - 22, size - 21]):
            found, troubles = documents(path, cuts)
            assert found == [b"before", b"behind"]
            assert troubles.counts == {"lines left out with more than 4 MiB": 1}
        assert tracemalloc.get_traced_memory()[1] < 4 * DOCUMENT_LIMIT
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_10_gb_is_opened_and_read_in_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "0123456789abcde\n" * 100_000)
    with path.open("r+b") as stream:
        stream.truncate(10 << 30)  # a hole reads as NUL: parts that are no text
    Source(path, SEQ, 5)
    files = LocalFiles(path)
    section = files.section(0, 1 << 20)
    assert section.blocks == 10 << 10
    assert len(b"".join(document.text for document in section.documents(0))) == 1 << 20
    assert list(section.documents(5000)) == []
    assert str(files.troubles) == "1 parts left out as not text"


def test_a_few_lines_around_a_huge_one_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(80):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n' + b'{"text": "all that there is to read"}\n' * 100)
    source = Source(path, SEQ, 5)
    assert source.held_out(1)
    assert "1 lines left out with more than 4 MiB" in source.describe()
    assert source.row(0, 0).ids != source.row(0, 500).ids


def parquet(path: Path, texts: list[str | None], *, group: int, column: str = "text") -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def test_parquet_cut_anywhere_is_read_once(tmp_path: Path) -> None:
    texts = [None if i % 7 == 3 else "" if i % 7 == 5 else f"document {i} " * (i % 5 + 1) for i in range(40)]
    path = parquet(tmp_path / "a.parquet", texts, group=9)
    wanted = [text.encode() for text in texts if text]
    assert open_file(path, "text").units == 40
    for cut in range(1, 40):
        assert documents(path, [cut])[0] == wanted
    assert documents(path, list(range(1, 40)))[0] == wanted


def test_rows_of_parquet_and_of_lines_are_the_same(tmp_path: Path) -> None:
    texts = [f"document {i}; " * 30 for i in range(50)]
    one = Source(
        LocalFiles(parquet(tmp_path / "a.parquet", list(texts), group=7, column="content"), "content"), SEQ, 5
    )
    other = Source(jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts)), SEQ, 5)
    assert {text_of(row) for row in lap(one)} | {text_of(row) for row in one.held_out(99)} == {
        text_of(row) for row in lap(other)
    } | {text_of(row) for row in other.held_out(99)}
    assert one.fingerprint != other.fingerprint


def test_blocks_of_many_kinds_of_files_hold_every_document_once(tmp_path: Path) -> None:
    texts = [f"<{i:05d}>" + "." * (i % 90) for i in range(300)]
    parquet(tmp_path / "a.parquet", list(texts[:100]), group=30)
    jsonl(tmp_path / "b.jsonl", ({"text": text} for text in texts[100:200]))
    for number, text in enumerate(texts[200:]):
        write(tmp_path / "c" / f"{number:03d}.txt", text)
    files = LocalFiles(tmp_path)
    for size in (500, 1000, 5000, 10**6):
        section: Section = files.section(0, size)
        joined: dict[int, list[Document]] = {b: list(section.documents(b)) for b in range(section.blocks)}
        whole = b"".join(document.text for block in joined.values() for document in block)
        assert whole.decode() == "".join(texts)
        assert section.blocks == max(1, round(section.weight / size))


def test_tokens_of_a_tokenizers_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    path = trained(tmp_path / "tokenizer.json")
    tokens = Tokenizer(path)
    texts = ["It was a dark night; the rain fell.", "in torrents " * 9, "naïve – 𝄞"]
    packed = tokens.pack([Document(text.encode()) for text in texts])
    library = Library.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    end = library.token_to_id("<|endoftext|>")
    ids = list(packed.ids)
    places = [index + 1 for index, token in enumerate(ids) if token == end]
    assert list(packed.begins) == [0, *places[:-1]]
    assert places[-1] == len(ids)
    edges = itertools.pairwise([0, *places])
    assert [library.decode(ids[a : b - 1]) for a, b in edges] == texts
    assert max(ids) < tokens.vocab <= 400
    corpus = jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts * 40))
    source = Source(corpus, SEQ, 5, tokens=tokens)
    row = source.row(0, 3)
    assert len(row.ids) == 4 * (SEQ + 1)
    assert source.fingerprint != Source(corpus, SEQ, 5).fingerprint
    assert any(text_row.starts for text_row in lap(source))


@pytest.mark.parametrize("content", [None, b"", b"no", b"{}", b"\xff\0", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LocalError, match=r"data: .*tokenizer.json.*name a tokenizer"):
        Tokenizer(path)


@pytest.mark.parametrize("size", [0, 1, SEQ, 2 * SEQ])
def test_too_little_text_is_one_clear_sentence(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.txt", "x" * size)
    with pytest.raises(LocalError, match=r"data: .*(too few|empty)"):
        Source(path, SEQ, 1, shards=2)


def test_two_rows_are_enough(tmp_path: Path) -> None:
    source = Source(write(tmp_path / "a.txt", "x" * (2 * SEQ)), SEQ, 1)
    assert (len(lap(source)), len(source.held_out(8))) == (1, 1)


def test_lines_without_the_field_are_one_clear_sentence(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ({"content": "word " * 9} for _ in range(100)))
    with pytest.raises(LocalError, match=r"100 lines left out without a text in 'text'"):
        Source(path, SEQ, 1)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot read .*No such file"):
        Source(tmp_path / "missing", SEQ, 1)
    with pytest.raises(LocalError, match="no readable text"):
        Source(tmp_path, SEQ, 1)
    with pytest.raises(LocalError, match="not text"):
        Source(write(tmp_path / "b.bin", b"\0" * 1000), SEQ, 1)
    with pytest.raises(LocalError, match=r"no readable text file .*b.bin is empty or not text"):
        Source(tmp_path, SEQ, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LocalError, match="not text"):
        Source(tmp_path / "pipe", SEQ, 1)


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" * 9, b"text\n" * 99, b"\0" * 99])
def test_a_parquet_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(LocalError, match=r"data: cannot read .* as parquet: .*; name a text") as raised:
        Source(path, SEQ, 1)
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_the_column_and_one_that_is_damaged(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["word " * 50] * 500, group=100, column="body")
    with pytest.raises(LocalError, match=r"no column 'text' \(id, body\); name the one"):
        Source(path, SEQ, 1)
    with pytest.raises(LocalError, match=r"column 'id' of .* holds no text"):
        Source(LocalFiles(path, "id"), SEQ, 1)
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = bytes(len(content) - footer - 4)
    path.write_bytes(content)
    with pytest.raises(LocalError, match=r"cannot read .* as parquet"):
        Source(LocalFiles(path, "body"), SEQ, 1)
    with pytest.raises(LocalError, match="has no rows"):
        Source(parquet(path, [], group=1), SEQ, 1)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        path = write(tmp_path / name, '{"text": "words and words"}\n' * 300_000)
        source = Source(path, SEQ, 5)
        with path.open("ab") as stream:
            stream.write(b"x")
        with pytest.raises(LocalError, match="has changed since"):
            source.row(0, 0)
        path.unlink()
        with pytest.raises(LocalError, match="No such file"):
            source.row(0, 0)


@pytest.mark.parametrize(("shard", "position"), [(1, 0), (-1, 0), (0, -1)])
def test_names_outside_the_source(tmp_path: Path, shard: int, position: int) -> None:
    source = Source(numbered(tmp_path / "a.txt", 100), SEQ, 5)
    with pytest.raises(LocalError):
        source.row(shard, position)


def test_trainers_need_no_torch() -> None:
    modules = "stage.data, stage.progress, stage.schedule, stage.state, stage.config"
    unwanted = "{'torch', 'numpy', 'pyarrow', 'tokenizers', 'huggingface_hub'}"
    code = f"import {modules}, sys; sys.exit(bool({unwanted} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_cursor_is_where_it_says() -> None:
    assert Cursor() == Cursor(0, 0, 0, 0)
