"""Means with intervals and differences paired by seed, corrected for their number, by scipy and statsmodels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95
SIGNIFICANT = 0.05


class Interval(NamedTuple):
    """A mean with its 95 % t interval; the ends are NaN for fewer than two values."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Difference of one optimizer to a reference on the same seeds.

    Attributes:
        optimizer: name.
        reference: name of the other.
        pairs: number of seeds that both finished.
        mean: mean difference, optimizer minus reference.
        low, high: its 95 % t interval.
        p_value: of the two-sided paired t test.
        p_corrected: after Holm's correction for all differences of the task.
    """

    optimizer: str
    reference: str
    pairs: int
    mean: float
    low: float
    high: float
    p_value: float
    p_corrected: float

    @property
    def significant(self) -> bool:
        """Whether the difference is shown at the 5 % level, after correction."""
        return self.p_corrected < SIGNIFICANT


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of ``values``, gaps left out, with its 95 % t interval."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    mean, error = float(values.mean()), float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def paired_differences(
    runs: pd.DataFrame, column: str, references: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Difference]:
    """Compare optimizers with their references, seed by seed.

    The t test is used and not Wilcoxon's, whose smallest possible p-value with 5 seeds is 0.0625.

    Args:
        runs: the final runs of one task, with columns optimizer, seed and ``column``.
        column: the figure to compare.
        references: names of the optimizers that each optimizer is compared with.

    Returns:
        The differences by (optimizer, reference), without those that have fewer than 2 common seeds.
    """
    by_seed = runs.pivot(index="seed", columns="optimizer", values=column).astype(float)
    found = {}
    for optimizer, others in references.items():
        for reference in others:
            if optimizer in by_seed and reference in by_seed:
                difference = (by_seed[optimizer] - by_seed[reference]).dropna()
                if len(difference) >= 2:
                    found[optimizer, reference] = difference
    if not found:
        return {}
    p_values = [_p_value(difference) for difference in found.values()]
    corrected = multipletests(p_values, method="holm")[1]
    return {
        pair: Difference(*pair, len(difference), *mean_interval(difference), p, float(p_corrected))
        for (pair, difference), p, p_corrected in zip(found.items(), p_values, corrected)
    }


def _p_value(difference: pd.Series) -> float:
    if np.ptp(difference) > 0:
        return float(stats.ttest_1samp(difference, 0.0).pvalue)
    # Without any spread the t test is undefined: the sign test instead.
    return 1.0 if difference.iloc[0] == 0 else 2.0 ** (1 - len(difference))


def verdict(difference: Difference, scale: float = 100.0, unit: str = "points") -> str:
    """A difference in words.

    Args:
        difference: positive where the optimizer is better.
        scale: factor of the figures shown.
        unit: of the scaled figures.
    """
    mean, low, high = (scale * value for value in (difference.mean, difference.low, difference.high))
    interval = f"95 % interval {low:+.2f} to {high:+.2f}, corrected p = {difference.p_corrected:.2g}"
    if difference.significant:
        word = "better" if difference.mean > 0 else "worse"
        return f"{word} than {difference.reference} by {abs(mean):.2f} {unit} ({interval})"
    return f"no difference to {difference.reference} shown ({mean:+.2f} {unit}, {interval})"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, int] | None:
    """Spearman's correlation, its p-value and the number of pairs; None below 4 pairs or with a constant side."""
    pairs = pd.DataFrame({"x": x, "y": y}).astype(float).dropna()
    if len(pairs) < 4 or pairs.nunique().min() < 2:
        return None
    result = stats.spearmanr(pairs["x"], pairs["y"])
    return float(result.statistic), float(result.pvalue), len(pairs)
