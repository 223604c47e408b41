"""``report.md`` and its plots, from ``results.csv``, ``curves.csv`` and ``study.json`` of a comparison."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..finetuning.config import InputError
from .comparison import COLUMNS, CURVE_COLUMNS, SHARE_POINTS
from .plots import draw_all
from .significance import (
    SIGNIFICANT,
    Difference,
    Interval,
    mean_interval,
    paired_differences,
    rank_correlation,
    verdict,
)

RESULTS, CURVES, STUDY, REPORT = "results.csv", "curves.csv", "study.json", "report.md"


def write_results(
    folder: Path, rows: list[dict[str, Any]], curves: list[dict[str, Any]], study: dict[str, Any]
) -> None:
    """Write what the report is made from; a reader of the files never sees half of one.

    Args:
        folder: of the comparison.
        rows: the finished runs, by column of ``COLUMNS``.
        curves: what was logged in the final runs.
        study: the settings (see :func:`describe_study` in ``scripts/compare_optimizers.py``).
    """
    _replace(folder / RESULTS, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    _replace(folder / CURVES, pd.DataFrame(curves, columns=CURVE_COLUMNS).to_csv(index=False))
    _replace(folder / STUDY, json.dumps(study, indent=2) + "\n")


def write_report(folder: Path) -> Path:
    """Build the report and its plots from the results in ``folder``.

    Args:
        folder: holds results.csv, curves.csv and study.json.

    Returns:
        The report's path.

    Raises:
        InputError: a file is missing, or no run has finished yet.
    """
    try:
        runs, curves = pd.read_csv(folder / RESULTS), pd.read_csv(folder / CURVES)
        study = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"output_dir: {folder} holds no results to report on ({error.filename} is missing)") from None
    if runs.empty:
        raise InputError(f"output_dir: no run of {folder} has finished yet")
    captions = draw_all(runs, curves, study["metrics"], folder)
    _replace(folder / REPORT, _Report(runs, study).text(captions))
    return folder / REPORT


class _Report:
    """The report's sections."""

    def __init__(self, runs: pd.DataFrame, study: dict[str, Any]):
        self.runs, self.study = runs, study
        self.final = runs[runs["role"] == "final"]
        self.tasks = [task for task in study["tasks"] if task in set(self.final["task"])]
        self.references = {name: _references(name, study["optimizers"]) for name in study["optimizers"]}
        self.differences = {
            task: paired_differences(self._of(task), "heldout_metric", self.references) for task in self.tasks
        }

    def text(self, captions: dict[str, str]) -> str:
        """The whole report in Markdown."""
        sections = [
            f"# {self.study['name']}",
            f"**Question.** {self.study['question']}",
            "## Answer",
            *self._answer(),
            "## Protocol",
            *self._protocol(),
            *(part for task in self.tasks for part in self._task(task)),
            "## How much of the update is inverse",
            *self._shares(),
            "## Sharpness and generalization",
            *self._flatness(),
            "## Learning rates",
            *self._rates(),
            "## Runs that failed",
            *self._failures(),
            "## Plots",
            *(f"**{caption}**\n\n![{caption}]({name})" for name, caption in captions.items()),
            "## How to repeat it",
            f"```\n{self.study['command']}\n```",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in self.study["versions"].items()) + ".",
        ]
        return "\n\n".join(sections) + "\n"

    def _of(self, task: str) -> pd.DataFrame:
        return self.final[self.final["task"] == task]

    def _answer(self) -> Iterable[str]:
        if len(self.runs) < self.study["runs"]:
            yield f"**Not finished: {len(self.runs)} of {self.study['runs']} runs are in.**"
        for optimizer, setting in self.study["optimizers"].items():
            if not setting["has_inverse"]:
                continue
            for reference in self.references[optimizer]:
                found = {
                    t: d[optimizer, reference] for t, d in self.differences.items() if (optimizer, reference) in d
                }
                if found:
                    yield f"- {_summary(optimizer, reference, found)}"

    def _protocol(self) -> Iterable[str]:
        study, sharpness = self.study, self.study["sharpness"]
        yield (
            "Every optimizer gets the same budget of gradients and the same number of learning rates "
            f"({study['num_learning_rates']}, a factor {study['learning_rate_factor']:g} apart), centred on its usual "
            "range. The rate is chosen on a selection split carved out of the training data (seeds "
            f"{_list(study['selection_seeds'])}; best metric, ties broken by the loss), then the seeds "
            f"{_list(study['seeds'])} are run at that rate and scored once on the held-out data. Equal seeds share "
            "initial weights and data order, so differences are taken seed by seed: paired t tests, with Holm's "
            "correction over all differences of a task; a difference counts as shown below "
            f"p = {SIGNIFICANT:g}. Metrics are shown times 100. Diverged runs count with the score they reached; "
            "crashed ones have none and are listed."
        )
        yield (
            "The training metric and loss are measured after training, on as many training examples as there are "
            "held-out ones at most, with the labels used for training. Gaps: training minus held-out metric, held-out "
            "minus training loss. Sharpness is that of the training loss on a fixed set of "
            f"{sharpness['examples']} training examples, without dropout: largest Hessian eigenvalue (Lanczos, "
            f"{sharpness['lanczos_steps']} products), trace (Hutchinson, {sharpness['trace_samples']} products), and "
            f"loss rise at distance {sharpness['rho']:g} along the gradient. Time is that of the training alone; "
            "memory is the process's highest during the run."
        )
        rows = [
            {
                "task": name,
                "metric": _words(study["metrics"][name]),
                "steps": task["arguments"]["max_steps"],
                "training examples": task["train_examples"],
                "selection": task["selection_examples"],
                "held out": task["heldout_examples"],
                "random labels": f"{task['label_noise']:.0%}",
                "majority class": _number(task["majority"], 100),
            }
            for name, task in study["tasks"].items()
        ]
        yield pd.DataFrame(rows).to_markdown(index=False)
        yield pd.DataFrame(
            {
                "optimizer": name,
                "is": s["base"],
                "options": s["optim_args"],
                "gradients a step": s["gradients_per_step"],
            }
            for name, s in study["optimizers"].items()
        ).to_markdown(index=False)

    def _task(self, task: str) -> Iterable[str]:
        data, metric = self._of(task), _words(self.study["metrics"][task])
        yield f"## {task}"
        rows = []
        for name in self._optimizers(data):
            own = data[data["optimizer"] == name]
            row = {"optimizer": name, "rate": f"{own['learning_rate'].iloc[0]:.3g}"}
            row[f"held-out {metric}"] = _interval(mean_interval(own["heldout_metric"]), 100)
            for reference in self._all_references():
                row[f"to {reference}"] = _difference(self.differences[task].get((name, reference)))
            row |= {"gap of metric": _interval(mean_interval(own["gap_metric"]), 100)}
            row |= {"gap of loss": _interval(mean_interval(own["gap_loss"]), 1)}
            rows.append(row)
        yield f"Mean and 95 % interval over {data['seed'].nunique()} seeds; differences with their corrected p-value."
        yield pd.DataFrame(rows).to_markdown(index=False)
        columns = {
            "training loss": ("train_loss", 1),
            "held-out loss": ("heldout_loss", 1),
            "top eigenvalue": ("hessian_top_eigenvalue", 1),
            "trace": ("hessian_trace", 1),
            "rise in the ball": ("ball_sharpness", 1),
            "seconds": ("seconds", 1),
            "memory [MiB]": ("peak_memory_mb", 1),
        }
        yield pd.DataFrame(
            {"optimizer": name}
            | {
                label: _number(data.loc[data["optimizer"] == name, column].mean(), scale)
                for label, (column, scale) in columns.items()
            }
            for name in self._optimizers(data)
        ).to_markdown(index=False)
        for name, setting in self.study["optimizers"].items():
            own = [d for (optimizer, _), d in self.differences[task].items() if optimizer == name]
            if own and setting["has_inverse"]:
                yield f"- **{name}**: " + "; ".join(verdict(difference) for difference in own) + "."

    def _shares(self) -> Iterable[str]:
        data = self.final.dropna(subset=list(SHARE_POINTS), how="all")
        if data.empty:
            yield "No optimizer of this comparison has an inverse part."
            return
        yield (
            "Norm of the inverse part over the norm of the whole update, in percent, after 1 %, 10 % and 50 % of the "
            "steps (mean over the seeds). Below 1 % the run is in effect AdamW with a linear warm-up."
        )
        mean = 100 * data.groupby(["task", "optimizer"], sort=False)[list(SHARE_POINTS)].mean()
        mean.columns = [f"at {share:.0%} of the steps" for share in SHARE_POINTS.values()]
        yield mean.map(_number).reset_index().to_markdown(index=False)

    def _flatness(self) -> Iterable[str]:
        measured = self.final.dropna(subset="hessian_top_eigenvalue")
        if measured.empty:
            yield "Sharpness was not measured."
            return
        for task in self.tasks:
            data = measured[measured["task"] == task]
            correlation = rank_correlation(data["hessian_top_eigenvalue"], data["gap_loss"])
            if correlation:
                rho, p_value, count = correlation
                yield (
                    f"- {task}: over all {count} runs, the rank correlation of the largest eigenvalue with the gap of "
                    f"the loss is {rho:+.2f} (p = {p_value:.2g})."
                )
            # On a logarithmic scale, since eigenvalues differ by factors.
            positive = data[data["hessian_top_eigenvalue"] > 0]
            logs = positive.assign(log_eigenvalue=-np.log(positive["hessian_top_eigenvalue"]))
            for pair, difference in paired_differences(logs, "log_eigenvalue", self.references).items():
                if self.study["optimizers"][pair[0]]["has_inverse"]:
                    yield f"    - {_flatness_verdict(difference)}"

    def _rates(self) -> Iterable[str]:
        at_edge = []
        for (task, optimizer), own in self.final.groupby(["task", "optimizer"], sort=False):
            chosen, tried = own["learning_rate"].iloc[0], self.study["learning_rates"][task][optimizer]
            if len(tried) > 1 and chosen in (min(tried), max(tried)):
                at_edge.append(f"{optimizer} on {task} ({chosen:.3g} of {', '.join(f'{rate:.3g}' for rate in tried)})")
        if at_edge:
            yield "The chosen rate is the lowest or the highest that was tried for: " + "; ".join(at_edge) + "."
        else:
            yield "No optimizer's chosen rate is at the edge of the range that was tried."

    def _failures(self) -> Iterable[str]:
        failed = self.runs[self.runs["status"] != "ok"]
        if failed.empty:
            yield f"None of {len(self.runs)}."
            return
        yield f"{len(failed)} of {len(self.runs)}."
        columns = ["task", "optimizer", "learning_rate", "seed", "role", "status"]
        yield failed[columns].to_markdown(index=False, floatfmt=".3g")

    def _optimizers(self, data: pd.DataFrame) -> list[str]:
        return [name for name in self.study["optimizers"] if name in set(data["optimizer"])]

    def _all_references(self) -> list[str]:
        used = {name for names in self.references.values() for name in names}
        return [name for name in self.study["optimizers"] if name in used]


def _references(name: str, optimizers: dict[str, Any]) -> list[str]:
    """What an optimizer is compared with: AdamW, and AdamW with the warm-up of the same length (or the first one)."""
    plain = [other for other, setting in optimizers.items() if setting["base"] == "adamw"]
    warmed = [other for other, setting in optimizers.items() if setting["base"] == "adamw_warmup"]
    fraction = optimizers[name]["switch_fraction"]
    same = [other for other in warmed if optimizers[other]["switch_fraction"] == fraction]
    return [other for other in plain[:1] + (same or warmed)[:1] if other != name]


def _summary(optimizer: str, reference: str, found: dict[str, Difference]) -> str:
    better = [task for task, d in found.items() if d.significant and d.mean > 0]
    worse = [task for task, d in found.items() if d.significant and d.mean < 0]
    rest = len(found) - len(better) - len(worse)
    parts = [f"better on {len(better)} of {len(found)} tasks" + (f" ({_list(better)})" if better else "")]
    parts += [f"worse on {len(worse)}" + (f" ({_list(worse)})" if worse else "")]
    parts += [f"no difference shown on {rest}"]
    mean = 100 * sum(d.mean for d in found.values()) / len(found)
    return f"**{optimizer}** against {reference}: {', '.join(parts)}; mean difference {mean:+.2f} points."


def _flatness_verdict(difference: Difference) -> str:
    factor = math.exp(-difference.mean)
    text = f"{difference.optimizer}: largest eigenvalue {factor:.2f} times that of {difference.reference}"
    if not difference.significant:
        return f"{text}, no difference shown (corrected p = {difference.p_corrected:.2g})."
    return f"{text}: {'flatter' if difference.mean > 0 else 'sharper'} (corrected p = {difference.p_corrected:.2g})."


def _interval(interval: Interval, scale: float) -> str:
    mean, low, high = (scale * value for value in interval)
    if math.isnan(low):
        return _number(mean)
    return f"{mean:.2f} ± {(high - low) / 2:.2f}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{100 * difference.mean:+.2f} (p = {difference.p_corrected:.2g})"


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three figures, without an exponent where that is readable."""
    if value is None or math.isnan(value):
        return "-"
    value *= scale
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _replace(path: Path, text: str) -> None:
    """Write a file in one move."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
