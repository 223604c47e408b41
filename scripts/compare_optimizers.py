"""Compare optimizers on equal terms: does DualAdam generalize better, on your task too?

    python scripts/compare_optimizers.py configs/compare/quickstart.yaml --output_dir outputs/compare
    python scripts/compare_optimizers.py --report_only --output_dir outputs/compare

Chooses each optimizer's learning rate on a selection split, runs all seeds at it, and writes results.csv, report.md
and plots to output_dir. May be stopped at any moment: the same command goes on, and runs that are done stay done. The
same command started several times, or on machines that share --storage, shares the runs.
"""

import dataclasses
import logging
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

# Threads that wait by spinning slow down other workers on the same cores, to a seventh of their speed and less. OpenMP
# reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hf_dualadam.extras import require_or_exit

require_or_exit("compare")

from filelock import FileLock

from hf_dualadam import __version__
from hf_dualadam.finetuning.config import parse, run_main
from hf_dualadam.lab.comparison import ComparisonArguments, make_comparison
from hf_dualadam.lab.execution import Laboratory
from hf_dualadam.lab.report import write_report, write_results
from hf_dualadam.lab.run_queue import RunQueue, open_storage
from hf_dualadam.lab.study import Study

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "optuna", "pytorch_optimizer", "hessian-eigenthings")


@dataclass
class CompareArguments:
    """Where the comparison is kept."""

    output_dir: str = field(metadata={"help": "Folder for results, report and plots."})
    storage: str | None = field(
        default=None,
        metadata={"help": "Optuna storage: a database URL or a journal file; by default journal.log in output_dir."},
    )
    data_root: str = field(default=".", metadata={"help": "Folder that the tasks' data_dir are relative to."})
    report_only: bool = field(default=False, metadata={"help": "Only rebuild report and plots from the results."})


def describe_study(comparison, lab, argv):
    """What the report says about the comparison: settings, sizes, command and versions."""
    return {
        "name": comparison.name,
        "question": comparison.question,
        "command": shlex.join(["python", *argv]),
        "versions": {"python": platform.python_version(), "hf_dualadam": __version__}
        | {name: version(name) for name in PACKAGES},
        "runs": comparison.size(),
        "seeds": comparison.seeds,
        "selection_seeds": comparison.selection_seeds,
        "num_learning_rates": comparison.num_learning_rates,
        "learning_rate_factor": comparison.learning_rate_factor,
        "learning_rates": {
            t: {o: comparison.learning_rates(t, o) for o in comparison.optimizers} for t in comparison.tasks
        },
        "sharpness": dataclasses.asdict(comparison.sharpness),
        "tasks": {name: dataclasses.asdict(task) | lab.sizes(name) for name, task in comparison.tasks.items()},
        "metrics": {name: lab.metric(name) for name in comparison.tasks},
        "optimizers": {name: setting.summary() for name, setting in comparison.optimizers.items()},
    }


def show(run, results, study):
    """One line of progress."""
    row, left = results[run.key]["row"], study.seconds_left(results)
    score = row["selection_metric"] if run.role == "selection" else row["heldout_metric"]
    print(
        f"[{len(study.rows(results))}/{study.comparison.size()}] {run.role} {run.task} {run.optimizer} "
        f"lr={run.learning_rate:g} seed={run.seed}: {row['status']}"
        + (f" {score:.4f}" if score is not None else "")
        + f" in {results[run.key]['wall_seconds']:.0f} s, about {left / 60:.1f} min left",
        flush=True,
    )


def main(argv=None):
    compare_args, comparison_args = parse(
        (CompareArguments, ComparisonArguments), argv, defaults=lambda given: {}, description=__doc__
    )
    folder = Path(compare_args.output_dir)
    if compare_args.report_only:
        print("report:", write_report(folder))
        return
    comparison = make_comparison(comparison_args)
    lab = Laboratory(comparison, Path(compare_args.data_root))
    description = describe_study(
        comparison, lab, sys.argv if argv is None else ["scripts/compare_optimizers.py", *argv]
    )
    study = Study(
        comparison, RunQueue(open_storage(compare_args.storage or str(folder / "journal.log")), comparison.name)
    )
    folder.mkdir(parents=True, exist_ok=True)

    def write(results):
        with FileLock(folder / ".results.lock"):  # several workers may be done at the same time
            write_results(folder, study.rows(results), study.curves(results), description)

    for run, results in study.work(lab.execute):
        show(run, results, study)
        write(results)
    write(study.queue.results())
    with FileLock(folder / ".results.lock"):
        print("report:", write_report(folder))


if __name__ == "__main__":
    logging.getLogger("hf_dualadam").setLevel(logging.ERROR)  # its warnings are about single runs
    run_main(main)
