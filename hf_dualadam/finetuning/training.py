"""Trains and evaluates one task with one optimizer: the same code for the scripts and for comparisons.

``run(task, args)`` is all there is to it. A comparison builds a :class:`Task` once and calls ``run`` for every
optimizer, learning rate and seed with other ``TrainingArguments``; the trained model and the data stay within reach.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..trainer.checkpoints import TRAINER_STATE, checkpoint_problem, last_complete_checkpoint
from ..trainer.nonfinite import StopOnNonFinite
from .config import InputError
from .plots import plot_learning_curves

# Prefix of the metrics measured on training examples after training. Trainer's own `train_loss` is something else: the
# mean over all steps of the run, with dropout and augmentation on.
TRAIN_EVAL = "train_eval"
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
RUN_FILES = ("checkpoint-*", "*_results.json", "predict_results_*.txt", TRAINER_STATE, "training_args.bin")
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
    stop_on_nonfinite: bool = field(
        default=False,
        metadata={"help": "Stop before a step whose gradient is not finite, and name the parameters; not with fp16."},
    )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`run` that they stand for."""
        callbacks = [StopOnNonFinite()] if self.stop_on_nonfinite else []
        return {"overwrite_output_dir": self.overwrite_output_dir, "callbacks": callbacks}


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


class _Beginning(TrainerCallback):
    """Parts what goes wrong before the first step, and is an error of the user, from what goes wrong later.

    Optimizer, scheduler and data loaders are built only within ``Trainer.train``. Until then the run in ``replaced``
    stays as it is.
    """

    def __init__(self, replaced: Path | None):
        self.replaced, self.begun = replaced, False

    @contextlib.contextmanager
    def refusals(self):
        """Turn any error before the first step into an InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of as many kinds as Trainer has arguments
            if self.begun and "metric_for_best_model" not in str(error):  # Trainer sees it at the first evaluation
                raise
            raise InputError(f"{error}") from error

    def begin(self, args: TrainingArguments) -> None:
        """Remove the run to be replaced."""
        if not self.begun and self.replaced:
            with args.main_process_first(local=False):
                for path in _run_files(self.replaced):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.begun = True

    def on_train_begin(self, args, state, control, **kwargs):
        """All is built; other callbacks have agreed, as this one is last."""
        self.begin(args)


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
        overwrite_output_dir: remove the run that ``args.output_dir`` holds, once all is ready for the first step.
        write: leave model, metrics files, learning curves, model card and predictions in ``args.output_dir``. Without,
            only what ``args.save_strategy`` asks for.

    Raises:
        InputError: the output folder holds another run, or there is nothing to resume from, or it is of another model,
            or Trainer cannot begin with these arguments.
    """
    checkpoint = check_output_dir(args, overwrite_output_dir)
    beginning = _Beginning(Path(args.output_dir) if overwrite_output_dir and checkpoint is None else None)
    set_seed(args.seed)
    train_dataset = task.train_view(task.train_dataset) if args.do_train else None
    eval_datasets = {suffix: task.eval_view(dataset) for suffix, dataset in task.eval_datasets.items()}
    model = task.build_model()
    with beginning.refusals():
        trainer = trainer_cls(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=next(iter(eval_datasets.values()), None),
            data_collator=task.data_collator,
            processing_class=task.processing_class,
            compute_metrics=task.compute_metrics,
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        trainer.add_callback(beginning)
    problem = checkpoint and checkpoint_problem(checkpoint, trainer.model)
    if problem:
        raise InputError(f"resume_from_checkpoint: {problem}")
    metrics: dict[str, float] = {}
    if args.do_train:
        with beginning.refusals():
            metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics["train_samples"] = len(train_dataset)
        if write:
            trainer.save_model()
    else:
        beginning.begin(args)
    if args.do_eval:
        metrics |= _evaluate(trainer, task, eval_datasets)
    if args.do_predict:
        metrics |= _predict(trainer, task, write)
    if write:
        _write(trainer, task, metrics)
    return Run(metrics, trainer, task)


def check_output_dir(args: TrainingArguments, overwrite_output_dir: bool = False) -> str | None:
    """Refuse an output folder that holds another run; return the checkpoint to resume from, if any.

    Raises:
        InputError: the folder holds files of a run and neither resume_from_checkpoint nor overwrite_output_dir is
            given, or the checkpoint to resume from is not there or incomplete.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is not a folder")
    checkpoint = _checkpoint(args.resume_from_checkpoint, folder)
    held = _run_files(folder)
    if checkpoint is not None and folder.resolve() in Path(checkpoint).resolve().parents:
        return checkpoint
    if held and not overwrite_output_dir:
        raise InputError(
            f"output_dir: {folder} holds another run ({', '.join(path.name for path in held[:3])}, ...); name another "
            "folder, or give resume_from_checkpoint=true to continue it or overwrite_output_dir=true to replace it"
        )
    return checkpoint


def generalization_gap(metrics: dict[str, float], names: Iterable[str], suffix: str = "") -> dict[str, float]:
    """How much worse a model is on held-out examples than on training examples.

    Args:
        metrics: with ``eval_<name>`` and ``train_eval_<name>``.
        names: the measures; for ``loss`` and ``perplexity`` the gap is held-out minus training, for the others
            training minus held-out.
        suffix: of the held-out measures, "_mm" for MNLI mismatched.
    """
    gaps = {}
    for name in names:
        difference = metrics[f"{TRAIN_EVAL}_{name}"] - metrics[f"eval_{name}{suffix}"]
        gaps[f"generalization_gap_{name}{suffix}"] = -difference if name in ("loss", "perplexity") else difference
    return gaps


def summary(run: Run) -> str:
    """A short table for the end of a script: held-out and training metrics, gap, majority class, files."""
    metrics, task, args = run.metrics, run.task, run.trainer.args
    optim = getattr(args.optim, "value", args.optim)
    lines = [f"{task.name}: optim={optim}, {run.trainer.state.global_step} steps, files in {args.output_dir}"]
    columns = ["held-out", "training", "gap"] + ["majority"] * (task.baseline is not None)
    lines.append(" " * 24 + "".join(f"{column:>10}" for column in columns))
    for key in metrics:
        name = key.removeprefix("eval_")
        if not key.startswith("eval_") or name.startswith(SPEED) or name.startswith("samples"):
            continue
        cells = [metrics[key], metrics.get(f"{TRAIN_EVAL}_{name}"), metrics.get(f"generalization_gap_{name}")]
        cells.append(task.baseline if name == task.main_metric else None)
        lines.append(f"{name:24}" + "".join(f"{'' if cell is None else format(cell, '.4f'):>10}" for cell in cells))
    return "\n".join(lines)


def _checkpoint(resume: str | None, folder: Path) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means: none, the last complete one in ``folder``, or a path."""
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() != "true":
        problem = checkpoint_problem(resume)
        if problem:
            raise InputError(f"resume_from_checkpoint: {problem}")
        return resume
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"resume_from_checkpoint: {folder} holds no complete checkpoint-<step> folder")
    return checkpoint


def _run_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))


def _evaluate(trainer: Trainer, task: Task, eval_datasets: dict[str, Any]) -> dict[str, float]:
    """Held-out metrics and, after training, those on training examples and the gap between the two."""
    metrics: dict[str, float] = {}
    if trainer.args.do_train:
        count = min(len(task.train_dataset), max(map(len, eval_datasets.values())))
        rows = np.sort(np.random.default_rng(0).permutation(len(task.train_dataset))[:count])
        metrics |= trainer.evaluate(task.eval_view(task.train_dataset.select(rows)), metric_key_prefix=TRAIN_EVAL)
        metrics[f"{TRAIN_EVAL}_samples"] = count
    for suffix, dataset in eval_datasets.items():
        results = trainer.evaluate(dataset)
        names = [key.removeprefix("eval_") for key in results if key != "epoch"]
        metrics |= {key if key == "epoch" else key + suffix: value for key, value in results.items()}
        metrics[f"eval_samples{suffix}"] = len(dataset)
        if trainer.args.do_train:
            metrics |= generalization_gap(metrics, [name for name in names if not name.startswith(SPEED)], suffix)
    return metrics


def _predict(trainer: Trainer, task: Task, write: bool) -> dict[str, float]:
    """Predictions as text files, one line an example; metrics too where the examples have labels."""
    metrics: dict[str, float] = {}
    for suffix, dataset in task.predict_datasets.items():
        output = trainer.predict(task.eval_view(dataset), metric_key_prefix="predict")
        metrics |= {key + suffix: value for key, value in output.metrics.items()}
        metrics[f"predict_samples{suffix}"] = len(dataset)
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        if task.label_names is None:
            predicted = [f"{score:.3f}" for score in logits.reshape(-1)]
        else:
            predicted = [task.label_names[index] for index in logits.argmax(axis=-1)]
        if write and trainer.is_world_process_zero():
            lines = ["index\tprediction", *(f"{index}\t{label}" for index, label in enumerate(predicted))]
            path = Path(trainer.args.output_dir) / f"predict_results_{task.name}{suffix}.txt"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return metrics


def _write(trainer: Trainer, task: Task, metrics: dict[str, float]) -> None:
    """Metrics files, learning curves and model card."""
    args = trainer.args
    for split in ("train", "eval", "predict"):
        prefixes = {"eval": ("eval_", TRAIN_EVAL, "generalization_gap_")}.get(split, (f"{split}_",))
        part = {key: value for key, value in metrics.items() if key.startswith(prefixes) or key == "epoch"}
        if split == "train":
            part = {key: value for key, value in part.items() if not key.startswith(TRAIN_EVAL)}
        if getattr(args, f"do_{split}"):
            trainer.log_metrics(split, part)
            trainer.save_metrics(split, part)
    if not args.do_train:
        return
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_learning_curves(
            trainer.state.log_history, task.main_metric, Path(args.output_dir) / "learning_curves.png", task.name
        )
    if args.push_to_hub:
        trainer.push_to_hub(**task.card)
    else:
        trainer.create_model_card(**task.card)


def splits_needed(args: TrainingArguments) -> list[str]:
    """The splits that do_train, do_eval and do_predict ask for."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    return [split for split, needed in wanted.items() if needed]
