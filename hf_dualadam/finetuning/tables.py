"""Read parquet, csv, tsv, jsonl and json files strictly: nothing is guessed, merged or dropped silently.

Every message about a bad value names the file, the column or line, the row (from 0) and what is allowed.
"""

import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

from .config import InputError

logger = logging.getLogger(__name__)

# Names of a split's file, its parts or its folder.
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
EXTENSIONS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
LONGEST_FIELD = 2**31 - 1  # of csv and tsv, in characters
QUOTED_AS_IN_CSV = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


@dataclass
class Table:
    """The columns of one split as lists, with the name for error messages.

    Attributes:
        name: file, or split on the Hub.
        columns: values by column.
        class_names: class names of the columns stored as ``ClassLabel``.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    @classmethod
    def from_dataset(cls, dataset: Dataset, name: str) -> "Table":
        """All columns of a ``datasets.Dataset``."""
        return cls(
            name, {column: dataset[column][:] for column in dataset.column_names}, class_names(dataset.features)
        )

    def require(self, columns: Iterable[str]) -> None:
        """Raise InputError unless there are rows and all of ``columns``."""
        missing = [column for column in columns if column not in self.columns]
        if missing:
            shown = (repr(name) if name != name.strip() or not name else name for name in self.columns)
            names, there = " and ".join(map(repr, missing)), ", ".join(shown) or "none"
            blanks = [name for name in self.columns if name not in missing and name.strip() in missing]
            reason = f" ({blanks[0]!r} has blanks around its name)" if blanks else self._other_delimiter(missing)
            raise InputError(f"{self.name}: column {names} is missing; the columns are {there}{reason}")
        if not len(self):
            raise InputError(f"{self.name}: holds no rows")

    def _other_delimiter(self, missing: list[str]) -> str:
        """A hint if one column's name is the names of several, separated by another delimiter."""
        for name in self.columns:
            for character in ";\t,|":
                if len(self.columns) == 1 and set(missing) & {part.strip() for part in name.split(character)} - {name}:
                    return f" (the delimiter seems to be {character!r}; .csv needs commas, .tsv needs tabs)"
        return ""


def class_names(features: Features) -> dict[str, list[str]]:
    """Class names by column."""
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def read_table(path: Path) -> Table:
    """Read a parquet, csv, tsv, jsonl or json file.

    In csv and tsv files every value is text (``NA`` is a word, not a gap). In csv files, quotes enclose fields with
    commas, quotes or line breaks; tsv files have no quoting, like GLUE's. A json file holds a list of objects, or one
    object per line like a jsonl file.

    Raises:
        InputError: the file is missing, empty, of another format or unreadable, or has a duplicate column.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".parquet": _read_parquet,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".jsonl": _read_json,
        ".json": _read_json,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: has an unknown extension; should be one of {', '.join(readers)}")
    try:
        if path.is_file() and not path.stat().st_size:
            raise InputError(f"{path}: is empty")
        return readers[path.suffix.lower()](path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: should be UTF-8 text{_other_encoding(path)} ({error})") from error
    except (OSError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {error}") from error


def _other_encoding(path: Path) -> str:
    """What a file that is not UTF-8 text looks like, for messages."""
    with path.open("rb") as file:
        start = file.read(4)
    kinds = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "a zip archive"}
    return next((f", but is {kind}" for magic, kind in kinds.items() if start.startswith(magic)), "")


def _read_parquet(path: Path) -> Table:
    with pq.ParquetFile(path) as file:  # unlike pq.read_table, ignores words such as label=1 in the path
        table = file.read()
    _refuse_duplicates(table.column_names)
    annotated = b"huggingface" in (table.schema.metadata or {})
    names = class_names(Features.from_arrow_schema(table.schema)) if annotated else {}
    return Table(str(path), {column: table[column].to_pylist() for column in table.column_names}, names)


def _read_csv(path: Path) -> Table:
    return _read_rows(path, delimiter=",", strict=True)


def _read_tsv(path: Path) -> Table:
    table = _read_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    quoted = sum(bool(QUOTED_AS_IN_CSV.fullmatch(text)) for values in table.columns.values() for text in values)
    if quoted:
        logger.warning(
            f"{path}: {quoted} fields look quoted; tsv files have no quoting, so the quotes are part of the text"
        )
    return table


def _read_rows(path: Path, **dialect: Any) -> Table:
    rows: list[list[str]] = []
    blank = 0
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, **dialect)
            try:
                header = next(reader, [])
                for row in reader:
                    if row and len(row) != len(header):
                        raise ValueError(f"has {len(row)} fields, the header has {len(header)}")
                    blank += not row
                    rows += [row] if row else []
            except (csv.Error, ValueError) as error:
                if isinstance(error, UnicodeError):
                    raise
                raise ValueError(f"line {reader.line_num} {error}") from None
    finally:
        csv.field_size_limit(limit)
    _refuse_duplicates(header)
    if blank:
        logger.warning(f"{path}: skipped {blank} blank {'lines' if blank > 1 else 'line'}")
    return Table(str(path), {name: [row[index] for row in rows] for index, name in enumerate(header)})


def _read_json(path: Path) -> Table:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    content.decode()  # json would guess UTF-16, and name no position
    if path.suffix.lower() == ".json" and content.lstrip().startswith(b"["):
        rows = json.loads(content, object_pairs_hook=_unique_keys)
    else:
        # Not splitlines, which would split at a raw U+2028 within a string.
        lines = enumerate(content.split(b"\n"), 1)
        rows = [_json_line(line, number) for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row should be an object {...}")
    if b"\\u" in content:
        _refuse_half_characters(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names})


def _json_line(line: bytes, number: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_duplicates([key for key, _ in pairs], "key")
    return dict(pairs)


def _refuse_duplicates(names: Sequence[str], kind: str = "column") -> None:
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise ValueError(f"{kind} {twice!r} is duplicated")


def _refuse_half_characters(rows: list[dict[str, Any]]) -> None:
    """Refuse unpaired surrogates, which cannot be encoded."""
    for number, row in enumerate(rows):
        for name, value in row.items():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start : error.end]
                raise ValueError(f"column {name!a} holds an unpaired surrogate, {half!a}, in row {number}") from None


def find_split(folder: Path, split: str) -> list[Path]:
    """The file of a split in ``folder``, or its parts (``train-00000-of-00002.parquet``); empty if there are none.

    Raises:
        InputError: there are several files of the split, or some of its parts are missing.
    """
    found: dict[str, list[Path]] = {}
    for name in SPLIT_NAMES.get(split, (split,)):
        for extension in EXTENSIONS:
            start = "" if name == split else name
            whole = folder / f"{name}{extension}"
            if whole.is_file():
                found[start + extension] = [whole]
            pattern = re.compile(rf"{re.escape(name)}-(\d+)-of-(\d+){re.escape(extension)}")
            parts = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
            if parts:
                _check_parts(folder, [pattern.fullmatch(path.name).groups() for path in parts])
                found[f"parts {start}{extension}" if start + extension in found else start + extension] = parts
    if len(found) > 1:
        raise InputError(f"{folder}: holds {split} as {' and as '.join(found)}; keep one, or set {split}_file")
    return next(iter(found.values()), [])


def _check_parts(folder: Path, numbers: list[tuple[str, str]]) -> None:
    """Raise InputError unless the (part, count) pairs are all parts of one split."""
    counts = {int(count) for _, count in numbers}
    there = sorted(int(part) for part, _ in numbers)
    if len(counts) > 1:
        raise InputError(f"{folder}: holds parts of {' and of '.join(map(str, sorted(counts)))} files; keep one set")
    missing = sorted(set(range(*counts)) - set(there))
    if missing:
        raise InputError(f"{folder}: holds {len(there)} of {max(counts)} parts; part {missing[0]:05d} is missing")
    if len(there) != max(counts):
        raise InputError(f"{folder}: holds a duplicate part, or a part beyond the {max(counts)}")


def read_split(folder: Path, split: str) -> Table | None:
    """The table of a split in ``folder``, its parts concatenated, or None if there is no file.

    Raises:
        InputError: a file is unreadable, or the parts have different columns or classes.
    """
    tables = [read_table(path) for path in find_split(folder, split)]
    if not tables:
        return None
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns) or table.class_names != first.class_names:
            raise InputError(
                f"{table.name}: has other columns or classes than {first.name}: {', '.join(table.columns)}"
            )
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    return Table(first.name, columns, first.class_names)
