"""The plots of a comparison, from its results."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from .comparison import CURVE_COLUMNS
from .metric import Metric
from .significance import Difference, mean_interval

# Okabe and Ito's colors, which color-blind readers can distinguish, except yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP*"
LINES = ("-", "--", "-.", ":")
SERIES_PER_PANEL = 7
PANELS_PER_ROW = 3
PANEL_WIDTH = 4.6

Draw = Callable[[Axes, str, pd.DataFrame], None]


def draw_all(
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    metrics: Mapping[str, Metric],
    differences: Mapping[str, Mapping[tuple[str, str], Difference]],
    folder: Path,
) -> dict[str, str]:
    """Draw all plots for which there are data.

    Args:
        runs: the results, one row per run.
        curves: logged values of the final runs, one row per run and step.
        metrics: each task's metric.
        differences: paired differences by task.
        folder: folder for the PNG files.

    Returns:
        Captions by file name, in the order in which a report shows them.
    """
    style = _Style(list(dict.fromkeys(runs["optimizer"])))
    final = runs[runs["role"] == "final"]
    captions: dict[str, str] = {}

    def rows(name: str, caption: str, column: str, label: Callable[[str], str], scale: Callable[[str], float]) -> None:
        """One row per optimizer in each panel."""
        data = final.dropna(subset=column)
        if not data.empty:
            _panels(
                folder / name,
                caption,
                {task: (part, "") for task, part in data.groupby("task", sort=False)},
                lambda axes, task, part: style.strip(axes, part, column, label(task), scale(task)),
                height=max(2.6, 0.32 * data["optimizer"].nunique() + 1.2),
            )
            captions[name] = caption

    def series(name: str, caption: str, data: pd.DataFrame, draw: Draw, *, lines: bool = True) -> None:
        """One series per optimizer, distributed over several panels if there are many."""
        if data.empty:
            return
        groups = style.groups_of(set(data["optimizer"]))
        parts = {
            f"{task} ({index + 1} of {len(groups)})" if len(groups) > 1 else task: (part, task)
            for task, rows_of_task in data.groupby("task", sort=False)
            for index, group in enumerate(groups)
            if not (part := rows_of_task[rows_of_task["optimizer"].isin(group)]).empty
        }
        _panels(
            folder / name,
            caption,
            parts,
            lambda axes, title, part: (draw(axes, parts[title][1], part), style.legend(axes, part, lines)),
            height=4.4,
            share_within_task=len(groups) > 1,
        )
        captions[name] = caption

    rows(
        "heldout.png",
        "Held-out metric: every seed (dots), mean and 95 % interval (bars).",
        "heldout_metric",
        lambda task: f"held-out {metrics[task].label}",
        lambda task: metrics[task].scale,
    )
    if any(differences.values()):
        caption = "Difference to each reference, paired by seed: mean and 95 % interval; right of 0 is better."
        panels = {
            f"{task}: to {reference}": {
                d.optimizer: (d, metrics[task]) for d in of_task.values() if d.reference == reference
            }
            for task, of_task in differences.items()
            for reference in dict.fromkeys(pair[1] for pair in of_task)
        }
        draw_differences(folder / "differences.png", caption, panels)
        captions["differences.png"] = caption
    rows(
        "gap_metric.png",
        "Generalization gap of the metric: every seed (dots), mean and 95 % interval (bars).",
        "gap_metric",
        lambda task: f"gap of {metrics[task].words} [{metrics[task].unit}]",
        lambda task: metrics[task].scale,
    )
    rows(
        "gap_loss.png",
        "Generalization gap of the loss, held-out minus training: every seed, mean and 95 % interval.",
        "gap_loss",
        lambda task: "gap of the loss [nats]",
        lambda task: 1.0,
    )
    series(
        "sharpness_gap.png",
        "Sharpness (largest Hessian eigenvalue of the training loss) against the gap of the loss, one mark per run.",
        final[final["hessian_top_eigenvalue"] > 0].dropna(subset="gap_loss"),
        lambda axes, task, data: style.scatter(axes, data),
        lines=False,
    )
    series(
        "learning_rates.png",
        "Learning-rate sensitivity: mean selection metric over its seeds; crosses at the bottom: failed runs.",
        runs[runs["role"] == "selection"],
        lambda axes, task, data: style.rates(axes, data, metrics[task]),
    )
    logged = _with_budget(curves.reindex(columns=CURVE_COLUMNS), final)
    for column, what, label, scale in (
        ("loss", "Training loss", lambda m: "training loss [nats]", lambda m: 1.0),
        ("selection_loss", "Loss on the selection split", lambda m: "selection loss [nats]", lambda m: 1.0),
        ("selection_metric", "Metric on the selection split", lambda m: f"selection {m.label}", lambda m: m.scale),
        ("alpha", "Weight alpha of the inverse update", lambda m: "alpha", lambda m: 1.0),
    ):
        series(
            f"curves_{column}.png",
            f"{what} during training: mean over the seeds, with their range as a band.",
            logged.dropna(subset=column),
            lambda axes, task, data, c=column, y=label, s=scale: style.curves(
                axes, data, c, y(metrics[task]), s(metrics[task])
            ),
        )
    series(
        "curves_inverse_share.png",
        "Norm of the inverse part over the norm of the whole update: mean over the seeds, with their range as a band.",
        logged[logged["inverse_share"] > 0],
        lambda axes, task, data: style.curves(
            axes, data, "inverse_share", "inverse part of the update [%]", 100, "log"
        ),
    )
    return captions


def draw_differences(
    path: Path,
    caption: str,
    panels: Mapping[str, Mapping[str, tuple[Difference, Metric]]],
    *,
    share_range: bool = False,
) -> None:
    """Draw means and 95 % intervals of differences, one row each, with a line at 0.

    Args:
        path: path of the PNG file.
        caption: caption of the figure.
        panels: by title, the rows of a panel by name: a difference and its metric.
        share_range: give all panels the same horizontal range.
    """
    _panels(
        path,
        caption,
        {title: (rows, "") for title, rows in panels.items()},
        _forest,
        height=max(2.6, 0.32 * max(map(len, panels.values())) + 1.2),
        share_x=share_range,
    )


class _Style:
    """Draws panels in which an optimizer always has the same color and marker."""

    def __init__(self, optimizers: list[str]):
        self.optimizers = optimizers
        count = math.ceil(len(optimizers) / SERIES_PER_PANEL)
        size = math.ceil(len(optimizers) / count)
        self.groups = [optimizers[start : start + size] for start in range(0, len(optimizers), size)]
        self.looks = {
            name: {"color": COLORS[i], "marker": MARKERS[i], "linestyle": LINES[i % len(LINES)]}
            for group in self.groups
            for i, name in enumerate(group)
        }

    def groups_of(self, present: set[str]) -> list[list[str]]:
        """Divide the optimizers of a plot into groups that fit in a panel."""
        groups = [[name for name in group if name in present] for group in self.groups]
        return [group for group in groups if group]

    def legend(self, axes: Axes, data: pd.DataFrame, lines: bool) -> None:
        """Draw the legend below the panel."""
        names = [name for name, _ in self._by_optimizer(data)]
        looks = {name: self.looks[name] if lines else self._dots(name) | {"linestyle": ""} for name in names}
        handles = [Line2D([], [], label=name, markersize=5, **looks[name]) for name in names]
        axes.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2,
            fontsize=8,
            frameon=False,
            handlelength=3,
        )

    def _dots(self, name: str) -> dict:
        return {key: self.looks[name][key] for key in ("color", "marker")}

    def _by_optimizer(self, data: pd.DataFrame):
        for name in self.optimizers:
            rows = data[data["optimizer"] == name]
            if len(rows):
                yield name, rows

    def strip(self, axes: Axes, data: pd.DataFrame, column: str, label: str, scale: float) -> None:
        """One row of dots per optimizer, first on top."""
        names = [name for name, _ in self._by_optimizer(data)]
        for row, (_, rows) in enumerate(self._by_optimizer(data)):
            values = scale * rows[column].to_numpy(dtype=float)
            spread = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0.0]
            axes.scatter(values, row + np.asarray(spread), s=14, alpha=0.6, color=COLORS[0], linewidths=0)
            _bar(axes, row, *mean_interval(values))
        _name_rows(axes, names, label)

    def scatter(self, axes: Axes, data: pd.DataFrame) -> None:
        """Gap of the loss over the largest eigenvalue."""
        for name, rows in self._by_optimizer(data):
            axes.scatter(rows["hessian_top_eigenvalue"], rows["gap_loss"], s=26, alpha=0.8, **self._dots(name))
        _log_x(axes)
        axes.set_xlabel("largest Hessian eigenvalue")
        axes.set_ylabel("gap of the loss [nats]")
        axes.grid(alpha=0.3)

    def rates(self, axes: Axes, data: pd.DataFrame, metric: Metric) -> None:
        """Selection metric over the learning rate; rates with failed runs are marked by a cross on the axis."""
        for name, rows in self._by_optimizer(data):
            good = rows.groupby("learning_rate")["status"].agg(lambda status: (status == "ok").all())
            mean = metric.scale * rows.groupby("learning_rate")["selection_metric"].mean()
            axes.plot(mean[good].index, mean[good], markersize=5, linewidth=1.2, **self.looks[name])
            failed = list(good.index[~good])
            foot = axes.get_xaxis_transform()
            axes.plot(failed, [0.02] * len(failed), "x", color=self.looks[name]["color"], transform=foot)
        _log_x(axes)
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"selection {metric.label}")
        axes.grid(alpha=0.3)

    def curves(self, axes: Axes, data: pd.DataFrame, column: str, label: str, scale: float, yscale="linear") -> None:
        """Mean and range over the seeds against the fraction of the training."""
        for name, rows in self._by_optimizer(data):
            by_step = (scale * rows.set_index("budget")[column]).groupby(level=0).agg(["mean", "min", "max"])
            color = self.looks[name]["color"]
            axes.plot(by_step.index, by_step["mean"], linewidth=1.4, markersize=4, **self.looks[name])
            axes.fill_between(by_step.index, by_step["min"], by_step["max"], color=color, alpha=0.12, linewidth=0)
        axes.set_yscale(yscale)
        axes.set_xlabel("training [% of the gradients]")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)


def _forest(axes: Axes, title: str, rows: Mapping[str, tuple[Difference, Metric]]) -> None:
    axes.axvline(0, color="0.6", linewidth=1, zorder=0)
    for row, (difference, metric) in enumerate(rows.values()):
        _bar(axes, row, *(metric.scale * value for value in (difference.mean, difference.low, difference.high)))
    _name_rows(axes, list(rows), f"difference [{' or '.join(dict.fromkeys(m.unit for _, m in rows.values()))}]")


def _bar(axes: Axes, row: int, mean: float, low: float, high: float) -> None:
    error = None if math.isnan(low) else [[mean - low], [high - mean]]
    axes.errorbar(mean, row, xerr=error, fmt="|", markersize=12, color="black", capsize=3, linewidth=1)


def _name_rows(axes: Axes, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def _panels(
    path: Path,
    caption: str,
    parts: dict,
    draw: Callable,
    *,
    height: float,
    share_within_task: bool = False,
    share_x: bool = False,
) -> None:
    """Draw one panel per part under a caption.

    Args:
        path: path of the PNG file.
        caption: caption of the figure.
        parts: (data, task) by title.
        draw: draws the data of a title on its axes.
        height: height of a panel in inches.
        share_within_task: give the panels of a task the same vertical range.
        share_x: give all panels the same horizontal range.
    """
    rows = math.ceil(len(parts) / PANELS_PER_ROW)
    columns = math.ceil(len(parts) / rows)
    width = max(PANEL_WIDTH * columns, 6.4)
    figure = Figure(figsize=(width, height * rows + 0.6), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x)
    by_task: dict[str, list[Axes]] = {}
    for axes, (title, (data, task)) in zip(grid.flat, parts.items(), strict=False):
        draw(axes, title, data)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelbottom=True)  # panels that share a range have them in the last row only
        by_task.setdefault(task, []).append(axes)
    for together in by_task.values() if share_within_task else ():
        lows, highs = zip(*(axes.get_ylim() for axes in together), strict=True)
        for axes in together:
            axes.set_ylim(min(lows), max(highs))
    for axes in grid.flat[len(parts) :]:
        axes.remove()
    figure.suptitle(textwrap.fill(caption, int(13 * width)), fontsize=10)
    figure.savefig(path)


def _log_x(axes: Axes) -> None:
    """Use a logarithmic axis with plain numbers at 1, 2 and 5 of each decade, or only at 1 if there are many."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    many = math.log10(high / low) > 2.5
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _with_budget(curves: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Add the spent budget at each step in percent, since optimizers differ in gradients per step."""
    steps = final.groupby(["task", "optimizer"])["steps"].first().rename("steps").reset_index()
    merged = curves.merge(steps, on=["task", "optimizer"], how="inner")
    return merged.assign(budget=100 * merged["step"] / merged["steps"])
