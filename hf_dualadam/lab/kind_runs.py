"""Execute runs of a kind of task in this process: train with one optimizer, evaluate, measure sharpness."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..finetuning.config import InputError, from_values
from ..finetuning.tasks import Task, task_kind
from ..finetuning.training import run
from .comparison import COLUMNS, SHARE_POINTS, Comparison, RunSpec, TaskSetting
from .metric import Metric
from .sharpness import measure_sharpness

# The selection split and the noisy labels are the same in all runs. The seed of the labels differs from the
# seed (0) of the training examples that are scored after training, which would otherwise be the noisy ones.
SPLIT_SEED, NOISE_SEED = 0, 1
CURVE_POINTS = 12
EVALUATIONS = 5  # on the selection split during a final run, for the curves


class KindRuns:
    """Executes the runs of one task, which is loaded once.

    Args:
        name: name of the task.
        comparison: the comparison.
        data_root: folder to which ``data_dir`` is relative.

    Raises:
        InputError: the task cannot be loaded.
    """

    def __init__(self, name: str, comparison: Comparison, data_root: Path = Path()):
        self.comparison, self.setting = comparison, comparison.tasks[name]
        try:
            self.task, self.selection, self.arguments = _load_task(self.setting, data_root)
        except InputError as error:
            raise InputError(f"tasks.{name}: {error}") from None
        self.metric = Metric(self.task.main_metric, self.task.greater_is_better)
        held_out = next(iter(self.task.eval_datasets.values()))
        examples = {"train": self.task.train_dataset, "selection": self.selection, "heldout": held_out}
        self.facts: dict[str, Any] = {f"{split}_examples": len(rows) for split, rows in examples.items()}
        self.facts |= {"majority": self.task.baseline, "shares_selection": False}

    def run(self, spec: RunSpec, row: dict[str, Any], curves: list[dict[str, float]]) -> None:
        """Execute one run.

        Args:
            spec: the run.
            row: receives the results.
            curves: receives the logged values.
        """
        optimizer = self.comparison.optimizers[spec.optimizer]
        final = spec.role == "final"
        # The first data set is also evaluated during training, for the curves; it is never the held-out one.
        splits = {"_selection": self.selection, **(self.task.eval_datasets if final else {})}
        recorder = Recorder(row["steps"], self.metric.name, curves)
        with tempfile.TemporaryDirectory() as folder, _PeakMemory() as memory:
            args = _training_arguments(
                task_kind(self.setting.script).training_arguments,
                self.arguments,
                row["steps"],
                final=final,
                output_dir=folder,
                seed=spec.seed,
                **optimizer.training_arguments(spec.learning_rate),
            )
            finished = run(
                dataclasses.replace(self.task, eval_datasets=splits),
                args,
                optimizer_cls_and_kwargs=optimizer.optimizer_cls_and_kwargs(spec.learning_rate),
                callbacks=[recorder],
                trainer_cls=optimizer.trainer_cls(),
                write=False,
                print_logs=False,
            )
        row |= _scores(finished.metrics, self.metric, final) | recorder.shares()
        row |= {"seconds": finished.metrics["train_runtime"], "peak_memory_mb": memory.peak / 2**20}
        losses = [row[name] for name in ("selection_loss", "heldout_loss", "train_loss") if row[name] is not None]
        row["status"] = "ok" if not recorder.diverged and all(map(math.isfinite, losses)) else "diverged"
        if final and row["status"] == "ok" and self.comparison.sharpness.examples:
            row |= self._sharpness(finished.trainer)

    def _sharpness(self, trainer: Trainer) -> dict[str, float]:
        setting = self.comparison.sharpness
        examples = self.task.train_dataset.select(range(min(setting.examples, len(self.task.train_dataset))))
        measured = measure_sharpness(
            trainer.model,
            list(trainer.get_eval_dataloader(self.task.eval_view(examples))),
            rho=setting.rho,
            lanczos_steps=setting.lanczos_steps,
            trace_samples=setting.trace_samples,
        )
        return {name: getattr(measured, name) for name in COLUMNS if name in measured._fields}


class Recorder(TrainerCallback):
    """Logs at fixed points of the run, records the curves and stops a run that has diverged.

    Args:
        steps: planned optimizer steps.
        metric: evaluation metric to record.
        curves: list that receives the logged values, one dict per step.
    """

    def __init__(self, steps: int, metric: str, curves: list[dict[str, float]]):
        self.curves, self.diverged, self._training = curves, False, True
        self.share_steps = {name: max(1, round(share * steps)) for name, share in SHARE_POINTS.items()}
        self.log_steps = {1, *self.share_steps.values()}
        self.log_steps |= {max(1, round(steps * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)}
        # Trainer's names -> columns of CURVE_COLUMNS
        self.kept = {name: name for name in ("loss", "alpha", "inverse_share")}
        self.kept |= {"eval_loss": "selection_loss", f"eval_{metric}": "selection_metric"}

    def on_step_end(self, args, state, control, **kwargs):
        """Request a log at the points of this run."""
        control.should_log = state.global_step in self.log_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Record the values; stop on a non-finite loss or gradient."""
        logged = {ours: logs[theirs] for theirs, ours in self.kept.items() if logs.get(theirs) is not None}
        if not self._training or not logged:
            return
        if not math.isfinite(logs.get("loss", 0.0)) or not math.isfinite(logs.get("grad_norm", 0.0)):
            self.diverged = control.should_training_stop = True
            return
        self.curves.append(
            {"step": state.global_step} | {name: float(f"{value:.5g}") for name, value in logged.items()}
        )

    def on_train_end(self, args, state, control, **kwargs):
        """Exclude the evaluations after training from the curves."""
        self._training = False

    def shares(self) -> dict[str, float]:
        """The inverse share at the points of :data:`SHARE_POINTS`, if the optimizer has one."""
        logged = {point["step"]: point["inverse_share"] for point in self.curves if "inverse_share" in point}
        return {name: logged[step] for name, step in self.share_steps.items() if step in logged}


class _PeakMemory:
    """Peak memory of this process within the context, in bytes: allocated on the GPU, otherwise resident."""

    def __enter__(self) -> _PeakMemory:
        self.peak, self._stop = 0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.is_set():
            self.peak = max(self.peak, process.memory_info().rss)
            self._stop.wait(0.1)

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()


def _load_task(setting: TaskSetting, data_root: Path) -> tuple[Task, Dataset, dict[str, Any]]:
    """The task with noisy training labels, its selection split, and values for TrainingArguments."""
    kind = task_kind(setting.script)
    values = dict(setting.arguments)
    if values.get("data_dir"):
        values["data_dir"] = str(data_root / values["data_dir"])
    names = {field.name for cls in kind.argument_classes for field in dataclasses.fields(cls)}
    own = {name: value for name, value in values.items() if name in names}
    training = {name: value for name, value in values.items() if name not in names}
    # Report errors in any argument now, not in the first run.
    training_args = _training_arguments(kind.training_arguments, training, 1, final=True, output_dir="unused")
    task = kind.build(*from_values(kind.argument_classes, own, defaults=lambda given: {}), training_args=training_args)
    task, selection = _carve(task, setting)
    if task.trainer_cls is Trainer:  # other trainers prepare the examples
        eval_view, train_view = _in_memory(task.eval_view), _in_memory(task.train_view)
        if task.augments:  # only the augmentation is repeated in each epoch
            decoded, augment = _in_memory(lambda dataset: dataset), task.train_view
            train_view = lambda dataset: augment(decoded(dataset))  # noqa: E731
        task = dataclasses.replace(task, eval_view=eval_view, train_view=train_view)
    return task, selection, training


def _in_memory(view: Callable[[Any], Any]) -> Callable[[Dataset], list[Any]]:
    """The same view of a data set, decoded once for all runs."""
    kept: dict[str, list[Any]] = {}

    def look(dataset: Dataset) -> list[Any]:
        if dataset._fingerprint not in kept:
            kept[dataset._fingerprint] = list(view(dataset))
        return kept[dataset._fingerprint]

    return look


def _carve(task: Task, setting: TaskSetting) -> tuple[Task, Dataset]:
    """Set the selection split aside, then replace a fraction of the remaining labels by random classes."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(task.train_dataset))
    size = round(setting.selection_fraction * len(order))
    if not 0 < size < len(order):
        raise InputError(f"selection_fraction: {setting.selection_fraction} of {len(order)} examples leaves no split")
    selection, train = task.train_dataset.select(order[:size]), task.train_dataset.select(order[size:])
    if setting.label_noise:
        train = randomize_labels(train, setting.label_noise, len(task.label_names or ()))
    return dataclasses.replace(task, train_dataset=train), selection


def randomize_labels(dataset: Dataset, share: float, classes: int) -> Dataset:
    """Replace a fraction of the labels by random classes (possibly the right one), the same in every call.

    Args:
        dataset: a data set with a label column.
        share: the fraction, in [0, 1].
        classes: number of classes.

    Raises:
        InputError: there are no classes (a regression).
    """
    if not classes:
        raise InputError(f"label_noise: {share} - should be 0 for a task without classes")
    column = "labels" if "labels" in dataset.column_names else "label"
    generator = np.random.default_rng(NOISE_SEED)
    labels = np.array(dataset[column])
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = generator.integers(classes, size=len(chosen))
    feature = dataset.features[column]
    return dataset.remove_columns(column).add_column(column, labels.tolist()).cast_column(column, feature)


def _training_arguments(
    cls: type[TrainingArguments], values: dict[str, Any], steps: int, *, final: bool, **fixed: Any
) -> TrainingArguments:
    """The task's values for TrainingArguments, and those set by the comparison."""
    (args,) = from_values(
        (cls,),
        values
        | {
            "max_steps": steps,
            "do_train": True,
            "do_eval": True,
            "logging_strategy": "no",  # the Recorder requests logs
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "eval_strategy": "steps" if final else "no",
            "eval_steps": max(1, steps // EVALUATIONS),
        }
        | fixed,
        defaults=lambda given: {} if cls is TrainingArguments else _plain_training(cls),
    )
    return args


def _plain_training(cls: type[TrainingArguments]) -> dict[str, bool]:
    """Disable TRL's defaults for large models on GPUs; Transformers has renamed one of the options."""
    names = {field.name for field in dataclasses.fields(cls)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {"bf16": False, checkpointing: False}


def _scores(metrics: dict[str, float], metric: Metric, final: bool) -> dict[str, float]:
    """Metrics and losses of the row, from those of the run."""
    scores = {
        "selection_metric": metrics[f"eval_{metric.name}_selection"],
        "selection_loss": metrics["eval_loss_selection"],
        "train_metric": metrics[f"train_eval_{metric.name}"],
        "train_loss": metrics["train_eval_loss"],
    }
    if final:
        scores |= {"heldout_metric": metrics[f"eval_{metric.name}"], "heldout_loss": metrics["eval_loss"]}
        scores["gap_metric"] = metric.sign * (scores["train_metric"] - scores["heldout_metric"])
        scores["gap_loss"] = scores["heldout_loss"] - scores["train_loss"]
    return scores
