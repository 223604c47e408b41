"""The plots of a comparison, from its results alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from .comparison import CURVE_COLUMNS
from .significance import mean_interval

MARKERS = "osD^vP*X<>"
LINES = ("-", "--", "-.", ":")
PANELS_PER_ROW = 3

Draw = Callable[[Axes, str, pd.DataFrame], None]


def draw_all(runs: pd.DataFrame, curves: pd.DataFrame, metrics: dict[str, str], folder: Path) -> dict[str, str]:
    """Draw every figure that there are data for, one panel a task.

    Args:
        runs: the results, one row a run.
        curves: logged figures of the final runs, one row a run and step.
        metrics: name of each task's metric.
        folder: takes the PNG files.

    Returns:
        Captions by file name, in the order in which a report shows them.
    """
    style = _Style(list(dict.fromkeys(runs["optimizer"])))
    final = runs[runs["role"] == "final"]
    captions: dict[str, str] = {}

    def figure(name: str, caption: str, data: pd.DataFrame, draw: Draw, legend: bool = True) -> None:
        if not data.empty:
            _panels(folder / name, caption, data, draw, style.legend(set(data["optimizer"])) if legend else [])
            captions[name] = caption

    figure(
        "heldout.png",
        "Held-out metric: every seed (dots), mean and 95 % interval (bars).",
        final.dropna(subset="heldout_metric"),
        lambda axes, task, data: style.strip(
            axes, data, "heldout_metric", f"held-out {_words(metrics[task])} [%]", 100
        ),
        legend=False,
    )
    figure(
        "gap_metric.png",
        "Generalization gap of the metric, training minus held-out: every seed, mean and 95 % interval.",
        final.dropna(subset="gap_metric"),
        lambda axes, task, data: style.strip(
            axes, data, "gap_metric", f"gap of {_words(metrics[task])} [points]", 100
        ),
        legend=False,
    )
    figure(
        "gap_loss.png",
        "Generalization gap of the loss, held-out minus training: every seed, mean and 95 % interval.",
        final.dropna(subset="gap_loss"),
        lambda axes, task, data: style.strip(axes, data, "gap_loss", "gap of the loss [nats]", 1),
        legend=False,
    )
    figure(
        "sharpness_gap.png",
        "Sharpness (largest Hessian eigenvalue of the training loss) against the gap of the loss, one mark a run.",
        final[final["hessian_top_eigenvalue"] > 0].dropna(subset="gap_loss"),
        lambda axes, task, data: style.scatter(axes, data),
    )
    figure(
        "learning_rates.png",
        "Learning-rate sensitivity: selection metric, mean over the selection seeds; crosses at the foot: diverged.",
        runs[runs["role"] == "selection"],
        lambda axes, task, data: style.rates(axes, data, f"selection {_words(metrics[task])} [%]"),
    )
    logged = _with_budget(curves.reindex(columns=CURVE_COLUMNS), final)
    for column, what, label, scale in (
        ("loss", "Training loss", "training loss [nats]", 1),
        ("selection_loss", "Loss on the selection split", "selection loss [nats]", 1),
        ("selection_metric", "Metric on the selection split", "selection metric [%]", 100),
        ("alpha", "Weight alpha of the inverse update", "alpha", 1),
    ):
        figure(
            f"curves_{column}.png",
            f"{what} during training: mean over the seeds, the band spans all of them.",
            logged.dropna(subset=column),
            lambda axes, task, data, c=column, y=label, s=scale: style.curves(axes, data, c, y, s),
        )
    figure(
        "curves_inverse_share.png",
        "Norm of the inverse part over the norm of the whole update: mean over the seeds, the band spans all of them.",
        logged[logged["inverse_share"] > 0],
        lambda axes, task, data: style.curves(
            axes, data, "inverse_share", "inverse part of the update [%]", 100, "log"
        ),
    )
    return captions


class _Style:
    """Draws panels with one colour and marker per optimizer."""

    def __init__(self, optimizers: list[str]):
        colours = colormaps["tab10" if len(optimizers) <= 10 else "tab20"].colors
        self.optimizers = optimizers
        self.looks = {
            name: {
                "color": colours[i % len(colours)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": LINES[i % len(LINES)],  # shows curves that lie on each other
            }
            for i, name in enumerate(optimizers)
        }

    def legend(self, present: set[str]) -> list[Line2D]:
        """Handles for the optimizers that a figure shows."""
        return [Line2D([], [], label=name, **self.looks[name]) for name in self.optimizers if name in present]

    def _dots(self, name: str) -> dict:
        return {key: self.looks[name][key] for key in ("color", "marker")}

    def groups(self, data: pd.DataFrame):
        """The rows of each optimizer that has some."""
        for name in self.optimizers:
            rows = data[data["optimizer"] == name]
            if len(rows):
                yield name, rows

    def strip(self, axes: Axes, data: pd.DataFrame, column: str, label: str, scale: float) -> None:
        """One row of dots per optimizer, first on top."""
        names = [name for name, _ in self.groups(data)]
        for row, (name, rows) in enumerate(self.groups(data)):
            values = scale * rows[column].to_numpy(dtype=float)
            spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
            axes.scatter(values, row + np.asarray(spread), s=16, alpha=0.6, color=self.looks[name]["color"])
            mean, low, high = mean_interval(values)
            error = None if math.isnan(low) else [[mean - low], [high - mean]]
            axes.errorbar(mean, row, xerr=error, fmt="|", markersize=14, color="black", capsize=3, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)

    def scatter(self, axes: Axes, data: pd.DataFrame) -> None:
        """Gap of the loss over the largest eigenvalue."""
        for name, rows in self.groups(data):
            axes.scatter(rows["hessian_top_eigenvalue"], rows["gap_loss"], s=26, alpha=0.8, **self._dots(name))
        _log_x(axes)
        axes.set_xlabel("largest Hessian eigenvalue")
        axes.set_ylabel("gap of the loss [nats]")
        axes.grid(alpha=0.3)

    def rates(self, axes: Axes, data: pd.DataFrame, label: str) -> None:
        """Selection metric over the learning rate; a rate at which a run failed gets a cross on the axis."""
        for name, rows in self.groups(data):
            good = rows.groupby("learning_rate")["status"].agg(lambda status: (status == "ok").all())
            mean = 100 * rows.groupby("learning_rate")["selection_metric"].mean()
            axes.plot(mean[good].index, mean[good], markersize=5, linewidth=1.2, **self.looks[name])
            failed = list(good.index[~good])
            foot = axes.get_xaxis_transform()
            axes.plot(failed, [0.02] * len(failed), "x", color=self.looks[name]["color"], transform=foot)
        _log_x(axes)
        axes.set_xlabel("learning rate")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)

    def curves(self, axes: Axes, data: pd.DataFrame, column: str, label: str, scale: float, yscale="linear") -> None:
        """Mean and range over the seeds against the budget that is spent."""
        for name, rows in self.groups(data):
            by_step = (scale * rows.set_index("budget")[column]).groupby(level=0).agg(["mean", "min", "max"])
            colour = self.looks[name]["color"]
            axes.plot(by_step.index, by_step["mean"], linewidth=1.4, markersize=4, **self.looks[name])
            axes.fill_between(by_step.index, by_step["min"], by_step["max"], color=colour, alpha=0.15, linewidth=0)
        axes.set_yscale(yscale)
        axes.set_xlabel("training [% of the gradients]")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)


def _panels(path: Path, caption: str, data: pd.DataFrame, draw: Draw, legend: list[Line2D]) -> None:
    """Draw one panel per task under the caption, and one legend below them all."""
    tasks = list(dict.fromkeys(data["task"]))
    columns = min(PANELS_PER_ROW, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    height = max(3.4, 0.3 * data["optimizer"].nunique() + 1.4)
    figure = Figure(figsize=(max(4.6 * columns, 6.4), height * rows + 0.7), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, task in zip(grid.flat, tasks):
        draw(axes, task, data[data["task"] == task])
        axes.set_title(task)
    for axes in grid.flat[len(tasks) :]:
        axes.remove()
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)), fontsize=9)
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(caption, int(13 * width)), fontsize=10)
    figure.savefig(path)


def _log_x(axes: Axes) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _with_budget(curves: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Add how much of the budget was spent at each step, in percent: optimizers differ in gradients a step."""
    steps = final.groupby(["task", "optimizer"])["steps"].first().rename("steps").reset_index()
    merged = curves.merge(steps, on=["task", "optimizer"], how="inner")
    return merged.assign(budget=100 * merged["step"] / merged["steps"])


def _words(metric: str) -> str:
    return metric.replace("_", " ")
