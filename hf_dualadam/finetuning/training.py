"""Train and evaluate one task with one optimizer, for the scripts and for comparisons.

``run(task, args)`` is the entry point. A comparison builds a :class:`Task` once and calls ``run`` with different
``TrainingArguments`` for every optimizer, learning rate and seed; the trained model and the data remain accessible.
"""

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..trainer.checkpoints import TRAINER_STATE, checkpoint_problem, last_complete_checkpoint
from ..trainer.nonfinite import StopOnNonFinite
from .config import InputError
from .learning_curves import plot_learning_curves
from .metrics import SMALLER_IS_BETTER
from .tasks import Task

logger = logging.getLogger(__name__)

# Prefix of the metrics measured on training examples after training. Trainer's `train_loss` is different: the
# mean over all steps of the run, with dropout and augmentation.
TRAIN_EVAL = "train_eval"
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
LOCK = ".run.lock"  # locked by the process that writes to the output folder; the file is not deleted
RUN_FILES = ("checkpoint-*", "*_results.json", "predict_results_*.txt", TRAINER_STATE, "training_args.bin")
RUN_FILES += (
    "model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model*",
    "adapter_config.json",
    "learning_curves.png",
)


@dataclass
class RunArguments:
    """Options of the scripts for the whole run."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an existing run in output_dir; otherwise such a folder is refused."}
    )
    stop_on_nonfinite: bool = field(
        default=False,
        metadata={"help": "Stop before a step with a non-finite gradient, and name the parameters; not with fp16."},
    )

    def options(self) -> dict[str, Any]:
        """These options as keyword arguments of :func:`run`."""
        callbacks = [StopOnNonFinite()] if self.stop_on_nonfinite else []
        return {"overwrite_output_dir": self.overwrite_output_dir, "callbacks": callbacks}


@dataclass
class Run:
    """A finished run.

    Attributes:
        metrics: the contents of all_results.json.
        trainer: with the trained ``model``, the ``optimizer`` and ``state.log_history``.
        task: the task of the run.
    """

    metrics: dict[str, float]
    trainer: Trainer
    task: Task


class _Start(TrainerCallback):
    """Separates errors before the first step (user errors) from later ones, and locks the output folder.

    Optimizer, scheduler and data loaders are created only within ``Trainer.train``. Until the first step, the run in
    ``replaced`` is not changed.
    """

    def __init__(self, args: TrainingArguments, replaced: Path | None):
        self.replaced, self.begun = replaced, False
        self.lock = FileLock(Path(args.output_dir) / LOCK, timeout=0) if args.should_save else None

    @contextlib.contextmanager
    def refusals(self):
        """Turn errors before the first step into InputErrors."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of many types, depending on the argument
            if self.begun or _of_the_machine(error):
                raise
            raise InputError(f"{error}") from error

    def begin(self, args: TrainingArguments) -> None:
        """Lock the output folder and remove the run to be replaced.

        Raises:
            InputError: another process is using it.
        """
        if self.begun:
            return
        if self.lock is not None:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            _acquire(self.lock, Path(args.output_dir))
        if self.replaced:
            with args.main_process_first(local=False):
                for path in _run_files(self.replaced):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.begun = True

    def __enter__(self) -> "_Start":
        return self

    def __exit__(self, *error) -> None:
        """Release the output folder."""
        if self.lock is not None:
            self.lock.release()

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin: everything is built, and the other callbacks, which run before this one, have accepted it."""
        self.begin(args)


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"output_dir: another process is writing its run to {folder}; name another folder") from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        logger.warning(f"output_dir: {folder} cannot be locked against a second process: {error}")


def _of_the_machine(error: Exception) -> bool:
    """Whether an error is not about the input: memory ran out, or another process failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("torch.distributed") for name in frames)


def run(
    task: Task,
    args: TrainingArguments,
    *,
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    trainer_cls: Callable[..., Trainer] = Trainer,
    overwrite_output_dir: bool = False,
    write: bool = True,
    print_logs: bool = True,
) -> Run:
    """Train, evaluate and predict as ``args.do_train``, ``do_eval`` and ``do_predict`` say.

    The metrics are Trainer's (``train_*``, ``eval_*``) and, when there are both training and held-out data,
    ``train_eval_*``: the same metrics on a fixed random subset of the training examples, at most as many as held-out
    ones, without augmentation; ``generalization_gap_loss`` = eval_loss - train_eval_loss; and
    ``generalization_gap_<metric>`` = train_eval_<metric> - eval_<metric>.

    Args:
        task: data, model and metric.
        args: Trainer's arguments; ``args.seed`` also seeds the model's new weights.
        optimizer_cls_and_kwargs: an optimizer that has no name in ``args.optim``.
        callbacks: further callbacks for Trainer.
        trainer_cls: Trainer or a subclass with cooperative methods, or a ``functools.partial`` of one; it is combined
            with the task's own class.
        overwrite_output_dir: replace an existing run in ``args.output_dir`` when everything is ready for the first
            step.
        write: write model, metrics files, learning curves, model card and predictions to ``args.output_dir``. If
            False, write only what ``args.save_strategy`` asks for.
        print_logs: if False, Trainer does not print its logs when the progress bar is disabled.

    Raises:
        InputError: ``args.metric_for_best_model`` is not a metric of the task, the output folder holds another run,
            there is no checkpoint to resume from or it is of another model, or Trainer cannot start with these
            arguments.
    """
    _check_metric(task, args)
    checkpoint = check_output_dir(args, overwrite_output_dir)
    metrics: dict[str, float] = {}
    with _Start(args, Path(args.output_dir) if overwrite_output_dir and checkpoint is None else None) as start:
        set_seed(args.seed)
        model = task.build_model()
        with start.refusals():
            trainer = make_trainer(
                task,
                args,
                model,
                callbacks=list(callbacks),
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                trainer_cls=trainer_cls,
            )
            trainer.add_callback(start)
            if not print_logs:
                trainer.remove_callback(PrinterCallback)
        problem = checkpoint and checkpoint_problem(checkpoint, trainer.model)
        if problem:
            raise InputError(f"resume_from_checkpoint: {problem}")
        if args.do_train:
            with start.refusals():
                metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
            metrics["total_flos"] = trainer.state.total_flos  # Trainer removes it from its metrics when it prints them
            metrics["train_samples"] = len(trainer.train_dataset)
            if write:
                trainer.save_model()
        else:
            start.begin(args)
        if args.do_eval:
            metrics |= _evaluate(trainer, task)
        if args.do_predict:
            metrics |= _predict(trainer, task, write)
        if write:
            _write(trainer, task, metrics)
    return Run(metrics, trainer, task)


def make_trainer(
    task: Task, args: TrainingArguments, model: PreTrainedModel, *, trainer_cls: Any = Trainer, **kwargs: Any
) -> Trainer:
    """Build the trainer of a task: its class combined with ``trainer_cls``, its data, metrics and collator.

    Args:
        task: the task to train.
        args: Trainer's arguments.
        model: one that ``task.build_model`` returned.
        trainer_cls: as for :func:`run`.
        kwargs: further arguments of Trainer.
    """
    return _combined(trainer_cls, task.trainer_cls)(
        model=model,
        args=args,
        train_dataset=task.train_view(task.train_dataset) if args.do_train else None,
        eval_dataset=next((task.eval_view(dataset) for dataset in task.eval_datasets.values()), None),
        data_collator=task.data_collator,
        processing_class=task.processing_class,
        compute_metrics=task.compute_metrics,
        **task.trainer_kwargs,
        **kwargs,
    )


def _check_metric(task: Task, args: TrainingArguments) -> None:
    """Trainer would look for the metric only after the first evaluation."""
    names = dict.fromkeys(("loss", task.main_metric, *task.metric_names))
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in names:
        raise InputError(f"metric_for_best_model: {best!r} - should be one of {', '.join(names)}")


def check_output_dir(args: TrainingArguments, overwrite_output_dir: bool = False) -> str | None:
    """Refuse an output folder that holds another run; return the checkpoint to resume from, if any.

    Raises:
        InputError: the folder is not writable, another process is using it, it holds files of a run and neither
            resume_from_checkpoint nor overwrite_output_dir is set, or the checkpoint to resume from is missing or
            incomplete.
    """
    folder = Path(args.output_dir)
    check_writable(folder)
    if args.should_save and (folder / LOCK).exists():  # the other processes of the job do not hold the lock
        lock = FileLock(folder / LOCK, timeout=0)
        _acquire(lock, folder)
        lock.release()
    checkpoint = _checkpoint(args.resume_from_checkpoint, folder)
    held = _run_files(folder)
    if checkpoint is not None and folder.resolve() in Path(checkpoint).resolve().parents:
        return checkpoint
    if held and not overwrite_output_dir:
        raise InputError(
            f"output_dir: {folder} holds another run ({', '.join(path.name for path in held[:3])}, ...); use another "
            "folder, or set resume_from_checkpoint=true to continue it or overwrite_output_dir=true to replace it"
        )
    return checkpoint


def check_writable(folder: Path) -> None:
    """Raise InputError unless files can be written to ``folder``, which may not exist yet; leave nothing behind."""
    path = where = folder.absolute()
    try:
        where = there = next(path for path in (path, *path.parents) if path.exists() or path.is_symlink())
        if not there.is_dir():
            kind = "is a link to nothing" if there.is_symlink() and not there.exists() else "is not a folder"
            raise InputError(f"output_dir: {there} {kind}")
        with tempfile.TemporaryDirectory(dir=there) as trial:
            where = folder
            for name in set(path.parts[len(there.parts) :]) - {".."}:
                (Path(trial) / name).mkdir()  # it may be too long, or have characters that the file system rejects
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"output_dir: cannot write to {where}: {getattr(error, 'strerror', None) or error}") from None


def refuse_several_processes(script: str) -> None:
    """Raise InputError in a job of several processes, for a script that supports only one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise InputError(f"{script}: supports one process, but {size} were started; run it with plain python")


def generalization_gap(metrics: dict[str, float], names: Iterable[str], suffix: str = "") -> dict[str, float]:
    """How much worse a model is on held-out examples than on training examples.

    Args:
        metrics: with ``eval_<name>`` and ``train_eval_<name>``.
        names: the metrics. For loss, perplexity and mse the gap is held-out minus training, for the others training
            minus held-out.
        suffix: suffix of the held-out metrics, "_mm" for MNLI mismatched.
    """
    gaps = {}
    for name in names:
        difference = metrics[f"{TRAIN_EVAL}_{name}"] - metrics[f"eval_{name}{suffix}"]
        gaps[f"generalization_gap_{name}{suffix}"] = -difference if name in SMALLER_IS_BETTER else difference
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


def _combined(trainer_cls: Callable[..., Trainer], of_task: type[Trainer]) -> Callable[..., Trainer]:
    """A class that inherits from both; the methods of ``trainer_cls`` take precedence."""
    if isinstance(trainer_cls, functools.partial):
        return functools.partial(_combined(trainer_cls.func, of_task), *trainer_cls.args, **trainer_cls.keywords)
    if not isinstance(trainer_cls, type) or issubclass(trainer_cls, of_task):
        return trainer_cls
    if issubclass(of_task, trainer_cls):
        return of_task
    return type(trainer_cls.__name__ + of_task.__name__, (trainer_cls, of_task), {})


def _checkpoint(resume: str | None, folder: Path) -> str | None:
    """The checkpoint meant by ``resume_from_checkpoint``: none, the last complete one in ``folder``, or a path."""
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


def _evaluate(trainer: Trainer, task: Task) -> dict[str, float]:
    """Held-out metrics and, after training, metrics on training examples and the gaps."""
    metrics: dict[str, float] = {}
    eval_datasets = {suffix: task.eval_view(dataset) for suffix, dataset in task.eval_datasets.items()}
    if trainer.args.do_train:
        kept = np.asarray(getattr(trainer, "kept", range(len(task.train_dataset))))  # TRL may drop some
        count = min(len(kept), max(map(len, eval_datasets.values())))
        rows = np.sort(kept[np.random.default_rng(0).permutation(len(kept))[:count]])
        metrics |= trainer.evaluate(task.eval_view(task.train_dataset.select(rows)), metric_key_prefix=TRAIN_EVAL)
        metrics[f"{TRAIN_EVAL}_samples"] = _evaluated(trainer, count)
    for suffix, dataset in eval_datasets.items():
        results = trainer.evaluate(dataset)
        names = [key.removeprefix("eval_") for key in results if key != "epoch"]
        metrics |= {key if key == "epoch" else key + suffix: value for key, value in results.items()}
        metrics[f"eval_samples{suffix}"] = _evaluated(trainer, len(dataset))
        if trainer.args.do_train:
            metrics |= generalization_gap(metrics, [name for name in names if not name.startswith(SPEED)], suffix)
    return metrics


def _evaluated(trainer: Trainer, given: int) -> int:
    """The number of examples in the latest evaluation, which differs if the trainer joins or drops examples."""
    return given if (count := getattr(trainer, "evaluated_examples", None)) is None else count


def _predict(trainer: Trainer, task: Task, write: bool) -> dict[str, float]:
    """Write predictions as text files, one line per example; return metrics if the examples have labels."""
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
    """Write metrics files, learning curves and model card."""
    args = trainer.args
    for split in ("train", "eval", "predict"):
        prefixes = {"eval": ("eval_", TRAIN_EVAL, "generalization_gap_")}.get(split, (f"{split}_",))
        part = {key: value for key, value in metrics.items() if key.startswith(prefixes) or key == "epoch"}
        if split == "train":
            part = {key: value for key, value in part.items() if not key.startswith(TRAIN_EVAL)}
            part |= {"total_flos": metrics["total_flos"]} if "total_flos" in metrics else {}
        if getattr(args, f"do_{split}"):
            trainer.log_metrics(split, part)
            trainer.save_metrics(split, part)
    if not args.do_train:
        return
    trainer.save_state()
    if trainer.is_world_process_zero():
        with decoration("learning_curves.png"):
            plot_learning_curves(
                trainer.state.log_history, task.main_metric, Path(args.output_dir) / "learning_curves.png", task.name
            )
    if args.push_to_hub:
        trainer.push_to_hub(**task.card)
        return
    with decoration("the model card"):
        trainer.create_model_card(**task.card)


@contextlib.contextmanager
def decoration(what: str):
    """Optional work after a run: an error becomes one warning."""
    try:
        yield
    except Exception as error:  # of any kind: the run is done and saved
        logger.warning(f"{what}: skipped: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def splits_needed(args: TrainingArguments) -> list[str]:
    """The splits that do_train, do_eval and do_predict need."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    return [split for split, needed in wanted.items() if needed]
