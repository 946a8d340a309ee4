"""Rows of text by (shard, position)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2p.errors import LocalError
from stage.data import ByteSource

SEQ = 16


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def numbered(path: Path, count: int) -> Path:
    """Distinct 16-byte records, so that a row tells where it came from."""
    return write(path, "".join(f"<{i:013d}>\n" for i in range(count)))


def test_every_row_has_one_owner(tmp_path: Path) -> None:
    source = ByteSource(numbered(tmp_path / "a.txt", 1000), SEQ, 5, shards=3)
    assert source.rows == 1000
    assert source.eval_rows == 15
    held_out = {source.eval_row(i).text for i in range(source.eval_rows)}
    owned = [
        source.row(shard, position).text for shard in range(3) for position in range(source.shard_rows(shard))
    ]
    assert len(owned) + len(held_out) == 1000
    assert len(set(owned) | held_out) == 1000


def test_rows_are_reproducible_shuffled_and_go_on_for_ever(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.txt", 200)
    first, second = ByteSource(path, SEQ, 5), ByteSource(path, SEQ, 5)
    other = ByteSource(path, SEQ, 6)
    rows = [first.row(0, i) for i in range(50)]
    assert rows == [second.row(0, i) for i in range(50)]
    assert rows != [other.row(0, i) for i in range(50)]
    assert [row.text for row in rows] != sorted(row.text for row in rows)
    assert first.row(0, first.shard_rows(0)).text == first.row(0, 0).text
    assert all(len(row.text) == SEQ + 1 for row in rows)


def test_ids_are_little_endian_uint32(tmp_path: Path) -> None:
    row = ByteSource(numbered(tmp_path / "a.txt", 100), SEQ, 5).row(0, 3)
    assert len(row.ids) == 4 * (SEQ + 1)
    assert [int.from_bytes(row.ids[i : i + 4], "little") for i in range(0, len(row.ids), 4)] == list(row.text)


def test_folder_in_sorted_order_with_document_boundaries(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.md", "second" * 10)
    write(tmp_path / "a.txt", "first!" * 10)
    write(tmp_path / ".hidden", "no" * 100)
    write(tmp_path / "image.bin", b"\x89\0\0" * 100)
    write(tmp_path / "latin", "caf\xe9".encode("latin-1") * 10)
    write(tmp_path / "empty.txt", "")
    source = ByteSource(tmp_path, SEQ, 5)
    assert "3 files, 2 left out" in source.describe()
    rows = [source.row(0, i) for i in range(source.shard_rows(0))]
    rows += [source.eval_row(i) for i in range(source.eval_rows)]
    starts = [row for row in rows if row.starts]
    assert len(starts) == 2
    for row in starts:
        for start in row.starts:
            assert row.text[start - 1] == 0


def test_default_is_the_standard_library() -> None:
    source = ByteSource(None, 128, 1)
    assert source.rows > 10_000
    assert b"def " in b"".join(source.row(0, i).text for i in range(64))


@pytest.mark.parametrize("size", [0, 1, SEQ, 2 * SEQ])
def test_too_little_text_is_one_clear_sentence(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.txt", "x" * size)
    with pytest.raises(LocalError, match=r"data: .*(too few|empty)"):
        ByteSource(path, SEQ, 1, shards=2)


def test_two_rows_are_enough(tmp_path: Path) -> None:
    source = ByteSource(write(tmp_path / "a.txt", "x" * (2 * SEQ)), SEQ, 1)
    assert (source.rows, source.eval_rows, source.shard_rows(0)) == (2, 1, 1)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot read .*No such file"):
        ByteSource(tmp_path / "missing", SEQ, 1)
    with pytest.raises(LocalError, match="no readable text"):
        ByteSource(tmp_path, SEQ, 1)
    with pytest.raises(LocalError, match="not text"):
        ByteSource(write(tmp_path / "b.bin", b"\0" * 1000), SEQ, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LocalError, match="not text"):
        ByteSource(tmp_path / "pipe", SEQ, 1)


@pytest.mark.parametrize(("shard", "position"), [(1, 0), (-1, 0), (0, -1)])
def test_names_outside_the_source(tmp_path: Path, shard: int, position: int) -> None:
    source = ByteSource(numbered(tmp_path / "a.txt", 100), SEQ, 5)
    with pytest.raises(LocalError):
        source.row(shard, position)


def test_trainers_need_no_torch() -> None:
    modules = "stage.data, stage.schedule, stage.state, stage.config"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
