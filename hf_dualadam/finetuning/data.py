"""Where examples come from: files, a folder, an installed package or the hub, checked before anything is trained."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from .config import InputError
from .embedded import PREFIX, load_embedded
from .tables import EXTENSIONS, Table, read_split, read_table

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
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use at most N examples, a fixed random subset."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use at most N examples, a fixed random subset."}
    )
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use the first N examples."})
    overwrite_cache: bool = field(
        default=False, metadata={"help": "No effect: every run prepares its examples again."}
    )

    def __post_init__(self):
        """Check counts and paths."""
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is out of range, at least 1 is needed")
        for name in ("data_dir", "train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is not None and not (Path(path).is_dir() if name == "data_dir" else Path(path).exists()):
                raise InputError(f"{name}: no such {'folder' if name == 'data_dir' else 'file'}: {path}")
        if len(self.sources) > 1:
            raise InputError(f"{' and '.join(self.sources)}: give one of them as the source of the examples")

    @property
    def sources(self) -> list[str]:
        """The options given that name a source of examples; the files count as one."""
        return [*(name for name in ("dataset_name", "data_dir") if getattr(self, name)), *list(self.files_given)[:1]]

    @property
    def files_given(self) -> list[str]:
        """The options given that name single files."""
        return [f"{split}_file" for split in self.files]

    @property
    def files(self) -> dict[str, str]:
        """The files given one by one, by split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path}


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
    """An embedded data set, or one on the hub.

    Args:
        name: of the data set.
        config: its configuration.
        kwargs: for ``datasets.load_dataset``.

    Raises:
        InputError: it cannot be loaded.
    """
    if name.startswith(PREFIX):
        return load_embedded(name)
    if os.path.exists(name):  # datasets would guess splits and formats from the names in it
        raise InputError(f"dataset_name: {name} is on this machine; give data_dir or train_file, or the full hub name")
    try:
        return load_dataset(name, config, **kwargs)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"{name}: cannot be loaded: {reason}; without the hub, give data_dir") from error


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


def sample(dataset: Dataset, count: int | None) -> Dataset:
    """``count`` examples chosen at random, always the same ones, in their order; all of them if there are no more."""
    if count is None or count >= len(dataset):
        return dataset
    rows = np.random.default_rng(SAMPLE_SEED).permutation(len(dataset))[:count]
    return dataset.select(np.sort(rows))
