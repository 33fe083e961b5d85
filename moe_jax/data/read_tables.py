"""Reads parquet files and Hugging Face datasets as documents, in batches of rows."""

import pathlib
from collections.abc import Iterator
from typing import Any

from moe_jax.config.check import require
from moe_jax.data.documents import Document
from moe_jax.data.open_file import check_file, damaged
from moe_jax.data.records import Fields, choose_text_field, document_of

_ROWS = 256
_MAX_COLUMN_BYTES = 2**32  # per row group, unpacked


def read_parquet(
    path: pathlib.Path, domain: str, fields: Fields
) -> Iterator[tuple[Document, bool]]:
    """Reads a .parquet file.

    Args:
        path: the file.
        domain: the domain of its documents.
        fields: the columns to read.

    Yields:
        The document, and False: rows are held out whole.

    Raises:
        ValueError: the file is not parquet or is damaged, or a value is not text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_file(path, "A corpus file")
    try:
        schema = pq.read_schema(path)
        columns = _columns(schema, path, fields)
        # Repeated values are unpacked once: rows then take memory one at a time.
        with pq.ParquetFile(path, read_dictionary=columns[:1], buffer_size=2**20) as file:
            _check_sizes(file.metadata, path)
            batches = file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)
            yield from _documents(batches, path, domain, fields)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def read_arrow(path: pathlib.Path, domain: str, fields: Fields) -> Iterator[tuple[Document, bool]]:
    """Reads an .arrow file, as `datasets` writes it; see `read_parquet`."""
    import pyarrow as pa

    check_file(path, "A corpus file")
    try:
        # Read, not mapped: cutting the file meanwhile is an error, not a crash.
        with pa.OSFile(str(path)) as file:
            start = file.read(6)
            file.seek(0)
            is_file = start == b"ARROW1"
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            columns = _columns(reader.schema, path, fields)
            batches = (
                (reader.get_batch(i) for i in range(reader.num_record_batches))
                if is_file
                else iter(reader)
            )
            selected = (batch.select(columns) for batch in batches)
            yield from _documents(selected, path, domain, fields)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def _columns(schema: Any, path: pathlib.Path, fields: Fields) -> list[str]:
    """The columns to read, the text column first."""
    import pyarrow as pa

    def is_text(type_: Any) -> bool:
        plain = type_.value_type if pa.types.is_dictionary(type_) else type_
        return plain in (pa.string(), pa.large_string(), pa.string_view())

    text, *others = fields.names
    texts = sorted(field.name for field in schema if is_text(field.type))
    require(
        text in texts,
        f"A document must have its text in a column {text!r} of text",
        f"{path} has it as {schema.field(text).type}"
        if text in schema.names
        else f"{path} has the columns {sorted(schema.names)}",
        choose_text_field(texts),
    )
    named = (fields.id, fields.group)
    for name in filter(None, named):
        require(
            name in schema.names,
            f"Every record must have the field {name!r} that the config names",
            f"{path} has the columns {sorted(schema.names)}",
            "Correct config.data.id_field or config.data.group_field",
        )
    return list(dict.fromkeys([text, *(name for name in others if name in schema.names)]))


def _check_sizes(metadata: Any, path: pathlib.Path) -> None:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        size = max(
            row_group.column(i).total_uncompressed_size for i in range(row_group.num_columns)
        )
        require(
            size <= _MAX_COLUMN_BYTES,
            f"A column of a parquet row group must unpack to at most {_MAX_COLUMN_BYTES >> 30} GiB",
            f"row group {group} of {path} has {size >> 30}",
            "Write it with smaller row groups",
        )


def _documents(
    batches: Any, path: pathlib.Path, domain: str, fields: Fields
) -> Iterator[tuple[Document, bool]]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        for row in range(batch.num_rows):
            number += 1
            where = f"{path} row {number}"
            try:
                record = {
                    name: column[row].as_py()
                    for name, column in zip(names, batch.columns, strict=True)
                }
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"Text is read as UTF-8: {where} has the byte "
                    f"0x{error.object[error.start]:02x}. Write the file again from decoded text."
                ) from None
            yield document_of(record, where, domain, fields), False
