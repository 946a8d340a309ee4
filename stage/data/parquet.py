"""Parquet files, read in parts: rows [a, b) of one column, without the rows before their row group.

The footer says how many rows there are and how large the column is. Of a row group only the one column is
decoded, in batches of about a MiB; what is before the first row that is asked for is decoded and dropped.
``pyarrow`` is imported here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2p.errors import LocalError
from stage.data.files import DOCUMENT_LIMIT, REMEDY, File, Troubles
from stage.data.tokens import Document

BATCH_BYTES = 1 << 20
_BUFFER = 1 << 20


def open_parquet(path: Path, field: str) -> File:
    """LocalError unless it has rows with a column of texts of that name."""
    with _footer(path) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        if field not in schema.names:
            known = ", ".join(schema.names[:12])
            raise LocalError(
                f"data: {path} has no column {field!r} ({known}); name the one with the text in trainer.field"
            )
        if str(schema.field(field).type) not in ("string", "large_string", "string_view"):
            raise LocalError(f"data: the column {field!r} of {path} holds no text; name one in trainer.field")
        rows = metadata.num_rows
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        weight = sum(_column(group, field) for group in groups)
        counts = [group.num_rows for group in groups]
    if not rows:
        raise LocalError(f"data: {path} has no rows; {REMEDY}")
    batch = max(1, min(1024, BATCH_BYTES * rows // max(1, weight)))

    def read(begin: int, end: int, troubles: Troubles) -> Iterator[Document]:
        return _read(path, field, counts, batch, begin, end, troubles)

    return File(path, rows, max(rows, weight), read)


def _footer(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise LocalError(f"data: {path} needs the package pyarrow ({error}); install it") from None
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).splitlines()[0][:120]
        raise LocalError(f"data: cannot read {path} as parquet: {why}; {REMEDY}") from None


def _column(group: Any, field: str) -> int:
    """Bytes of a column before compression."""
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def _read(
    path: Path, field: str, counts: list[int], batch: int, begin: int, end: int, troubles: Troubles
) -> Iterator[Document]:
    import pyarrow

    with _footer(path) as parquet:
        if [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)] != counts:
            raise LocalError(f"data: {path} has changed since this node began to read it; put it back")
        first = 0
        for group, rows in enumerate(counts):
            if begin < first + rows and first < end:
                try:
                    yield from _of_group(
                        parquet, group, field, batch, max(0, begin - first), end - first, troubles
                    )
                except (pyarrow.ArrowException, OSError) as error:
                    why = str(error).splitlines()[0][:120]
                    raise LocalError(f"data: cannot read {path} as parquet: {why}; {REMEDY}") from None
            first += rows


def _of_group(
    parquet: Any, group: int, field: str, batch: int, begin: int, end: int, troubles: Troubles
) -> Iterator[Document]:
    """Rows [begin, end) of a row group."""
    at = 0
    for part in parquet.iter_batches(batch, row_groups=[group], columns=[field], use_threads=False):
        if at >= end:
            return
        column = part.column(0)
        for index in range(max(0, begin - at), min(len(column), end - at)):
            value = column[index]
            size = value.as_buffer().size if value.is_valid else 0
            if size > DOCUMENT_LIMIT:
                troubles(f"rows left out with more than {DOCUMENT_LIMIT >> 20} MiB")
            elif size:
                yield Document(value.as_buffer().to_pybytes())
        at += len(column)
