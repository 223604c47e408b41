r"""Compare how well optimizers generalize, with equal budgets, on your task.

    hf-dualadam compare configs/compare/quickstart.yaml
    hf-dualadam compare --script train.py --optimizers adamw adamw_warmup dualadam --metric eval_accuracy \
        --learning_rates 1e-4 3e-4 1e-3 --seeds 5 -- --model_name_or_path bert-base-uncased --do_train --do_eval
    hf-dualadam compare --report_only --output_dir outputs/compare-quickstart

The YAML file defines tasks and optimizers. With --script (or --module), the task is a Trainer script of yours, which
is run unmodified with the arguments after -- and those of the optimizer. The command chooses the learning rate of each
optimizer, runs all seeds at it, and writes results.csv, report.md and plots to output_dir. It can be interrupted;
rerun the same command to resume. --jobs N starts N workers, each on its own GPU if there are GPUs. To share the runs
among machines, run the same command on each with a common --storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm.auto import tqdm

from .. import __version__
from ..finetuning.config import InputError, parse, run_main
from ..finetuning.training import check_writable, refuse_several_processes
from .comparison import Comparison, ComparisonArguments, RunSpec, ScriptSetting, make_comparison
from .execution import Laboratory
from .report import STUDY, write_report, write_results
from .run_queue import RunQueue, open_storage
from .study import Results, Study

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "optuna", "pytorch_optimizer", "hessian-eigenthings")
POLL_SECONDS = 1.0


@dataclass
class CompareArguments:
    """Options for output and workers."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results, report and plots; by default outputs/compare-NAME."}
    )
    storage: str | None = field(
        default=None,
        metadata={"help": "Optuna storage: a database URL or a journal file; by default journal.log in output_dir."},
    )
    data_root: str = field(default=".", metadata={"help": "Folder to which the data_dir of tasks is relative."})
    jobs: int = field(
        default=1, metadata={"help": "Number of worker processes; if there are GPUs, each uses one of them."}
    )
    report_only: bool = field(default=False, metadata={"help": "Only rebuild report and plots from the results."})

    def __post_init__(self):
        """Check the ranges."""
        if self.jobs < 1:
            raise InputError(f"jobs: {self.jobs} - should be at least 1")
        if self.report_only and self.output_dir is None:
            raise InputError("output_dir: missing; --report_only needs the folder of the results")


@dataclass
class ScriptArguments:
    """One task without a YAML file: a Trainer script, with its arguments after --."""

    script: str | None = field(default=None, metadata={"help": "Path of a Trainer script, which is run unmodified."})
    module: str | None = field(
        default=None, metadata={"help": "Name of a module that runs as python -m, such as trl.scripts.sft."}
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "Metric for choosing the learning rate: a key of its all_results.json; by default eval_loss."
        },
    )
    heldout_metric: str | None = field(
        default=None,
        metadata={"help": "Metric to compare, if the script scores other data for it; by default metric."},
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Direction of the metric, if its name does not imply it."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Center of the range of Adam's learning rates; by default 5e-5."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The learning rates to try, the same for all optimizers."}
    )

    def task(self, words: list[str]) -> dict[str, Any]:
        """The task by name, or nothing without a script.

        Args:
            words: the script's own arguments.

        Raises:
            InputError: an option for scripts is given without a script.
        """
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.script is None and self.module is None:
            if given or words:
                what = next(iter(given), None) or "the arguments after --"
                raise InputError(f"{what}: given without script or module")
            return {}
        name = Path(self.script).stem if self.script else self.module.rpartition(".")[2]
        return {name: given | {"arguments": words}}


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line; ``sys.argv[1:]`` by default.

    Raises:
        InputError: an argument or file cannot be used; nothing has been trained.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    refuse_several_processes("hf-dualadam compare")
    arguments, comparison = read_command_line(argv)
    if arguments.report_only:
        print("report:", write_report(Path(arguments.output_dir)))
        return
    folder = Path(arguments.output_dir or f"outputs/compare-{comparison.name}")
    check_folder(folder, comparison.name)
    folder.mkdir(parents=True, exist_ok=True)
    storage = arguments.storage or str(folder / "journal.log")
    study = Study(comparison, RunQueue(open_storage(storage), comparison.name))
    laboratory = Laboratory(comparison, folder, Path(arguments.data_root))
    with contextlib.closing(laboratory):
        description = describe(comparison, laboratory, ["hf-dualadam", "compare", *argv])
        if arguments.jobs == 1:
            finished = work_here(study, laboratory)
        else:
            finished = work_in_processes(study, storage, folder, arguments)
        with Progress(study) as progress:
            for results in finished:
                progress.update(results)
                write(folder, study, results, description)
        write(folder, study, study.queue.results(), description)
    with FileLock(folder / ".results.lock"):
        print("report:", write_report(folder))


def read_command_line(argv: list[str]) -> tuple[CompareArguments, Comparison | None]:
    """Read ``[PLAN.yaml] [--key value ...] [-- ARGS...]``.

    Args:
        argv: the command line.

    Returns:
        Options for output and workers, and the comparison (None for the report only).

    Raises:
        InputError: an argument or file cannot be used.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    ours, words = short_forms(argv[:end]), argv[end + 1 :]
    arguments, script, settings = parse(
        (CompareArguments, ScriptArguments, ComparisonArguments), ours, defaults=lambda given: {}, description=__doc__
    )
    if arguments.report_only:
        return arguments, None
    task = script.task(words)
    if task and settings.tasks:
        raise InputError("tasks: give them in the file, or a script on the command line, not both")
    if task:
        settings.tasks = task
        if settings.name == "comparison":
            settings.name = next(iter(task))
    return arguments, make_comparison(settings)


def short_forms(argv: list[str]) -> list[str]:
    """Accept ``--optimizers a b`` for a mapping and ``--seeds N`` for a number of seeds."""
    argv, result = list(argv), []
    while argv:
        word = argv.pop(0)
        values = []
        while word in ("--optimizers", "--seeds") and argv and not argv[0].startswith("--"):
            values.append(argv.pop(0))
        if word == "--optimizers" and values and not values[0].lstrip().startswith("{"):
            values = [json.dumps(dict.fromkeys(values))]
        if word == "--seeds" and len(values) == 1:
            word = "--num_seeds"
        result += [word, *values]
    return result


def check_folder(folder: Path, name: str) -> None:
    """Raise InputError unless results can be written to ``folder``, and it holds no other comparison's."""
    check_writable(folder)
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        held = json.loads((folder / STUDY).read_text(encoding="utf-8"))["name"]
        if held != name:
            raise InputError(f"output_dir: {folder} holds the comparison {held!r}; name another folder for {name!r}")


def describe(comparison: Comparison, laboratory: Laboratory, command: list[str]) -> dict[str, Any]:
    """Description of the comparison for the report: settings, sizes, command and versions."""
    return {
        "name": comparison.name,
        "question": comparison.question,
        "command": shlex.join(command),
        "versions": {"python": platform.python_version(), "hf_dualadam": __version__}
        | {name: version(name) for name in PACKAGES},
        "runs": comparison.size(),
        "seeds": comparison.seeds,
        "selection_seeds": comparison.selection_seeds,
        "references": comparison.references,
        "learning_rates": {
            task: {optimizer: comparison.learning_rates(task, optimizer) for optimizer in comparison.optimizers}
            for task in comparison.tasks
        },
        "sharpness": dataclasses.asdict(comparison.sharpness),
        "tasks": {
            name: dataclasses.asdict(task)
            | {"steps": task.steps, "label_noise": task.label_noise, "is_script": isinstance(task, ScriptSetting)}
            | laboratory.facts(name)
            for name, task in comparison.tasks.items()
        },
        "metrics": {name: laboratory.metric(name)._asdict() for name in comparison.tasks},
        "optimizers": {name: setting.summary() for name, setting in comparison.optimizers.items()},
    }


def write(folder: Path, study: Study, results: Results, description: dict[str, Any]) -> None:
    """Write the results so far; safe with several processes."""
    with FileLock(folder / ".results.lock"):
        write_results(folder, study.rows(results), study.curves(results), description)


class Progress:
    """A progress bar with the remaining time, and a line for each finished run.

    Args:
        study: the study whose runs are counted, including those of other processes.
    """

    def __init__(self, study: Study):
        self.study, self.shown = study, set(study.queue.results())
        done = len(study.rows(study.queue.results()))
        self.bar = tqdm(total=study.comparison.size(), initial=done, unit="run", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        """Show the bar."""
        return self

    def __exit__(self, *error) -> None:
        """Keep the bar on the screen."""
        self.bar.close()

    def update(self, results: Results) -> None:
        """Show the new results."""
        for run in self.study.known_runs(results):
            if run.key in results and run.key not in self.shown:
                self.shown.add(run.key)
                self.bar.write(_line(run, results[run.key]))
        self.bar.update(len(self.study.rows(results)) - self.bar.n)


def _line(run: RunSpec, result: dict[str, Any]) -> str:
    row = result["row"]
    score = row["selection_metric"] if run.role == "selection" else row["heldout_metric"]
    return (
        f"{run.role} {run.task} {run.optimizer} lr={run.learning_rate:g} seed={run.seed}: {row['status']}"
        + (f" {score:.4f}" if score is not None else "")
        + f" in {result['wall_seconds']:.0f} s"
    )


def work_here(study: Study, laboratory: Laboratory) -> Iterator[Results]:
    """Execute the runs in this process; yield all results after each."""
    for _, results in study.work(laboratory.execute):
        yield results


def work_in_processes(study: Study, storage: str, folder: Path, arguments: CompareArguments) -> Iterator[Results]:
    """Execute the runs in worker processes; yield all results at intervals.

    Raises:
        InputError: all workers have ended and runs are left.
    """
    context = multiprocessing.get_context("spawn")
    gpus = _gpus()
    workers = []
    try:
        for index in range(arguments.jobs):
            worker = context.Process(
                target=_worker, args=(study.comparison, storage, str(folder), arguments.data_root), daemon=False
            )
            with _environment(_worker_environment(index, arguments.jobs, gpus)):
                worker.start()
            workers.append(worker)
        while any(worker.is_alive() for worker in workers):
            time.sleep(POLL_SECONDS)
            yield study.queue.results()
        results = study.queue.results()
        if len(study.rows(results)) < study.comparison.size():
            status = [worker.exitcode for worker in workers]
            raise InputError(f"jobs: all workers ended before the comparison was finished (exit status {status})")
        yield results
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _worker(comparison: Comparison, storage: str, folder: str, data_root: str) -> None:
    """The main function of a worker process."""
    logging.getLogger("hf_dualadam").setLevel(logging.ERROR)
    _stop_on_sigterm()

    def work() -> None:
        study = Study(comparison, RunQueue(open_storage(storage), comparison.name))
        with contextlib.closing(Laboratory(comparison, Path(folder), Path(data_root))) as laboratory:
            for _ in study.work(laboratory.execute):
                pass

    run_main(work)


def _stop_on_sigterm() -> None:
    """Exit with an exception, so that the run returns to the queue and the script's process is stopped."""
    import signal

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))


def _gpus() -> list[str]:
    """The devices that CUDA_VISIBLE_DEVICES can name."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


def _worker_environment(index: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Assign each worker a GPU, or an equal number of cores.

    Threads that spin while they wait slow other workers on the same cores down by a factor of 7 or more. OpenMP reads
    both settings when torch is loaded.
    """
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if hasattr(os, "sched_getaffinity") else 1
    return {
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes started within the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_command(argv: list[str] | None = None) -> None:
    """:func:`main` as a program: an input error or Ctrl-C is one line on stderr, with exit status 2 or 130."""
    logging.getLogger("hf_dualadam").setLevel(logging.ERROR)  # its warnings concern single runs
    try:
        run_main(lambda: main(argv))
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
