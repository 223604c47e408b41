"""Means with intervals, and paired differences with corrected p-values, from scipy and statsmodels."""

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
    """A mean with its t interval; the ends are NaN for fewer than two values."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Difference between an optimizer and a reference on the same seeds.

    Attributes:
        optimizer: name.
        reference: name of the reference.
        pairs: number of seeds finished by both.
        mean: mean difference, optimizer minus reference; positive if the optimizer is better.
        low, high: its 95 % t interval.
        margin: the smallest margin within which the two are equivalent by two one-sided paired t tests (TOST) at the
            5 % level: the larger end of the 90 % interval in absolute value.
        p_value: of the two-sided paired t test.
        p_corrected: after Holm's correction for all differences of the task.
    """

    optimizer: str
    reference: str
    pairs: int
    mean: float
    low: float
    high: float
    margin: float
    p_value: float
    p_corrected: float

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at the 5 % level after correction."""
        return self.p_corrected < SIGNIFICANT


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of ``values`` without gaps, with its t interval.

    Args:
        values: the sample.
        confidence: of the interval. Default 0.95.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    mean, error = float(values.mean()), float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def paired_differences(
    runs: pd.DataFrame, column: str, references: Mapping[str, Sequence[str]], sign: int = 1
) -> dict[tuple[str, str], Difference]:
    """Compare optimizers with their references, seed by seed.

    This is a t test because Wilcoxon's smallest possible p-value with 5 seeds is 0.0625.

    Args:
        runs: the final runs of one task, with columns optimizer, seed and ``column``.
        column: the quantity to compare.
        references: names of the optimizers that each optimizer is compared with.
        sign: -1 if smaller values are better.

    Returns:
        The differences by (optimizer, reference), without those that have fewer than 2 common seeds.
    """
    by_seed = runs.pivot(index="seed", columns="optimizer", values=column).astype(float)
    found = {}
    for optimizer, others in references.items():
        for reference in others:
            if optimizer in by_seed and reference in by_seed:
                difference = sign * (by_seed[optimizer] - by_seed[reference]).dropna()
                if len(difference) >= 2:
                    found[optimizer, reference] = difference
    if not found:
        return {}
    p_values = [_p_value(difference) for difference in found.values()]
    corrected = multipletests(p_values, method="holm")[1]
    return {
        pair: Difference(*pair, len(values), *mean_interval(values), _margin(values), p, float(p_corrected))
        for (pair, values), p, p_corrected in zip(found.items(), p_values, corrected, strict=True)
    }


def _p_value(difference: pd.Series) -> float:
    if np.ptp(difference) > 0:
        return float(stats.ttest_1samp(difference, 0.0).pvalue)
    # The t test is undefined without spread; use the sign test.
    return 1.0 if difference.iloc[0] == 0 else 2.0 ** (1 - len(difference))


def _margin(difference: pd.Series) -> float:
    _, low, high = mean_interval(difference, confidence=1 - 2 * SIGNIFICANT)
    return max(abs(low), abs(high))


def verdict(difference: Difference, scale: float = 100.0, unit: str = "points") -> str:
    """Describe a difference: better, worse, or equivalent within a margin.

    Args:
        difference: positive if the optimizer is better.
        scale: factor of the values shown.
        unit: of the values shown.
    """
    mean, low, high, margin = (
        scale * value for value in (difference.mean, difference.low, difference.high, difference.margin)
    )
    interval = f"{_signed(mean)} {unit}, 95 % interval {_signed(low)} to {_signed(high)}"
    if difference.significant:
        word = "better" if mean > 0 else "worse"
        return f"**{word}** than {difference.reference} ({interval}, corrected p = {difference.p_corrected:.2g})"
    if margin == 0:
        return f"the same as {difference.reference} on every seed"
    after = f", corrected p = {difference.p_corrected:.2g}"
    return f"within {_digits(margin)} {unit} of {difference.reference} with 95 % confidence ({interval}{after})"


def _digits(value: float) -> str:
    """Two decimals, or two digits of smaller numbers."""
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + _digits(abs(value))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, int] | None:
    """Spearman's correlation, its p-value and the number of pairs; None below 4 pairs or with a constant side."""
    pairs = pd.DataFrame({"x": x, "y": y}).astype(float).dropna()
    if len(pairs) < 4 or pairs.nunique().min() < 2:
        return None
    result = stats.spearmanr(pairs["x"], pairs["y"])
    return float(result.statistic), float(result.pvalue), len(pairs)
