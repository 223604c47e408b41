"""Tasks to train on (:class:`Task`), and :data:`KINDS`, the registry of kinds of task.

A kind is a name, the dataclasses of its options, and a function that builds a task from them. The scripts,
comparisons and ``measure_sharpness.py`` take every kind from here, so a new one is a module with a :class:`TaskKind`
named ``KIND`` and one entry in :data:`KINDS`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .config import InputError


def unchanged(dataset: Any) -> Any:
    """Return the dataset as it is: the view of a task whose trainer reads the dataset directly."""
    return dataset


@dataclass
class Task:
    """What to learn, independent of the optimizer: data, model and metric.

    Attributes:
        name: short name, used in file names: "sst2".
        build_model: returns a new model; its random weights come from torch's global generator. With
            ``trained=True`` it raises InputError if the checkpoint lacks some weights (a head for this task).
        train_dataset: training examples (a ``datasets.Dataset`` with a label column, which may be subset or changed),
            or None without training.
        eval_datasets: held-out examples by suffix of their metrics' names: ``{"": ...}``, for MNLI
            ``{"": matched, "_mm": mismatched}``.
        predict_datasets: examples to predict, by suffix, with labels or without.
        compute_metrics: Trainer's: maps an EvalPrediction to metrics by name.
        main_metric: the metric that plots and tables show.
        metric_names: all metrics, if there are more than the loss and ``main_metric``.
        greater_is_better: whether higher values of ``main_metric`` are better.
        data_collator: Trainer's.
        processing_class: the tokenizer or image processor saved with the model.
        train_view: converts ``train_dataset`` to what Trainer trains on; by default the dataset itself.
        augments: whether ``train_view`` augments the examples at random.
        eval_view: converts any of the datasets to what Trainer evaluates; by default the dataset itself.
        label_names: class names by index, or None for a regression or a language model.
        baseline: ``main_metric`` on the held-out examples when the majority class is always predicted.
        card: arguments of ``Trainer.create_model_card``.
        trainer_cls: the Trainer that the task needs.
        trainer_kwargs: further arguments of that class.
    """

    name: str
    build_model: Callable[..., PreTrainedModel]
    train_dataset: Any
    eval_datasets: dict[str, Any]
    compute_metrics: Callable[[Any], dict[str, float]] | None
    main_metric: str
    metric_names: tuple[str, ...] = ()
    greater_is_better: bool = True
    predict_datasets: dict[str, Any] = field(default_factory=dict)
    data_collator: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None
    processing_class: Any = None
    train_view: Callable[[Any], Any] = unchanged
    augments: bool = False
    eval_view: Callable[[Any], Any] = unchanged
    label_names: list[str] | None = None
    baseline: float | None = None
    card: dict[str, Any] = field(default_factory=dict)
    trainer_cls: type[Trainer] = Trainer
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        argument_classes: dataclasses of its options, including those of the model.
        build: ``build(*arguments, training_args=..., splits=...) -> Task``, with one instance of each of
            ``argument_classes`` in that order, TrainingArguments, and the names of the splits needed ("train",
            "validation", "test"). Raises InputError for data or models that cannot be used; writes only caches.
        training_arguments: TrainingArguments, or the subclass that its Trainer takes.
    """

    argument_classes: tuple[type, ...]
    build: Callable[..., Task]
    training_arguments: type[TrainingArguments] = TrainingArguments


# The kind by name, or the module that defines it as ``KIND``, imported when it is used (clm needs TRL).
KINDS: dict[str, TaskKind | str] = {
    "glue": "hf_dualadam.finetuning.glue",
    "image_classification": "hf_dualadam.finetuning.images",
    "clm": "hf_dualadam.finetuning.clm",
}


def task_kind(name: str) -> TaskKind:
    """Look up a kind of task by name.

    Raises:
        InputError: there is no such kind, or a package that it needs is missing.
    """
    if name not in KINDS:
        raise InputError(f"{name!r} is not a kind of task; should be one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if isinstance(kind, TaskKind):
        return kind
    try:
        return importlib.import_module(kind).KIND
    except ImportError as error:
        raise InputError(f'{name}: {error}: pip install "hf_dualadam[clm]"') from error
