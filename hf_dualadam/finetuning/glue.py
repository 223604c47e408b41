"""The nine GLUE tasks, and any other text classification with one or two texts: arguments -> Task."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    TrainingArguments,
)

from . import data, labels
from .config import InputError
from .data import DataArguments
from .embedded import MINILM, resolve_model
from .exact_loss import ClassifierTrainer
from .metrics import COMBINED, LocalMetric, compute_metrics_for, majority_baseline
from .models import (
    ModelArguments,
    load_config,
    loading,
    model_builder,
    model_card_of_embedded,
    model_order,
    processor_source,
    set_labels,
)
from .tables import Table
from .tasks import Task, TaskKind

logger = logging.getLogger(__name__)

HUB = "nyu-mll/glue"
SPLITS = {"train": {"": "train"}, "validation": {"": "validation"}, "test": {"": "test"}}
# MNLI has held-out examples from the genres of the training data and from other genres.
MNLI_SPLITS = {
    "train": {"": "train"},
    "validation": {"": "validation_matched", "_mm": "validation_mismatched"},
    "test": {"": "test_matched", "_mm": "test_mismatched"},
}


class GlueTask(NamedTuple):
    """One task of one or two texts.

    Attributes:
        texts: the text columns.
        classes: class names by index; none for a regression.
        metrics: its metrics, keys of ``metrics.FUNCTIONS``; the first is the main one.
        score_range: lowest and highest score of a regression.
        hub: data set on the Hub; its configuration has the name of the task.
        splits: names of the splits, by the suffix of their metrics' names.
        combined: whether to add the mean of the metrics, as GLUE reports it.
    """

    texts: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    score_range: tuple[float, float] = (-math.inf, math.inf)
    hub: str = HUB
    splits: dict[str, dict[str, str]] = SPLITS
    combined: bool = True


TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), (), ("pearson", "spearmanr"), score_range=(0.0, 5.0)),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",), splits=MNLI_SPLITS
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}
# For regressions on user data. The script of Transformers reports only the squared error.
SCORE_METRICS = ("pearson", "spearmanr", "mse")


@dataclass
class GlueArguments(DataArguments):
    """Options for the task and its tokenization."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"A GLUE task: {', '.join(TASKS)}. Leave it out for other texts with a label column."},
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "One or two text columns, if there is no task_name; by default the first ones."},
    )
    label_column: str = field(default="label", metadata={"help": "Column of the classes or scores."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer; by default that of the model."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a fast tokenizer (tokenizers library)."})
    max_seq_length: int = field(default=128, metadata={"help": "Truncate longer token sequences."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length instead of the longest in the batch."}
    )

    def __post_init__(self):
        """Check names and ranges."""
        super().__post_init__()
        if self.task_name is not None:
            self.task_name = self.task_name.lower().replace("-", "")
            if self.task_name not in TASKS:
                raise InputError(f"task_name: {self.task_name!r} is not one of {', '.join(TASKS)}")
            if self.text_columns:
                raise InputError("text_columns: allowed only without task_name")
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise InputError(f"text_columns: {self.text_columns} should be one or two columns")
        if self.max_seq_length < 1:
            raise InputError(f"max_seq_length: {self.max_seq_length} is out of range; should be at least 1")

    @property
    def name(self) -> str:
        """Short name of the task for files and titles."""
        return self.task_name or (self.dataset_name or "text").rpartition("/")[2]


def build(
    args: GlueArguments,
    model_args: ModelArguments,
    *,
    training_args: TrainingArguments | None = None,
    splits: Iterable[str] = ("train", "validation"),
) -> Task:
    """Load, check and tokenize the examples; only caches are written.

    Args:
        args: the task and its data.
        model_args: the model; embedded/minilm when it names none.
        training_args: in half precision, batches are padded to a multiple of 8 tokens.
        splits: which of train, validation and test are needed.

    Raises:
        InputError: data or model cannot be loaded, or have unexpected contents.
    """
    if not (model_args.model_name_or_path or model_args.model_config or model_args.config_name):
        model_args = replace(model_args, model_name_or_path=MINILM)
    tables = _load_tables(args, model_args, splits)
    config = load_config(model_args)
    task = TASKS[args.task_name] if args.task_name else _infer_task(args, tables, config)
    classes = model_order(task.classes, config)
    tokenizer = _load_tokenizer(args, model_args, config)
    set_labels(config, classes)
    encode = partial(_encode, args=args, task=task, classes=classes, tokenizer=tokenizer, config=config)
    train = encode(tables["train"][""], limit=args.max_train_samples) if "train" in tables else None
    held_out = {suffix: encode(t, limit=args.max_eval_samples) for suffix, t in tables.get("validation", {}).items()}
    unseen = {suffix: encode(table, to_predict=True) for suffix, table in tables.get("test", {}).items()}
    metric = LocalMetric(list(task.metrics))
    half = training_args is not None and (training_args.fp16 or training_args.bf16)
    return Task(
        name=args.name,
        build_model=model_builder(model_args, config, AutoModelForSequenceClassification),
        train_dataset=train,
        eval_datasets=held_out,
        predict_datasets=unseen,
        compute_metrics=compute_metrics_for(metric, combined=task.combined),
        main_metric=task.metrics[0],
        metric_names=(*task.metrics, COMBINED) if task.combined and len(task.metrics) > 1 else task.metrics,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if half else None),
        processing_class=tokenizer,
        label_names=list(classes) or None,
        baseline=majority_baseline(metric, train, held_out.get("")),
        card=_card(args, model_args),
        trainer_cls=ClassifierTrainer,
    )


def _load_tables(
    args: GlueArguments, model_args: ModelArguments, splits: Iterable[str]
) -> dict[str, dict[str, Table]]:
    """Tables by split and by suffix of their metrics."""
    task = TASKS.get(args.task_name or "")
    names = {split: (task.splits if task else SPLITS)[split] for split in splits}
    wanted = [name for by_suffix in names.values() for name in by_suffix.values()]
    hub = (task.hub, args.task_name) if task else ("", None)
    from_hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    found = data.load_tables(args, dict.fromkeys([*wanted, *names]), hub, **from_hub)
    tables = {
        split: {suffix: found[name] for suffix, name in by_suffix.items() if name in found}
        or ({"": found[split]} if split in found else {})
        for split, by_suffix in names.items()
    }
    for split, by_suffix in tables.items():
        if not by_suffix:
            raise InputError(data.missing_split(args, names[split][""]))
    return tables


def _infer_task(args: GlueArguments, tables: dict[str, dict[str, Table]], config: PretrainedConfig) -> GlueTask:
    """The task without task_name: text columns by name or content, classes from data or model."""
    known = [table for by_suffix in tables.values() for table in by_suffix.values()]
    columns = args.text_columns or _text_columns(known[0], args.label_column)
    stored = next((t.class_names[args.label_column] for t in known if args.label_column in t.class_names), None)
    if stored:
        classes: list[str] | None = stored
    elif "train" in tables:
        classes = labels.infer_classes(tables["train"][""], args.label_column)
    elif config.problem_type == "regression" or config.num_labels == 1:
        classes = None
    else:
        classes = [config.id2label[index] for index in range(config.num_labels)]
    if classes is None:
        logger.info(f"{known[0].name}: column {args.label_column!r} holds numbers: training a regression")
        return GlueTask(tuple(columns), (), SCORE_METRICS, combined=False)
    logger.info(f"{known[0].name}: column {args.label_column!r}: {len(classes)} classes: {labels.listed(classes, 5)}")
    return GlueTask(tuple(columns), tuple(classes), ("accuracy",))


def _text_columns(table: Table, label_column: str) -> list[str]:
    """The usual text columns, or the first two that hold text; the choice is logged.

    Raises:
        InputError: no column holds text.
    """
    usual = [["sentence1", "sentence2"], ["sentence"], ["text"]]
    columns = next((names for names in usual if set(names) <= set(table.columns)), None)
    columns = columns or [
        name
        for name, values in table.columns.items()
        if name != label_column and isinstance(next(iter(values), None), str) and not _is_index(name, values)
    ]
    if not columns:
        raise InputError(f"{table.name}: has no text column; its columns are {', '.join(map(repr, table.columns))}")
    unused = [repr(name) for name in table.columns if name not in (*columns[:2], label_column)]
    note = f", not {', '.join(unused)}" if unused else ""
    logger.info(f"{table.name}: the texts are {' and '.join(map(repr, columns[:2]))}{note} (change with text_columns)")
    return columns[:2]


def _is_index(name: str, values: Sequence[Any]) -> bool:
    """Whether a column is an unnamed row index, as pandas writes it."""
    return not name.strip() or name.startswith("Unnamed: ") or labels.holds_numbers(values)


def _load_tokenizer(args: GlueArguments, model_args: ModelArguments, config: PretrainedConfig) -> Any:
    name = args.tokenizer_name or processor_source(model_args, "tokenizer_config.json")
    if name is None:
        raise InputError("tokenizer_name: required with model_config, since a new model has no tokenizer")
    option = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    with loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), use_fast=args.use_fast_tokenizer, **model_args.hub_kwargs
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{option}: {name!r} has {len(tokenizer)} tokens, but the model only {config.vocab_size}")
    return tokenizer


def _encode(
    table: Table,
    args: GlueArguments,
    task: GlueTask,
    classes: tuple[str, ...],
    tokenizer: Any,
    config: PretrainedConfig,
    *,
    limit: int | None = None,
    to_predict: bool = False,
) -> Dataset:
    """Tokens and, if there are any, labels in the model's order."""
    table.require(task.texts if to_predict else (*task.texts, args.label_column))
    columns: dict[str, list] = {f"text{index}": labels.texts(table, name) for index, name in enumerate(task.texts)}
    if task.classes:
        targets: Any = labels.class_labels(
            table, args.label_column, task.classes, optional=to_predict, numbered=args.task_name is not None
        )
        targets = targets and [classes.index(task.classes[label]) for label in targets]
    else:
        targets = labels.scores(table, args.label_column, *task.score_range, optional=to_predict)
    if targets is not None:
        columns["label"] = targets
    rows = Dataset.from_dict(columns)
    if to_predict:
        rows = rows.select(range(min(len(rows), args.max_predict_samples or len(rows))))
    else:
        rows = data.sample(rows, limit)
    text_columns = [name for name in columns if name != "label"]
    longest = min(args.max_seq_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**31))
    return rows.map(
        lambda batch: tokenizer(
            *(batch[name] for name in text_columns),
            padding="max_length" if args.pad_to_max_length else False,
            truncation=True,
            max_length=longest,
        ),
        batched=True,
        remove_columns=text_columns,
        desc=f"Tokenizing {table.name}",
    )


def _card(args: GlueArguments, model_args: ModelArguments) -> dict[str, Any]:
    card: dict[str, Any] = {"tasks": "text-classification"}
    if args.task_name:
        card |= {"language": "en", "dataset": f"GLUE {args.task_name.upper()}"}
        card |= {"dataset_tags": "glue", "dataset_args": args.task_name}
    elif args.dataset_name:
        card |= {"dataset": args.dataset_name}
    return card | model_card_of_embedded(model_args)


KIND = TaskKind((GlueArguments, ModelArguments), build)
