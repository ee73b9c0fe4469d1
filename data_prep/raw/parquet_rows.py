"""Parquet files as documents: the strings of one column, read by pyarrow (the extra `parquet`)."""

from collections.abc import Iterator
from typing import IO, Any

from common.errors import DataError
from common.splits import SplitName
from data_prep.raw.json_text import named, text_in
from data_prep.raw.locations import InputFile, PipeFile, RemoteFile, read_errors
from data_prep.raw.records import EXCERPT_BYTES, Document, NoText, Rejected, checked_text, too_long
from data_prep.raw.unpack import DamagedFileError, NoDocumentError

BATCH_BYTES = 1 << 22  # of text decoded at a time, by the mean of a row group
BATCH_ROWS = 4096


def parquet_documents(
    file: InputFile, split: SplitName, *, text_key: str, max_bytes: int
) -> Iterator[Document | Rejected]:
    """Documents with their row, from 1. Only the column of the text is read. Memory: a page of it and BATCH_BYTES, or
    one row where that is more. Raises NoDocumentError if there is no such column."""
    parquet, arrow = _pyarrow(file)
    try:
        with _opened(file) as stream:
            table = parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
            columns = _columns(table.schema_arrow)
            if text_key not in columns:
                words = f"has no column `{text_key}`; set `text_key` to one of: {named(columns)}"
                raise NoDocumentError(f"{file} {words}")
            row = 0
            for batch in table.iter_batches(_batch_rows(table, text_key), columns=[text_key], use_threads=False):
                for record in batch.to_pylist():
                    row += 1
                    yield _document(row, record, split, text_key, max_bytes)
            if row != table.metadata.num_rows:  # what pyarrow makes of some damaged pages
                raise DamagedFileError(
                    f"{file} is damaged ({row:,} of {table.metadata.num_rows:,} rows); fetch it again"
                )
    except arrow.ArrowException as error:
        raise _damaged(file, error) from None
    except OSError as error:
        # pyarrow raises OSError, without a number, for pages that do not unpack.
        raise (_damaged(file, error) if error.errno is None and not isinstance(file, RemoteFile) else error) from None


def _pyarrow(file: InputFile) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fix = 'install it with pip install -e ".[parquet]"'
        raise DataError(f"{file} is a Parquet file, which the package pyarrow reads; {fix}") from None
    return pyarrow.parquet, pyarrow


def _opened(file: InputFile) -> IO[bytes]:
    if isinstance(file, PipeFile):
        raise DataError(f"{file} gives a Parquet file, which is not read from front to back; write it to a file first")
    if not isinstance(file, RemoteFile):
        return file.open("rb")
    with read_errors(file):
        stream = file.open("rb", random_access=True)
    if not stream.seekable():
        raise DataError(f"{file}: the server tells no size, which a Parquet file needs; fetch the file first")
    return stream


def _damaged(file: InputFile, error: Exception) -> DamagedFileError:
    return DamagedFileError(f"{file} is damaged ({' '.join(str(error).split())[:200]}); fetch it again")


def _columns(fields: Any, before: str = "") -> list[str]:
    """Names of the columns of a schema, dotted for those inside others."""
    names = []
    for field in fields:
        inner = [field.type.field(number) for number in range(field.type.num_fields)]
        is_struct = str(field.type).startswith("struct")
        names += _columns(inner, f"{before}{field.name}.") if is_struct else [f"{before}{field.name}"]
    return names


def _batch_rows(table: Any, text_key: str) -> int:
    """Rows that hold about BATCH_BYTES of the column, by the row group where they are longest."""
    longest = 1
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        for column in (group.column(index) for index in range(group.num_columns)):
            if column.path_in_schema == text_key and group.num_rows:
                longest = max(longest, column.total_uncompressed_size // group.num_rows)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // longest))


def _document(row: int, record: dict[str, Any], split: SplitName, text_key: str, max_bytes: int) -> Document | Rejected:
    value = record.get(text_key)
    raw = value if isinstance(value, bytes) else b""  # written without saying that they are UTF-8
    try:
        data = checked_text(raw, "the text") if isinstance(value, bytes) else text_in(record, text_key)
    except NoText as error:
        return Rejected(row, error.reason, error.detail, raw[:EXCERPT_BYTES], len(raw))
    return too_long(row, data, max_bytes) if len(data) > max_bytes else Document(row, split, data)
