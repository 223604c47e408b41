"""GLUE's measures, computed locally behind evaluate's interface."""

import evaluate
import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from hf_dualadam.finetuning.metrics import LocalMetric, compute_metrics_for, majority_baseline

PREDICTIONS = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]
REFERENCES = [1, 0, 0, 1, 1, 0, 1, 0, 0, 1]


def test_measures_match_their_definitions():
    p, r = np.array(PREDICTIONS), np.array(REFERENCES)
    tp, tn, fp, fn = ((p == a) & (r == b) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    tp, tn, fp, fn = (int(x.sum()) for x in (tp, tn, fp, fn))
    results = LocalMetric(["accuracy", "f1", "matthews_correlation"]).compute(predictions=p, references=r)
    assert results["accuracy"] == pytest.approx((tp + tn) / 10)
    assert results["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert results["matthews_correlation"] == pytest.approx(matthews)


def test_correlations_match_their_definitions():
    x, y = np.array([0.1, 2.0, 3.5, 4.9, 1.2]), np.array([0.0, 2.5, 3.0, 5.0, 3.1])
    results = LocalMetric(["pearson", "spearmanr"]).compute(predictions=x, references=y)
    assert results["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert results["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_constant_predictions_score_zero():
    correlations = LocalMetric(["pearson", "spearmanr"]).compute(predictions=[2.0, 2.0], references=[1.0, 3.0])
    assert correlations == {"pearson": 0.0, "spearmanr": 0.0}
    classes = LocalMetric(["matthews_correlation", "f1"]).compute(predictions=[0, 0], references=[0, 1])
    assert classes == {"matthews_correlation": 0.0, "f1": 0.0}


def test_works_through_evaluate():
    metric = LocalMetric(["accuracy"])
    assert isinstance(metric, evaluate.Metric)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == {"accuracy": 0.7}
    both = evaluate.combine([LocalMetric(["accuracy"]), LocalMetric(["f1"])])
    assert set(both.compute(predictions=PREDICTIONS, references=REFERENCES)) == {"accuracy", "f1"}
    with pytest.raises(ValueError, match="[Mm]ismatch"):
        LocalMetric(["accuracy"]).compute(predictions=[0], references=[0, 1])


@pytest.mark.parametrize("in_memory", [True, False])
def test_metrics_in_use_at_the_same_time_do_not_mix(tmp_path, in_memory):
    metrics = [LocalMetric(["accuracy"], cache_dir=str(tmp_path), keep_in_memory=in_memory) for _ in range(2)]
    metrics[0].add_batch(predictions=[1, 1], references=[1, 1])
    metrics[1].add_batch(predictions=[0, 0], references=[1, 1])
    assert [metric.compute()["accuracy"] for metric in metrics] == [1.0, 0.0]
    assert not list(tmp_path.rglob("*.arrow"))


def test_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="bleu.*accuracy"):
        LocalMetric(["bleu"])


def test_trainer_gets_the_likeliest_class_and_a_combined_score():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 1.0], [1.0, 0.0]])
    compute = compute_metrics_for(LocalMetric(["accuracy", "f1"]))
    hidden_states = np.zeros((4, 3))
    results = compute(EvalPrediction(predictions=(logits, hidden_states), label_ids=np.array([1, 0, 0, 0])))
    assert results == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "combined_score": (0.75 + 2 / 3) / 2})
    regression = compute_metrics_for(LocalMetric(["pearson"]))
    assert regression(EvalPrediction(np.array([[1.0], [2.0]]), np.array([3.0, 5.0]))) == {"pearson": pytest.approx(1)}


def test_majority_baseline_guesses_the_commonest_training_class():
    train, held_out = Dataset.from_dict({"label": [2, 2, 0]}), Dataset.from_dict({"label": [2, 0, 1, 0]})
    assert majority_baseline(LocalMetric(["accuracy"]), train, held_out) == 0.25
    assert majority_baseline(LocalMetric(["accuracy"]), None, held_out) == 0.5
    assert majority_baseline(LocalMetric(["pearson"]), train, held_out) is None
