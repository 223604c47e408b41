"""Load examples from files, a folder, an installed package or the Hub, and check them before training."""

import logging
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

logger = logging.getLogger(__name__)

# Subsets and held-out splits are the same in every run; `seed` affects only training.
SAMPLE_SEED = 0


@dataclass
class DataArguments:
    """Options for the source and number of examples."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, or embedded/... from an installed package."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
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
                raise InputError(f"{name}: {getattr(self, name)} is out of range; should be at least 1")
        for name in ("data_dir", "train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is not None and not (Path(path).is_dir() if name == "data_dir" else Path(path).exists()):
                raise InputError(f"{name}: no such {'folder' if name == 'data_dir' else 'file'}: {path}")
        if len(self.sources) > 1:
            raise InputError(f"{' and '.join(self.sources)}: set only one source of examples")
        warn_of_same_source(self.files, "file")

    @property
    def sources(self) -> list[str]:
        """The given options that name a source of examples; files count as one source."""
        return [*(name for name in ("dataset_name", "data_dir") if getattr(self, name)), *list(self.files_given)[:1]]

    @property
    def files_given(self) -> list[str]:
        """The given options that name single files."""
        return [f"{split}_file" for split in self.files]

    @property
    def files(self) -> dict[str, str]:
        """The files given as options, by split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path}


def warn_of_same_source(paths: dict[str, str], kind: str) -> None:
    """Log a warning if training and held-out examples come from one file or folder.

    Args:
        paths: the files or folders by split.
        kind: ending of the options, "file" or "dir".
    """
    if {"train", "validation"} <= set(paths) and Path(paths["train"]).samefile(paths["validation"]):
        logger.warning(
            f"train_{kind} and validation_{kind}: both are {paths['train']}, so nothing is held out from training"
        )


def load_tables(
    args: DataArguments, splits: Iterable[str], hub: tuple[str, str | None], **kwargs: Any
) -> dict[str, Table]:
    """Load those of ``splits`` that exist, from the source that ``args`` name.

    Args:
        args: the source: files, a folder, an embedded data set, or the Hub.
        splits: names such as "train" or "validation_matched".
        hub: name and configuration on the Hub, used if ``args`` name no source.
        kwargs: for :func:`load_hub`.

    Raises:
        InputError: there is no source, or it cannot be read.
    """
    if args.files:
        return {split: read_table(Path(args.files[split])) for split in splits if split in args.files}
    if args.data_dir:
        tables = {split: read_split(Path(args.data_dir), split) for split in splits}
        return {split: table for split, table in tables.items() if table is not None}
    name, config = (args.dataset_name, args.dataset_config_name) if args.dataset_name else hub
    if not name:
        raise InputError("no examples: set task_name, data_dir, train_file and validation_file, or dataset_name")
    datasets = load_hub(name, config, **kwargs)
    source = args.dataset_name or f"{name}/{config}"
    return {split: Table.from_dataset(datasets[split], f"{source} {split}") for split in splits if split in datasets}


def load_hub(name: str, config: str | None = None, **kwargs: Any) -> DatasetDict:
    """Load an embedded data set, or one from the Hub.

    Args:
        name: of the data set.
        config: its configuration.
        kwargs: for ``datasets.load_dataset``.

    Raises:
        InputError: it cannot be loaded.
    """
    if name.startswith(PREFIX):
        return load_embedded(name)
    if os.path.exists(name):  # datasets would guess splits and formats from the names of files
        raise InputError(
            f"dataset_name: {name} is a local path; use data_dir or train_file for it, or the full name on the Hub"
        )
    try:
        return load_dataset(name, config, **kwargs)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"{name}: cannot be loaded: {reason}; to work without the Hub, set data_dir") from error


def missing_split(args: DataArguments, split: str) -> str:
    """The error message about a missing split."""
    if args.files:
        kind = split.partition("_")[0]
        return f"no {split} examples: {kind}_file is missing (given: {', '.join(f'{s}_file' for s in args.files)})"
    if args.data_dir:
        held = ", ".join(sorted(path.name for path in Path(args.data_dir).iterdir())[:20]) or "nothing"
        files = " or ".join(split + extension for extension in EXTENSIONS)
        return f"{args.data_dir}: holds no {split} file ({files}); it holds {held}"
    return f"{args.dataset_name or 'the data set'}: has no split {split!r}"


def sample(dataset: Dataset, count: int | None) -> Dataset:
    """A fixed random subset of at most ``count`` examples, in their original order."""
    if count is None or count >= len(dataset):
        return dataset
    rows = np.random.default_rng(SAMPLE_SEED).permutation(len(dataset))[:count]
    return dataset.select(np.sort(rows))
