"""Trains and evaluates one task with one optimizer: the same code for the scripts and for comparisons.

``run(task, args)`` is all there is to it. A comparison builds a :class:`Task` once and calls ``run`` for every
optimizer, learning rate and seed with other ``TrainingArguments``; the trained model and the data stay within reach.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..trainer import OPTIMIZERS
from .config import InputError
from .plots import plot_learning_curves

logger = logging.getLogger(__name__)

# Prefix of the metrics measured on training examples after training. Trainer's own `train_loss` is something else: the
# mean over all steps of the run, with dropout and augmentation on.
TRAIN_EVAL = "train_eval"
RUN_FILES = ("checkpoint-*", "*_results.json", "predict_results_*.txt", "trainer_state.json", "training_args.bin")
RUN_FILES += ("model*.safetensors", "pytorch_model*.bin", "adapter_model*", "learning_curves.png")


@dataclass
class Task:
    """What is to be learned, whatever the optimizer: data, model and metric.

    Attributes:
        name: short name, used in file names: "sst2".
        build_model: returns a new model; what is random in it comes from torch's global generator.
        train_dataset: training examples (a ``datasets.Dataset`` with a label column, free to be subset or changed),
            or None without training.
        eval_datasets: held-out examples by suffix of their metrics' names: ``{"": ...}``, for MNLI
            ``{"": matched, "_mm": mismatched}``.
        predict_datasets: examples to predict, by suffix, with labels or without.
        compute_metrics: Trainer's: an EvalPrediction -> metrics by name.
        main_metric: the metric that plots and tables show.
        data_collator: Trainer's.
        processing_class: the tokenizer or image processor saved with the model.
        train_view: what Trainer trains on, from ``train_dataset`` (augmentation); the dataset itself by default.
        eval_view: what Trainer evaluates on, from any of the datasets; the dataset itself by default.
        label_names: class names by index, or None for a regression.
        baseline: value of ``main_metric`` on the held-out examples when always predicting the majority class.
        card: arguments of ``Trainer.create_model_card``.
    """

    name: str
    build_model: Callable[[], PreTrainedModel]
    train_dataset: Any
    eval_datasets: dict[str, Any]
    compute_metrics: Callable[[Any], dict[str, float]]
    main_metric: str
    predict_datasets: dict[str, Any] = field(default_factory=dict)
    data_collator: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None
    processing_class: Any = None
    train_view: Callable[[Any], Any] = lambda dataset: dataset
    eval_view: Callable[[Any], Any] = lambda dataset: dataset
    label_names: list[str] | None = None
    baseline: float | None = None
    card: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunArguments:
    """Options of the scripts about the run as a whole."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that output_dir holds; without it such a folder is refused."}
    )


@dataclass
class Run:
    """A finished run.

    Attributes:
        metrics: everything that all_results.json holds.
        trainer: with the trained ``model``, the ``optimizer`` and ``state.log_history``.
        task: what was run.
    """

    metrics: dict[str, float]
    trainer: Trainer
    task: Task


def run(
    task: Task,
    args: TrainingArguments,
    *,
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    trainer_cls: type[Trainer] = Trainer,
    overwrite_output_dir: bool = False,
    write: bool = True,
) -> Run:
    """Train, evaluate and predict as ``args.do_train``, ``do_eval`` and ``do_predict`` say.

    The metrics are Trainer's (``train_*``, ``eval_*``) and, when both training and held-out data are there,
    ``train_eval_*``: the same measures on a fixed random choice of training examples, at most as many as held-out
    ones, without augmentation; ``generalization_gap_loss`` = eval_loss - train_eval_loss; and
    ``generalization_gap_<metric>`` = train_eval_<metric> - eval_<metric>.

    Args:
        task: data, model and metric.
        args: Trainer's arguments; ``args.seed`` also seeds the model's new weights.
        optimizer_cls_and_kwargs: an optimizer that has no name in ``args.optim``.
        callbacks: further callbacks for Trainer.
        trainer_cls: Trainer or a subclass.
        overwrite_output_dir: remove the run that ``args.output_dir`` holds, just before training starts.
        write: leave model, metrics files, learning curves, model card and predictions in ``args.output_dir``. Without,
            only what ``args.save_strategy`` asks for.

    Raises:
        InputError: the output folder holds another run, or there is nothing to resume from.
    """
    checkpoint = check_output_dir(args, overwrite_output_dir)
    set_seed(args.seed)
    train_dataset = task.train_view(task.train_dataset) if args.do_train else None
    eval_datasets = {suffix: task.eval_view(dataset) for suffix, dataset in task.eval_datasets.items()}
    trainer = trainer_cls(
        model=task.build_model(),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=next(iter(eval_datasets.values()), None),
        data_collator=task.data_collator,
        processing_class=task.processing_class,
        compute_metrics=task.compute_metrics,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )
    if overwrite_output_dir and checkpoint is None:
        with args.main_process_first(local=False):
            _remove_run(Path(args.output_dir))
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics["train_samples"] = len(train_dataset)
        if write:
            trainer.save_model()
            trainer.save_state()
    if args.do_eval:
        metrics |= evaluate_generalization(trainer, task, eval_datasets, with_train=args.do_train)
    if write:
        for split in ("train", "eval"):
            _save_metrics(trainer, split, metrics)
    if args.do_predict:
        metrics |= predict(trainer, task, write)
    if write and args.do_train and trainer.is_world_process_zero():
        plot_learning_curves(
            trainer.state.log_history, task.main_metric, Path(args.output_dir) / "learning_curves.png", task.name
        )
    if write and args.do_train:
        _write_card(trainer, task)
    return Run(metrics, trainer, task)
