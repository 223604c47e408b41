"""Examples from the hub, from local files or from installed packages, checked before anything is trained.

Every message about a bad value names the file (or hub split), the column, the row and what is allowed.
"""

import csv
import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from datasets.exceptions import DatasetsError

from .config import InputError
from .embedded import PREFIX, load_embedded

EXTENSIONS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
UNLABELLED = -1
# Subsets and carved-out splits are the same in every run: `seed` is for training.
SAMPLE_SEED = 0


@dataclass
class DataArguments:
    """Where the examples come from and how many are used."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the hub, or one of an installed package: embedded/..."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with train, validation and test files: .parquet, .csv, .tsv, .jsonl or .json."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training examples, instead of data_dir."})
    validation_file: str | None = field(default=None, metadata={"help": "Held-out examples, instead of data_dir."})
    test_file: str | None = field(default=None, metadata={"help": "Examples to predict, instead of data_dir."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many, chosen at random once."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many, chosen at random once."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})

    def __post_init__(self):
        """Check counts and paths."""
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is out of range, at least 1 is needed")
        for name in ("data_dir", "train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is not None and not (Path(path).is_dir() if name == "data_dir" else Path(path).exists()):
                raise InputError(f"{name}: no such {'folder' if name == 'data_dir' else 'file'}: {path}")

    @property
    def files(self) -> dict[str, str]:
        """The files given one by one, by split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path}


@dataclass
class Table:
    """The columns of one split, as plain lists, with the name that error messages use.

    Attributes:
        name: file or hub split.
        columns: values by column.
        class_names: of the columns that are stored as ``ClassLabel``.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the rows."""
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
            names, there = " and ".join(map(repr, missing)), ", ".join(self.columns) or "none"
            raise InputError(f"{self.name}: column {names} is missing; there are {there}")
        if not len(self):
            raise InputError(f"{self.name}: holds no rows")


def class_names(features: Features) -> dict[str, list[str]]:
    """Names of the classes, by column."""
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def read_table(path: Path) -> Table:
    """Read a parquet, csv, tsv, jsonl or json file.

    In csv and tsv files every value is text (``NA`` is a word, not a gap); json files hold a list of objects.

    Raises:
        InputError: the file is missing, of another kind or unreadable.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".parquet": _read_parquet,
        ".csv": _read_separated,
        ".tsv": _read_separated,
        ".jsonl": _read_json,
        ".json": _read_json,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: is of an unknown kind, {', '.join(readers)} are known")
    try:
        return readers[path.suffix.lower()](path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _read_parquet(path: Path) -> Table:
    table = pq.read_table(path)
    annotated = b"huggingface" in (table.schema.metadata or {})
    names = class_names(Features.from_arrow_schema(table.schema)) if annotated else {}
    return Table(str(path), {column: table[column].to_pylist() for column in table.column_names}, names)


def _read_separated(path: Path) -> Table:
    """With quotes around what holds a separator; a tsv file that breaks that rule is read with quotes as letters."""
    if path.suffix.lower() == ".csv":
        return _read_rows(path, delimiter=",", strict=True)
    try:
        return _read_rows(path, delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return _read_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_rows(path: Path, **dialect: Any) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, **dialect)
        header = next(reader, [])
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header has {len(header)}")
            if row:
                rows.append(row)
    return Table(str(path), {name: [row[index] for row in rows] for index, name in enumerate(header)})


def _read_json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row should be an object {...}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names})


def find_split(folder: Path, split: str) -> list[Path]:
    """The file of a split in ``folder``, or its parts (``train-00000-of-00002.parquet``); empty if there is none.

    Raises:
        InputError: the split is there in several formats.
    """
    found = {
        extension: files
        for extension in EXTENSIONS
        if (files := [folder / f"{split}{extension}"])
        and files[0].is_file()
        or (files := sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*{extension}")))
    }
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds {split} as {' and as '.join(found)}; keep one, or name it with {split}_file"
        )
    return next(iter(found.values()), [])


def read_split(folder: Path, split: str) -> Table | None:
    """The table of a split in ``folder``, its parts put together, or None if there is no such file."""
    tables = [read_table(path) for path in find_split(folder, split)]
    if not tables:
        return None
    first = tables[0]
    for table in tables[1:]:
        table.require(first.columns)
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    return Table(first.name, columns, first.class_names)


def load_tables(
    args: DataArguments, splits: Iterable[str], hub: tuple[str, str | None], **kwargs: Any
) -> dict[str, Table]:
    """Those of ``splits`` that are there, from the source that ``args`` name.

    Args:
        args: where to look: files, a folder, an embedded set, or the hub.
        splits: names such as "train" or "validation_matched".
        hub: name and configuration on the hub when ``args`` name no source.
        kwargs: for :func:`load_hub`.

    Raises:
        InputError: no source, or a source that cannot be read.
    """
    if args.files:
        return {split: read_table(Path(args.files[split])) for split in splits if split in args.files}
    if args.data_dir:
        tables = {split: read_split(Path(args.data_dir), split) for split in splits}
        return {split: table for split, table in tables.items() if table is not None}
    name, config = (args.dataset_name, args.dataset_config_name) if args.dataset_name else hub
    if not name:
        raise InputError("no examples: give task_name, data_dir, train_file and validation_file, or dataset_name")
    datasets = load_hub(name, config, **kwargs)
    source = args.dataset_name or f"{name}/{config}"
    return {split: Table.from_dataset(datasets[split], f"{source} {split}") for split in splits if split in datasets}


def load_hub(name: str, config: str | None = None, **kwargs: Any) -> DatasetDict:
    """An embedded data set, one on the hub, or what a loader of ``datasets`` ("imagefolder") makes of local files.

    Args:
        name: of the data set or loader.
        config: its configuration.
        kwargs: for ``datasets.load_dataset``.

    Raises:
        InputError: it cannot be loaded.
    """
    if name.startswith(PREFIX):
        return load_embedded(name)
    try:
        return load_dataset(name, config, **kwargs)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        files = kwargs.get("data_files", kwargs.get("data_dir"))
        advice = "" if files else "; without the hub, give data_dir"
        raise InputError(f"{files or name}: cannot be loaded: {reason}{advice}") from error


def missing_split(args: DataArguments, split: str) -> str:
    """The message about a split that the source lacks."""
    if args.files:
        kind = split.partition("_")[0]
        return f"no {split} examples: {kind}_file is missing (given: {', '.join(f'{s}_file' for s in args.files)})"
    if args.data_dir:
        held = ", ".join(sorted(path.name for path in Path(args.data_dir).iterdir())[:20]) or "nothing"
        files = " or ".join(split + extension for extension in EXTENSIONS)
        return f"{args.data_dir}: holds no {split} file ({files}); it holds {held}"
    return f"{args.dataset_name or 'the data set'}: has no split {split!r}"


def infer_classes(table: Table, column: str) -> list[str]:
    """Class names from the values of a label column: whole numbers from 0 on, or the texts in their order.

    Raises:
        InputError: the column is missing, or holds gaps, fractions or only one class.
    """
    table.require([column])
    values = list(table.columns[column])
    indices = [_class_index(value, dict.fromkeys(range(len(values)))) for value in values]
    if None not in indices:
        names = [str(index) for index in range(max(indices) + 1)]
    elif all(isinstance(value, str) and value.strip() for value in values):
        names = sorted({value.strip() for value in values})
    else:
        numbers_only = any(index is not None for index in indices)
        named = [
            index if numbers_only else (v if isinstance(v, str) and v.strip() else None)
            for index, v in zip(indices, values, strict=True)
        ]
        raise InputError(_unexpected(table, column, values, named, "class names, or whole numbers from 0 on"))
    if len(names) < 2:
        raise InputError(f"{table.name}: column {column!r} holds only one class, {values[0]!r}")
    return names


def texts(table: Table, column: str) -> list[str]:
    """The text column ``column``; InputError if something in it is not text."""
    for row, value in enumerate(table.columns[column]):
        if not isinstance(value, str):
            raise InputError(f"{table.name}: column {column!r} holds {value!r} in row {row}, text is needed")
    return list(table.columns[column])


def class_labels(table: Table, column: str, names: Sequence[str], *, optional: bool = False) -> list[int] | None:
    """The class indices in ``column``, written there as whole numbers or as class names.

    Args:
        table: the split.
        column: its label column.
        names: class names by index; compared without regard to case.
        optional: for examples to predict: without the column, or with nothing but -1 and gaps in it, return None.

    Raises:
        InputError: a value is something else, names file, column, row, value and what is allowed.
    """
    values = list(table.columns.get(column, ()))
    stored = table.class_names.get(column, [])
    if stored and {*map(_key, stored)} <= {*map(_key, names)}:
        values = [stored[value] if isinstance(value, int) and 0 <= value < len(stored) else value for value in values]
    if optional and all(_is_gap(value) for value in values):
        return None
    index = {_key(name): number for number, name in enumerate(names)}
    indices = [_class_index(value, index) for value in values]
    if None in indices:
        allowed = f"0 to {len(names) - 1} or {', '.join(names)}" if len(names) > 1 else f"0 or {names[0]}"
        raise InputError(_unexpected(table, column, values, indices, allowed))
    return indices


def scores(table: Table, column: str, low: float, high: float, *, optional: bool = False) -> list[float] | None:
    """The real numbers in ``column``, between ``low`` and ``high``; the rest as in :func:`class_labels`."""
    values = list(table.columns.get(column, ()))
    if optional and all(_is_gap(value) for value in values):
        return None
    parsed = [_finite(value) for value in values]
    parsed = [value if value is not None and low <= value <= high else None for value in parsed]
    if None in parsed:
        raise InputError(_unexpected(table, column, values, parsed, f"numbers from {low:g} to {high:g}"))
    return parsed


def sample(dataset: Dataset, count: int | None) -> Dataset:
    """``count`` examples chosen at random, always the same ones, in their order; all of them if there are no more."""
    if count is None or count >= len(dataset):
        return dataset
    rows = np.random.default_rng(SAMPLE_SEED).permutation(len(dataset))[:count]
    return dataset.select(np.sort(rows))


def _unexpected(table: Table, column: str, values: list, parsed: list, allowed: str) -> str:
    bad = [row for row, value in enumerate(parsed) if value is None]
    more = f" ({len(bad)} rows hold such values)" if len(bad) > 1 else ""
    return (
        f"{table.name}: column {column!r} holds the unexpected value {values[bad[0]]!r} in row {bad[0]}{more}; "
        f"allowed: {allowed}"
    )


def _key(name: str) -> str:
    return str(name).strip().lower()


def _is_gap(value: Any) -> bool:
    return (
        value is None
        or value == ""
        or _finite(value) == UNLABELLED
        or (isinstance(value, float) and math.isnan(value))
    )


def _finite(value: Any) -> float | None:
    """A number, or text that reads as one; None for everything else, for NaN and for infinity."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _class_index(value: Any, index: dict[str, int]) -> int | None:
    if isinstance(value, str) and _key(value) in index:
        return index[_key(value)]
    number = _finite(value)
    return int(number) if number is not None and number.is_integer() and 0 <= number < len(index) else None
