"""Plot the learning curves of one run as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"training (mean since the last point)": "C0", "held-out": "C1", "training examples, at the end": "C2"}


def plot_learning_curves(log_history: Sequence[dict[str, Any]], metric: str, path: Path, title: str) -> None:
    """Draw loss, held-out metric and alpha against the optimizer steps; panels without data are omitted.

    Args:
        log_history: ``trainer.state.log_history``.
        metric: name of the metric without prefix: "accuracy".
        path: where to write the PNG.
        title: above the panels.
    """
    panels = {
        "loss": {
            "training (mean since the last point)": "loss",
            "held-out": "eval_loss",
            "training examples, at the end": "train_eval_loss",
        },
        metric.replace("_", " "): {
            "held-out": f"eval_{metric}",
            "training examples, at the end": f"train_eval_{metric}",
        },
        "alpha and inverse share (0 to 1)": {"alpha": "alpha", "inverse share of the update": "inverse_share"},
    }
    curves = {
        label: {name: curve for name, key in lines.items() if (curve := _curve(log_history, key))[0]}
        for label, lines in panels.items()
    }
    curves = {label: lines for label, lines in curves.items() if lines}
    if not curves:
        return
    figure = Figure(figsize=(4.6 * len(curves), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axis, (label, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, (steps, values) in lines.items():
            axis.plot(steps, values, label=name, color=COLORS.get(name), marker="o" if len(steps) < 12 else None)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        # Below the panel: within it, the legend would cover curves.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    figure.savefig(path, dpi=120)


def _curve(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged quantity; of two values at the same step, the later one is used."""
    points = {entry["step"]: entry[key] for entry in log_history if key in entry}
    return list(points), list(points.values())
