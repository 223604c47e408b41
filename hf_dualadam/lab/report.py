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
from .metric import Metric
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
    """Write the files on which the report is based, each atomically.

    Args:
        folder: folder of the comparison.
        rows: the finished runs, by column of ``COLUMNS``.
        curves: logs of the final runs.
        study: the settings (see :mod:`hf_dualadam.lab.compare`).
    """
    _replace(folder / RESULTS, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    _replace(folder / CURVES, pd.DataFrame(curves, columns=CURVE_COLUMNS).to_csv(index=False))
    _replace(folder / STUDY, json.dumps(study, indent=2) + "\n")


def write_report(folder: Path) -> Path:
    """Build the report and its plots from the results in ``folder``.

    Args:
        folder: folder with results.csv, curves.csv and study.json.

    Returns:
        The path of the report.

    Raises:
        InputError: a file is missing, or no run has finished yet.
    """
    try:
        runs, curves = pd.read_csv(folder / RESULTS), pd.read_csv(folder / CURVES)
        study = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"output_dir: {folder} holds no results to report on ({error.filename} is missing)") from None
    if "references" not in study:
        raise InputError(
            f"output_dir: {folder / STUDY} was written by an older version; run the comparison again for a report"
        )
    if runs.empty:
        raise InputError(f"output_dir: no run of {folder} has finished yet")
    report = _Report(runs, study)
    captions = draw_all(runs, curves, report.metrics, report.differences, folder)
    _replace(folder / REPORT, report.text(captions))
    return folder / REPORT


class _Report:
    """The report's sections."""

    def __init__(self, runs: pd.DataFrame, study: dict[str, Any]):
        self.runs, self.study = runs, study
        self.final = runs[runs["role"] == "final"]
        self.tasks = [task for task in study["tasks"] if task in set(self.final["task"])]
        self.metrics = {task: Metric(**metric) for task, metric in study["metrics"].items()}
        self.references = {name: _references(name, study) for name in study["optimizers"]}
        self.differences = {
            task: paired_differences(self._of(task), "heldout_metric", self.references, self.metrics[task].sign)
            for task in self.tasks
        }

    def text(self, captions: dict[str, str]) -> str:
        """The whole report in Markdown."""
        shown_first = [name for name in ("differences.png", "heldout.png") if name in captions][:1]
        sections = [
            f"# {self.study['name']}",
            f"**Question.** {self.study['question']}",
            "## Answer",
            *self._answer(),
            *(_picture(name, captions[name]) for name in shown_first),
            *(part for task in self.tasks for part in self._task(task)),
            "## How much of the update is inverse",
            *self._shares(),
            "## Sharpness and generalization",
            *self._flatness(),
            "## Learning rates",
            *self._rates(),
            "## Failed runs",
            *self._failures(),
            "## Protocol",
            *self._protocol(),
            "## Plots",
            *(_picture(name, caption) for name, caption in captions.items() if name not in shown_first),
            "## How to reproduce it",
            f"```\n{self.study['command']}\n```",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in self.study["versions"].items()) + ".",
        ]
        return "\n\n".join(sections) + "\n"

    def _of(self, task: str) -> pd.DataFrame:
        return self.final[self.final["task"] == task]

    def _answer(self) -> Iterable[str]:
        if len(self.runs) < self.study["runs"]:
            yield f"**Not finished: {len(self.runs)} of {self.study['runs']} runs have finished so far.**"
        yield from self._summaries()
        verdicts = [
            f"- {optimizer} on {task}: {verdict(difference, self.metrics[task].scale, self.metrics[task].unit)}."
            for optimizer, setting in self.study["optimizers"].items()
            if setting["has_inverse"]
            for task in self.tasks
            for (name, _), difference in self.differences[task].items()
            if name == optimizer
        ]
        if verdicts:
            yield "\n".join(verdicts)
        else:
            yield "No optimizer with an inverse part has two seeds in common with a reference, so there is no answer."
        shared = [task for task in self.tasks if self.study["tasks"][task]["shares_selection"]]
        if shared:
            yield (
                f"**The learning rate and the final score use the same data** for {_list(shared)}, since the script "
                "scores no other data. This makes the scores of all optimizers a little too good."
            )

    def _summaries(self) -> Iterable[str]:
        """One sentence per reference on how the optimizers with an inverse part compare with it."""
        ours = [name for name, setting in self.study["optimizers"].items() if setting["has_inverse"]]
        references = dict.fromkeys(reference for name in ours for reference in self.references[name])
        for reference in references:
            found = {
                f"{name} on {task}": difference
                for name in ours
                for task in self.tasks
                if (difference := self.differences[task].get((name, reference)))
            }
            better = [what for what, difference in found.items() if difference.significant and difference.mean > 0]
            worse = [what for what, difference in found.items() if difference.significant and difference.mean < 0]
            if found:
                yield (
                    f"**Compared with {reference}**, significantly better: {_list(better) or 'none'}; significantly "
                    f"worse: {_list(worse) or 'none'}; no significant difference: "
                    f"{len(found) - len(better) - len(worse)} of {len(found)}."
                )

    def _protocol(self) -> Iterable[str]:
        study, sharpness = self.study, self.study["sharpness"]
        counts = sorted({len(rates) for of_task in study["learning_rates"].values() for rates in of_task.values()})
        chosen = (
            f"each optimizer gets the same number of learning rates ({_list(counts)}); the rate is chosen by the "
            f"selection metric (seeds {_list(study['selection_seeds'])}; ties go to the lower loss), then the"
            if counts != [1]
            else "there is one learning rate, so nothing is chosen; the"
        )
        yield (
            f"Every optimizer gets the same budget of gradients, and {chosen} seeds {_list(study['seeds'])} are run "
            "and scored once on the held-out data. Equal seeds share initial weights and data order, so differences "
            "are taken seed by seed: paired t tests, with Holm's correction over all differences of a task; better "
            f'and worse are claimed below p = {SIGNIFICANT:g}. "Within X with 95 % confidence" gives the smallest '
            "margin at which two one-sided paired t tests at 5 % (TOST) show equivalence. Fractions are multiplied by "
            "100. Diverged runs count with their last score; crashed ones have no score and are listed."
        )
        kinds = [name for name, task in study["tasks"].items() if not task["is_script"]]
        if kinds:
            yield (
                "The selection split is taken from the training data. The training metric and loss are measured "
                "after training, on at most as many training examples as there are held-out ones, with the labels "
                "used for training. Gaps: how much worse the held-out metric is than the training metric; held-out "
                "minus training loss. Sharpness is that of the training loss on a fixed set of "
                f"{sharpness['examples']} training examples, without dropout: largest Hessian eigenvalue (Lanczos, "
                f"{sharpness['lanczos_steps']} products), trace (Hutchinson, {sharpness['trace_samples']} products), "
                f"and loss rise at distance {sharpness['rho']:g} along the gradient. Time is that of training alone; "
                "memory is the peak of the process during the run."
            )
        scripts = {name: task for name, task in study["tasks"].items() if task["is_script"]}
        for name, task in scripts.items():
            yield (
                f"{name} is `{task['script'] or task['module']}`, run unmodified, which itself determines the data it "
                f"trains and scores on. Learning rates are chosen by `{task['metric']}`; the final score is "
                f"`{task['heldout_metric'] or task['metric']}`. Training metric, gaps and sharpness are not measured."
            )
        rows = [
            {
                "task": name,
                "metric": self.metrics[name].words,
                "steps": task["steps"] or "set by the script",
                "training / selection / held out": " / ".join(
                    str(task[f"{part}_examples"]) for part in ("train", "selection", "heldout")
                ),
                "majority class": _number(task["majority"], self.metrics[name].scale),
            }
            for name, task in study["tasks"].items()
            if name in kinds
        ]
        if rows:
            yield _table(rows)
        noisy = [
            f"{task['label_noise']:.0%} on {name}" for name, task in study["tasks"].items() if task["label_noise"]
        ]
        if noisy:
            yield f"Random training labels: {', '.join(noisy)}."
        yield _table(
            {
                "optimizer": name,
                "base": setting["base"],
                "options": setting["optim_args"],
                "gradients per step": setting["gradients_per_step"],
            }
            for name, setting in study["optimizers"].items()
        )

    def _task(self, task: str) -> Iterable[str]:
        data, metric = self._of(task), self.metrics[task]
        yield f"## {task}"
        yield (
            f"Mean ± half the 95 % interval over {data['seed'].nunique()} seeds, {metric.label}. Differences are "
            "positive if the optimizer is better than the reference; p-values are corrected."
        )
        found = self.differences[task]
        references = [name for name in self._optimizers(data) if any(pair[1] == name for pair in found)]
        scores = {
            name: {
                "optimizer": name,
                "rate": f"{self._of_optimizer(data, name)['learning_rate'].iloc[0]:.3g}",
                "held out": _interval(mean_interval(self._of_optimizer(data, name)["heldout_metric"]), metric.scale),
            }
            for name in self._optimizers(data)
        }
        differences = {
            name: {f"to {reference}": _difference(found.get((name, reference)), metric) for reference in references}
            for name in scores
        }
        if len(references) <= 2:
            yield _table(scores[name] | differences[name] for name in scores)
        else:  # two narrow tables
            yield _table(scores.values())
            yield _table({"optimizer": name} | differences[name] for name in scores)
        yield from self._measures(
            data,
            {
                f"training {metric.words}": ("train_metric", metric.scale),
                f"gap [{metric.unit}]": ("gap_metric", metric.scale),
                "held-out loss": ("heldout_loss", 1),
                "gap of the loss": ("gap_loss", 1),
            },
        )
        yield from self._measures(
            data,
            {
                "top eigenvalue": ("hessian_top_eigenvalue", 1),
                "trace": ("hessian_trace", 1),
                "loss rise in the ball": ("ball_sharpness", 1),
            },
        )
        costs = {"steps": "steps", "seconds": "seconds", "memory [MiB]": "peak_memory_mb"}
        yield _table(
            {"optimizer": name}
            | {label: _number(self._of_optimizer(data, name)[column].mean()) for label, column in costs.items()}
            for name in self._optimizers(data)
        )

    def _measures(self, data: pd.DataFrame, columns: dict[str, tuple[str, float]]) -> Iterable[str]:
        """A table of means with half their 95 % intervals, of the columns that were measured."""
        measured = {label: column for label, column in columns.items() if data[column[0]].notna().any()}
        if measured:
            yield _table(
                {"optimizer": name}
                | {
                    label: _interval(mean_interval(self._of_optimizer(data, name)[column]), scale)
                    for label, (column, scale) in measured.items()
                }
                for name in self._optimizers(data)
            )

    @staticmethod
    def _of_optimizer(data: pd.DataFrame, name: str) -> pd.DataFrame:
        return data[data["optimizer"] == name]

    def _shares(self) -> Iterable[str]:
        inverse = [name for name, setting in self.study["optimizers"].items() if setting["has_inverse"]]
        data = self.final[self.final["optimizer"].isin(inverse)].dropna(subset=list(SHARE_POINTS), how="all")
        if data.empty and inverse:
            yield "The inverse share was not logged."
            return
        if data.empty:
            yield "No optimizer of this comparison has an inverse part."
            return
        yield (
            "Norm of the inverse part over the norm of the whole update, in percent, after 1 %, 10 % and 50 % of the "
            "steps (mean over the seeds). Below 1 %, the run is in effect AdamW with a linear warm-up."
        )
        mean = 100 * data.groupby(["task", "optimizer"], sort=False)[list(SHARE_POINTS)].mean()
        mean.columns = [f"at {share:.0%} of the steps" for share in SHARE_POINTS.values()]
        yield _table(mean.map(_number).reset_index().to_dict("records"))

    def _flatness(self) -> Iterable[str]:
        measured = self.final.dropna(subset="hessian_top_eigenvalue")
        if measured.empty:
            yield "Sharpness was not measured."
            return
        for task in self.tasks:
            lines = []
            data = measured[measured["task"] == task]
            correlation = rank_correlation(data["hessian_top_eigenvalue"], data["gap_loss"])
            if correlation:
                rho, p_value, count = correlation
                lines.append(
                    f"{task}: over all {count} runs, the rank correlation of the largest eigenvalue with the gap of "
                    f"the loss is {rho:+.2f} (p = {p_value:.2g})."
                )
            # On a logarithmic scale, since eigenvalues differ by factors.
            positive = data[data["hessian_top_eigenvalue"] > 0]
            logs = positive.assign(log_eigenvalue=-np.log(positive["hessian_top_eigenvalue"]))
            for pair, difference in paired_differences(logs, "log_eigenvalue", self.references).items():
                if self.study["optimizers"][pair[0]]["has_inverse"]:
                    lines.append(f"- {_flatness_verdict(difference)}")
            yield "\n".join([*lines[:1], "", *lines[1:]] if correlation else [f"{task}:", "", *lines])

    def _rates(self) -> Iterable[str]:
        at_edge = []
        for (task, optimizer), own in self.final.groupby(["task", "optimizer"], sort=False):
            chosen, tried = own["learning_rate"].iloc[0], self.study["learning_rates"][task][optimizer]
            if len(tried) > 1 and chosen in (min(tried), max(tried)):
                at_edge.append(f"{optimizer} on {task} ({chosen:.3g} of {', '.join(f'{rate:.3g}' for rate in tried)})")
        if at_edge:
            yield "The chosen rate is the lowest or highest tried for: " + "; ".join(at_edge) + "."
        else:
            yield "No chosen rate is at the edge of the range tried."

    def _failures(self) -> Iterable[str]:
        failed = self.runs[self.runs["status"] != "ok"]
        if failed.empty:
            yield f"None of the {len(self.runs)} runs failed."
            return
        yield f"{len(failed)} of the {len(self.runs)} runs failed."
        yield _table(
            {
                "task": run["task"],
                "optimizer": run["optimizer"],
                "rate": f"{run['learning_rate']:.3g}",
                "run": f"{run['role']}, seed {run['seed']}",
                "status": str(run["status"]).replace("|", "/"),
            }
            for run in failed.to_dict("records")
        )

    def _optimizers(self, data: pd.DataFrame) -> list[str]:
        return [name for name in self.study["optimizers"] if name in set(data["optimizer"])]


def _references(name: str, study: dict[str, Any]) -> list[str]:
    """The references of a comparison.

    By default AdamW, and AdamW with the warm-up of the same length (or the first one).
    """
    optimizers = study["optimizers"]
    if study["references"]:
        return [other for other in study["references"] if other != name]
    plain = [other for other, setting in optimizers.items() if setting["base"] == "adamw"]
    warmed = [other for other, setting in optimizers.items() if setting["base"] == "adamw_warmup"]
    fraction = optimizers[name]["switch_fraction"]
    same = [other for other in warmed if optimizers[other]["switch_fraction"] == fraction]
    return [other for other in plain[:1] + (same or warmed)[:1] if other != name]


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
    if scale == 1:
        return f"{_number(mean)} ± {_number((high - low) / 2)}"
    return f"{mean:.2f} ± {(high - low) / 2:.2f}"


def _difference(difference: Difference | None, metric: Metric) -> str:
    if difference is None:
        return ""
    shown = metric.scale * difference.mean
    text = f"{shown:+.2f}" if metric.is_fraction else f"{shown:+.3g}"
    return f"{text} (p = {difference.p_corrected:.2g})"


def _table(rows: Iterable[dict[str, Any]]) -> str:
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _picture(name: str, caption: str) -> str:
    return f"![{caption}]({name})\n\n*{caption}*"


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three digits, without an exponent if that is readable."""
    if value is None or math.isnan(value):
        return "-"
    value *= scale
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
