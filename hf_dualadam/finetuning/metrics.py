"""GLUE's metrics as an ``evaluate.Metric`` that needs no download: scikit-learn and scipy compute them."""

import contextlib
import tempfile
import uuid
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

CITATION = """@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={ICLR}, year={2019}}"""


def _correlation(function: Callable, predictions: np.ndarray, references: np.ndarray) -> float:
    """A correlation that is 0 where it is undefined because one side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references)[0])


# Functions of (predictions, references), named as GLUE names them.
FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, references: float(accuracy_score(references, predictions)),
    "f1": lambda predictions, references: float(f1_score(references, predictions, zero_division=0.0)),
    "matthews_correlation": lambda predictions, references: float(matthews_corrcoef(references, predictions)),
    "pearson": lambda predictions, references: _correlation(stats.pearsonr, predictions, references),
    "spearmanr": lambda predictions, references: _correlation(stats.spearmanr, predictions, references),
    "mse": lambda predictions, references: float(np.mean((predictions - references) ** 2)),
}
SCORES = {"pearson", "spearmanr", "mse"}  # of real numbers
SMALLER_IS_BETTER = {"loss", "perplexity", "mse"}


class LocalMetric(evaluate.Metric):
    """One or several measures of predictions against references, behind the interface of ``evaluate``.

    ``LocalMetric(["accuracy", "f1"]).compute(predictions=[0, 1], references=[0, 0])`` is
    ``{"accuracy": 0.5, "f1": 0.0}``.
    Predictions and references are class indices, or real numbers for ``pearson``, ``spearmanr`` and ``mse``. The
    correlation with a constant is 0.

    Args:
        names: keys of :data:`FUNCTIONS`.
        kwargs: those of ``evaluate.Metric``. By default everything stays in memory, under a unique name, so that
            concurrent processes share no cache file.
    """

    def __init__(self, names: list[str], **kwargs: Any):
        unknown = [name for name in names if name not in FUNCTIONS]
        if unknown or not names:
            raise ValueError(f"Invalid names: {names} - should be some of {', '.join(FUNCTIONS)}.")
        self.names = list(names)
        defaults = {"keep_in_memory": kwargs.get("num_process", 1) == 1, "experiment_id": uuid.uuid4().hex}
        options = defaults | kwargs
        # evaluate creates a cache folder in the user's home even when nothing is cached
        with tempfile.TemporaryDirectory() if options["keep_in_memory"] else contextlib.nullcontext() as folder:
            super().__init__(config_name="-".join(names), **({"cache_dir": folder} | options))

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if SCORES & set(self.names) else "int64")
        return evaluate.MetricInfo(
            description=f"{', '.join(self.names)} of predictions against references, computed locally.",
            citation=CITATION,
            inputs_description="Args: predictions and references, of equal length.",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        return {name: FUNCTIONS[name](predictions, references) for name in self.names}


COMBINED = "combined_score"


def compute_metrics_for(metric: LocalMetric, *, combined: bool = True) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's ``compute_metrics``: the metric of the most likely classes, or of the outputs themselves.

    Args:
        metric: one or several measures.
        combined: add the mean of several measures as ``combined_score``, as GLUE reports it.
    """

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        logits = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        predictions = logits.reshape(-1) if SCORES & set(metric.names) else logits.argmax(axis=-1)
        results = metric.compute(predictions=predictions, references=evaluation.label_ids)
        if combined and len(results) > 1:
            results[COMBINED] = float(np.mean(list(results.values())))
        return results

    return compute_metrics


def majority_baseline(
    metric: LocalMetric, train: datasets.Dataset | None, held_out: datasets.Dataset | None
) -> float | None:
    """The main metric on ``held_out`` when the most frequent class of ``train`` is always predicted.

    Args:
        metric: its first name is the main metric.
        train: examples with a ``label`` column; if None, the held-out examples are counted.
        held_out: examples with a ``label`` column, or None for no baseline.
    """
    if held_out is None or SCORES & set(metric.names):
        return None
    values, counts = np.unique(np.asarray((train or held_out)["label"]), return_counts=True)
    labels = held_out["label"][:]
    return metric.compute(predictions=[values[counts.argmax()]] * len(labels), references=labels)[metric.names[0]]
