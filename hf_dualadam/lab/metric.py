"""The metric of a task: its direction, and how its values are displayed."""

from __future__ import annotations

from typing import NamedTuple

# By the end of the name. Fractions are shown times 100, and their differences in points.
FRACTIONS = ("accuracy", "f1", "precision", "recall", "matthews_correlation", "pearson", "spearmanr", "auc")
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mse", "rmse", "mae", "wer", "cer")


class Metric(NamedTuple):
    """A task's metric.

    Attributes:
        name: without Trainer's prefix ``eval_``.
        greater_is_better: the direction.
    """

    name: str
    greater_is_better: bool

    @property
    def sign(self) -> int:
        """Factor of the metric that makes greater values better."""
        return 1 if self.greater_is_better else -1

    @property
    def is_fraction(self) -> bool:
        """Whether values are fractions of 1."""
        return self.name.endswith(FRACTIONS)

    @property
    def scale(self) -> float:
        """Factor of the values shown."""
        return 100.0 if self.is_fraction else 1.0

    @property
    def words(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ")

    @property
    def label(self) -> str:
        """The name with its unit, for axes and table headers."""
        return f"{self.words} [%]" if self.is_fraction else self.words

    @property
    def unit(self) -> str:
        """Unit of a difference of the values shown."""
        return "points" if self.is_fraction else ("nats" if self.name.endswith("loss") else self.words)


def known_direction(name: str) -> bool | None:
    """Whether greater is better, for the usual metrics by the end of their name; None for others."""
    if name.endswith(FRACTIONS):
        return True
    return False if name.endswith(LOWER_IS_BETTER) else None
