"""Print and plot paired differences between optimizers over the tasks of several comparisons.

    python scripts/plot_differences.py docs/results/claim-resnet docs/results/claim-vit \
        --pairs dualadam:adamw dualadam:adamw_warmup adamw_warmup:adamw --output docs/images/claims.png

Each folder holds results.csv and study.json, which ``hf-dualadam compare`` writes. A pair A:B is A minus B, seed by
seed, positive where A is better. p-values are corrected within a task by Holm's method, for the pairs shown.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_dualadam.extras import require_or_exit

require_or_exit("compare")

import pandas as pd

from hf_dualadam.lab.metric import Metric
from hf_dualadam.lab.plots import draw_differences
from hf_dualadam.lab.report import RESULTS, STUDY
from hf_dualadam.lab.significance import Difference, paired_differences, verdict


def differences(
    folders: list[Path], pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, tuple[Difference, Metric]]]:
    """The differences by pair and task, where both optimizers of the pair were run.

    A task that several folders have is named with its folder.

    Args:
        folders: output folders of comparisons.
        pairs: names of an optimizer and its reference.
    """
    references = {first: [b for a, b in pairs if a == first] for first, _ in pairs}
    found: dict[tuple[str, str], dict[str, tuple[Difference, Metric]]] = {pair: {} for pair in pairs}
    tables = {folder: pd.read_csv(folder / RESULTS).query("role == 'final'") for folder in folders}
    tasks = [task for table in tables.values() for task in table["task"].unique()]
    for folder, table in tables.items():
        study = json.loads((folder / STUDY).read_text(encoding="utf-8"))
        for task, runs in table.groupby("task", sort=False):
            metric, name = Metric(**study["metrics"][task]), task if tasks.count(task) == 1 else f"{folder}: {task}"
            for pair, difference in paired_differences(runs, "heldout_metric", references, metric.sign).items():
                found[pair][name] = difference, metric
    return found


def main(argv: list[str] | None = None) -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="A:B", type=_pair)
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args(argv)
    if missing := [
        folder / name for folder in args.folders for name in (RESULTS, STUDY) if not (folder / name).exists()
    ]:
        parser.error(f"{missing[0]}: no such file")
    found = {pair: rows for pair, rows in differences(args.folders, args.pairs).items() if rows}
    if not found:
        parser.error("no task has two seeds of both optimizers of a pair")
    for (optimizer, reference), rows in found.items():
        print(f"\n{optimizer} against {reference}\n")
        for task, (difference, metric) in rows.items():
            print(f"- {task}, {difference.pairs} seeds: {verdict(difference, metric.scale, metric.unit)}")
    caption = "Held-out difference, paired by seed: mean and 95 % interval; right of 0 is better."
    panels = {f"{a} minus {b}": rows for (a, b), rows in found.items()}
    draw_differences(args.output, caption, panels, share_range=True)
    print(f"\n{args.output}")


def _pair(text: str) -> tuple[str, str]:
    optimizer, _, reference = text.partition(":")
    if not optimizer or not reference or optimizer == reference:
        raise argparse.ArgumentTypeError(f"{text!r} should be two names A:B")
    return optimizer, reference


if __name__ == "__main__":
    main(sys.argv[1:])
