"""Comparisons: equal budgets, runs shared by workers that may die, statistics, and a complete report."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired
from transformers import Trainer

pytest.importorskip("optuna")
pytest.importorskip("pytorch_optimizer")
pytest.importorskip("hessian_eigenthings")
pytest.importorskip("statsmodels")

from datasets import ClassLabel, Dataset, Features, Value

from hf_dualadam.finetuning.config import InputError
from hf_dualadam.lab.baselines import BASELINES, OptimizerSetting, SAMTrainer, TrainerSAM
from hf_dualadam.lab.comparison import COLUMNS, ComparisonArguments, make_comparison
from hf_dualadam.lab.execution import Laboratory
from hf_dualadam.lab.kind_runs import KindRuns, randomize_labels
from hf_dualadam.lab.run_queue import MAX_CRASHES, RunQueue, open_storage
from hf_dualadam.lab.significance import mean_interval, paired_differences, verdict
from hf_dualadam.lab.study import Study, chosen_learning_rate

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compare_optimizers
import plot_differences

VIT = dict(model_type="vit", image_size=8, patch_size=4, num_channels=1, hidden_size=8)
VIT |= dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
DIGITS = {
    "dataset_name": "embedded/digits",
    "model_config": VIT,
    "augment": False,
    "max_train_samples": 60,
    "max_eval_samples": 40,
    "max_steps": 10,
    "per_device_train_batch_size": 8,
}


def comparison_arguments(**changes):
    task = {"script": "image_classification", "learning_rate": 1e-3, "arguments": DIGITS}
    values = {
        "tasks": {"digits": task},
        "optimizers": {"adamw": None, "adamw_warmup": None, "dualadam": None},
        "seeds": [0, 1],
        "num_learning_rates": 2,
        "sharpness": {"examples": 4, "lanczos_steps": 2, "trace_samples": 1},
    }
    return ComparisonArguments(**(values | changes))


# --- The settings


def test_every_optimizer_gets_as_many_rates_and_gradients():
    comparison = make_comparison(comparison_arguments(optimizers=dict.fromkeys(BASELINES), num_learning_rates=3))
    assert comparison.learning_rates("digits", "adamw") == [0.000333, 0.001, 0.003]
    assert comparison.learning_rates("digits", "sgd") == [0.0333, 0.1, 0.3]
    for optimizer in comparison.optimizers:
        assert len(comparison.learning_rates("digits", optimizer)) == 3
        cost = comparison.optimizers[optimizer].baseline.gradients_per_step
        assert comparison.steps("digits", optimizer) * cost == 10
    assert comparison.steps("digits", "sam") == 5


def test_a_changed_setting_makes_another_run():
    keys = set()
    for changes in ({}, {"switch_fraction": 0.5}, {"sharpness": {"examples": 8}}):
        comparison = make_comparison(comparison_arguments(**changes))
        keys |= {run.key for run in comparison.final_runs("digits", "dualadam", 1e-3)}
    assert len(keys) == 3 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": {"adamq": None}}, r"optimizers.adamq.base: 'adamq' - should be one of sgd, adam"),
        ({"optimizers": {"dualadam": {"rate_scale": 0.0}}}, r"optimizers.dualadam.rate_scale: 0.0 - should be above"),
        ({"optimizers": {"dualadam": {"optim_args": {"switch": 1}}}}, r"dualadam.optim_args: .*unknown key 'switch'"),
        ({"optimizers": {"adamw": {"switch_fraction": 0.1}}}, "adamw.switch_fraction: adamw has no inverse phase"),
        ({"optimizers": {"dualadam": {"switch_fraction": 2.0}}}, "switch_fraction: 2.0 - should be in"),
        ({"optimizers": {"adamw": {"inverse_parameters": "x"}}}, "inverse_parameters: adamw has no inverse phase"),
        ({"optimizers": {"dualadam": {"inverse_parameters": "("}}}, r"dualadam.inverse_parameters: '\(' - missing"),
        ({"tasks": {}}, "tasks: {} - should be at least one task"),
        ({"tasks": {"t": {"script": "glue"}}}, "tasks.t.arguments: required"),
        ({"tasks": {"t": {"script": "x", "arguments": {}, "learning_rate": 1.0}}}, "tasks.t.script: 'x'"),
        ({"tasks": {"t": {"script": "glue", "arguments": {}, "learning_rate": 1.0}}}, "tasks.t.max_steps: None"),
        ({"sharpness": {"roh": 1.0}}, "sharpness.roh"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\]"),
        ({"seeds": [], "num_seeds": 1}, "num_seeds: 1 - should be at least 2"),
    ],
)
def test_bad_plans_are_refused_with_the_place(changes, message):
    with pytest.raises(InputError, match=message):
        make_comparison(comparison_arguments(**changes))


# --- Sharing


def fake_execute(comparison, log, pause=0.0):
    def execute(run):
        time.sleep(pause)
        with log.open("a") as file:
            file.write(run.key + "\n")
        row = comparison.empty_row(run) | {
            "status": "ok",
            "selection_metric": run.learning_rate,
            "selection_loss": 1.0,
        }
        return {"row": row, "curves": [], "score": row["selection_metric"], "wall_seconds": pause}

    return execute


def open_study(comparison, folder, **kwargs):
    return Study(comparison, RunQueue(open_storage(str(folder / "journal.log")), comparison.name, **kwargs))


def hang_in_second(comparison, log):
    """The first run succeeds; the second signals that it has begun, and never ends."""
    execute, done = fake_execute(comparison, log), []

    def hang(run):
        if done:
            (log.parent / f"hangs-{os.getpid()}").touch()
            time.sleep(600)
        done.append(run)
        return execute(run)

    return hang


def wait_for(happened):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def test_killed_workers_leave_nothing_to_clean_up(tmp_path):
    comparison = make_comparison(comparison_arguments())
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")

    def work(execute):
        for _ in open_study(comparison, tmp_path, heartbeat=0.4, patience=5.0).work(execute):
            pass

    def start(execute):
        workers = [context.Process(target=work, args=(execute,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        return workers

    killed = start(hang_in_second(comparison, log))
    wait_for(lambda: len(list(tmp_path.glob("hangs-*"))) == len(killed))
    for worker in killed:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    assert len(log.read_text().splitlines()) == len(killed) < comparison.size()
    for worker in start(fake_execute(comparison, log, pause=0.05)):
        worker.join(60)
        assert worker.exitcode == 0
    study = open_study(comparison, tmp_path)
    results = study.queue.results()
    assert set(results) == {run.key for run in study.known_runs(results)}
    assert len(results) == comparison.size() == 3 * (2 + 2)
    assert sorted(log.read_text().splitlines()) == sorted(results)  # each finished run was executed once


def test_a_worker_killed_while_it_writes_keeps_nobody_waiting(tmp_path):
    address = str(tmp_path / "journal.log")

    def lock():
        open_storage(address)._backend._lock.acquire()
        (tmp_path / "locked").touch()
        time.sleep(600)

    worker = multiprocessing.get_context("fork").Process(target=lock)
    worker.start()
    wait_for((tmp_path / "locked").exists)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    start = time.monotonic()
    RunQueue(open_storage(address), "comparison").add(["run"])
    assert time.monotonic() - start < 20  # Optuna's own lock is held for 30 seconds more


def test_an_interrupted_comparison_has_equally_many_runs_of_each_optimizer(tmp_path):
    comparison = make_comparison(comparison_arguments())
    study = open_study(comparison, tmp_path)
    runs = [run for run, _ in study.work(fake_execute(comparison, tmp_path / "log"))]
    assert [run.role for run in runs] == ["selection"] * 6 + ["final"] * 6
    assert [(run.seed, run.optimizer) for run in runs[6:]] == [
        (seed, optimizer) for seed in (0, 1) for optimizer in ("adamw", "adamw_warmup", "dualadam")
    ]


def test_an_interrupt_hands_the_run_back(tmp_path):
    comparison = make_comparison(comparison_arguments())
    study = open_study(comparison, tmp_path)

    def interrupted(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(study.work(interrupted))
    assert not study.queue.results()
    started = time.monotonic()
    assert len(list(study.work(fake_execute(comparison, tmp_path / "log")))) == comparison.size()
    assert time.monotonic() - started < 20  # no waiting for the patience of a lost run


def test_a_run_that_kills_its_workers_is_given_up(tmp_path):
    comparison = make_comparison(comparison_arguments())
    queue = open_study(comparison, tmp_path, heartbeat=60, patience=0.0).queue
    key = comparison.selection_runs("digits", "adamw")[0].key
    queue.add([key])
    for _ in range(MAX_CRASHES):
        assert queue.claim([key]) == key
        queue.reclaim()
        time.sleep(0.01)
        assert queue.reclaim() == [key]
    study = Study(comparison, queue)
    for run, results in study.work(fake_execute(comparison, tmp_path / "log")):
        if run.key == key:
            break
    assert results[key]["row"]["status"] == f"crashed: its worker died {MAX_CRASHES} times"


def test_the_rate_with_the_best_selection_metric_is_chosen():
    comparison = make_comparison(comparison_arguments(num_learning_rates=3))
    runs = comparison.selection_runs("digits", "adamw")
    rows = [
        {"status": "ok", "selection_metric": 0.5, "selection_loss": 1.0},
        {"status": "ok", "selection_metric": 0.5, "selection_loss": 0.9},
        {"status": "diverged", "selection_metric": 0.9, "selection_loss": None},
    ]
    scores = [0.5, 0.5, None]
    results = {run.key: {"row": row, "score": score} for run, row, score in zip(runs, rows, scores, strict=True)}
    assert chosen_learning_rate(comparison, "digits", "adamw", results) == runs[1].learning_rate
    del results[runs[2].key]
    assert chosen_learning_rate(comparison, "digits", "adamw", results) is None


def test_a_single_rate_needs_no_selection_runs():
    comparison = make_comparison(comparison_arguments(num_learning_rates=1))
    assert comparison.selection_runs("digits", "adamw") == [] and comparison.size() == 3 * 2
    assert chosen_learning_rate(comparison, "digits", "adamw", {}) == 1e-3


# --- Optimizers and data


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.layer(x).tanh(), labels)}


ROWS = [{"x": torch.tensor([float(i), 1.0, -0.5 * i]), "labels": torch.tensor(i % 2)} for i in range(8)]


def trainer_for(trainer_cls, optimizer, tmp_path, steps, **kwargs):
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no", max_grad_norm=0.5,
        **{"learning_rate": 0.1, **kwargs},
    )  # fmt: skip
    return trainer_cls(model=Model(), args=args, train_dataset=ROWS, optimizer_cls_and_kwargs=optimizer)


def test_sam_in_trainer_takes_the_gradient_of_the_perturbed_weights(tmp_path):
    rho = 0.3
    optimizer = (TrainerSAM, {"base_optimizer": torch.optim.SGD, "lr": 0.1, "rho": rho})
    trainer = trainer_for(SAMTrainer, optimizer, tmp_path, 1)
    trainer.train()
    model = Model()
    batch = {"x": torch.stack([row["x"] for row in ROWS]), "labels": torch.stack([row["labels"] for row in ROWS])}
    params = list(model.parameters())
    first = torch.autograd.grad(model(**batch)["loss"], params)
    norm = torch.sqrt(sum(g.pow(2).sum() for g in first))
    start = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, gradient in zip(params, first):
            param.add_(rho * gradient / norm)
    second = torch.autograd.grad(model(**batch)["loss"], params)
    clip = min(1.0, 0.5 / float(torch.sqrt(sum(g.pow(2).sum() for g in second))))
    for got, before, gradient in zip(trainer.model.parameters(), start, second):
        torch.testing.assert_close(got, before - 0.1 * clip * gradient)


def test_the_control_is_adamw_with_dualadams_warmup(tmp_path):
    class WarmedUp(torch.optim.AdamW):
        def step(self, closure=None):
            done = int(next(iter(self.state.values()), {"step": 0})["step"])
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] *= min(1.0, 0.25 * (done + 1))  # 1 - alpha at switch_rate 0.25
            super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    reference = trainer_for(Trainer, (WarmedUp, {"lr": 0.1}), tmp_path, 8, weight_decay=0.0)
    reference.train()
    setting = OptimizerSetting("adamw_warmup", switch_fraction=0.5)
    assert setting.optimizer_cls_and_kwargs(0.1) is None
    arguments = {**setting.training_arguments(0.1), "weight_decay": 0.0}
    control = trainer_for(setting.trainer_cls(), None, tmp_path, 8, **arguments)
    control.train()
    for got, expected in zip(control.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_inverse_phase_can_be_kept_to_some_parameters(tmp_path):
    def step(trainer_cls, optim):
        ours = {} if optim == "adamw_torch" else {"optim_args": "switch_rate=0.25"}
        trainer = trainer_for(trainer_cls, None, tmp_path, 1, optim=optim, **ours)
        trainer.train()
        return trainer.model.layer, trainer.optimizer.param_groups

    setting = OptimizerSetting("dualadam", inverse_parameters="bias$")
    partial, groups = step(setting.trainer_cls(), "dualadam")
    whole, _ = step(Trainer, "dualadam")
    adam, _ = step(Trainer, "adamw_torch")
    torch.testing.assert_close(partial.weight, adam.weight)
    assert torch.equal(partial.bias, whole.bias)
    assert not torch.allclose(whole.weight, adam.weight, atol=1e-3)
    assert not torch.allclose(whole.bias, adam.bias, atol=1e-3)
    assert sum(len(group["params"]) for group in groups) == 2

    nowhere = OptimizerSetting("dualadam", inverse_parameters="head")
    with pytest.raises(InputError, match="inverse_parameters: 'head' - should match some parameter"):
        step(nowhere.trainer_cls(), "dualadam")


def test_label_noise_hits_the_share_and_nothing_else():
    features = Features({"x": Value("int64"), "label": ClassLabel(num_classes=10)})
    clean = Dataset.from_dict({"x": list(range(2000)), "label": [i % 10 for i in range(2000)]}, features)
    noisy = randomize_labels(clean, 0.3, 10)
    changed = np.mean(np.array(noisy["label"]) != np.array(clean["label"]))
    assert 0.24 < changed < 0.3  # a tenth of the random labels are right by chance
    assert noisy["x"][:] == clean["x"][:] and noisy.features["label"] == features["label"]
    assert noisy["label"][:] == randomize_labels(clean, 0.3, 10)["label"][:]


def test_language_models_are_compared_by_perplexity(tmp_path):
    pytest.importorskip("trl")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    arguments = {"dataset_name": "embedded/texts", "new_tokenizer_size": 300, "max_train_samples": 30}
    arguments |= {"model_config": {"model_type": "llama", "num_key_value_heads": 1, **sizes}, "max_eval_samples": 4}
    arguments |= {"max_steps": 2, "max_length": 16, "use_cpu": True}
    task = {"script": "clm", "learning_rate": 1e-2, "arguments": arguments}
    comparison = make_comparison(comparison_arguments(tasks={"texts": task}))
    laboratory = Laboratory(comparison, tmp_path)
    result = laboratory.execute(comparison.run("texts", "dualadam", 1e-2, 0, "final"))
    row = result["row"]
    assert row["status"] == "ok" and not laboratory.metric("texts").greater_is_better
    assert result["score"] == -row["selection_metric"] and row["heldout_metric"] > 1
    assert row["gap_metric"] == pytest.approx(row["heldout_metric"] - row["train_metric"], rel=1e-3)
    assert row["hessian_top_eigenvalue"] is not None


# --- Statistics


def test_differences_are_paired_and_corrected():
    scores = {"a": [0.5, 0.6, 0.7, 0.8], "b": [0.53, 0.62, 0.73, 0.82], "c": [0.5, 0.6, 0.7, 0.8]}
    runs = pd.DataFrame(
        [{"optimizer": o, "seed": s, "score": v} for o, values in scores.items() for s, v in enumerate(values)]
    )
    found = paired_differences(runs, "score", {"b": ["a"], "c": ["a"]})
    expected = stats.ttest_rel(scores["b"], scores["a"])
    interval = expected.confidence_interval(0.95)
    better = found["b", "a"]
    assert (better.mean, better.low, better.high) == pytest.approx((0.025, interval.low, interval.high))
    assert better.p_value == pytest.approx(expected.pvalue)
    assert better.p_corrected == pytest.approx(2 * expected.pvalue)  # Holm, two comparisons
    assert verdict(better).startswith("**better** than a (+2.50 points, 95 % interval")
    assert found["c", "a"].p_value == 1.0 and verdict(found["c", "a"]) == "the same as a on every seed"
    worse = paired_differences(runs, "score", {"b": ["a"]}, sign=-1)["b", "a"]
    assert worse.mean == -better.mean and verdict(worse).startswith("**worse** than a (-2.50 points")


def test_equivalence_is_stated_at_the_margin_of_two_one_sided_tests():
    scores = {"a": [0.50, 0.60, 0.70, 0.80, 0.9], "b": [0.51, 0.59, 0.72, 0.79, 0.905]}
    runs = pd.DataFrame(
        [{"optimizer": o, "seed": s, "score": v} for o, values in scores.items() for s, v in enumerate(values)]
    )
    difference = paired_differences(runs, "score", {"b": ["a"]})["b", "a"]
    p_value, _, _ = ttost_paired(np.array(scores["b"]), np.array(scores["a"]), -difference.margin, difference.margin)
    assert not difference.significant and p_value == pytest.approx(0.05)
    assert verdict(difference).startswith(
        f"within {100 * difference.margin:.2f} points of a with 95 % confidence (+0."
    )


def test_intervals_leave_gaps_out():
    low, high = stats.t.interval(0.95, 2, loc=2.0, scale=stats.sem([1, 2, 3]))
    assert mean_interval([1.0, 2.0, np.nan, 3.0]) == pytest.approx((2.0, low, high))
    assert np.isnan(mean_interval([1.0]).low)


# --- From the command to the report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison with an optimizer that diverges and one that cannot be built."""
    folder = tmp_path_factory.mktemp("compare")
    comparison = {
        "tasks": {"digits": {"script": "image_classification", "learning_rate": 1e-3, "arguments": DIGITS}},
        "optimizers": {
            "adamw": None,
            "adamw_warmup": None,
            "dualadam_normalized": {"switch_fraction": 0.5},
            "sam": None,
            "sgd": {"optim_args": {"momentum": 1e30}},
            "radam": {"optim_args": {"no_such_option": 1}},
        },
        "seeds": [0, 1],
        "num_learning_rates": 2,
        "sharpness": {"examples": 4, "lanczos_steps": 2, "trace_samples": 1},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(comparison))
    compare_optimizers.main([str(folder / "plan.yaml"), "--output_dir", str(folder / "out")])
    return folder


def test_all_runs_are_in_the_results(finished):
    runs = pd.read_csv(finished / "out" / "results.csv")
    assert tuple(runs.columns) == COLUMNS
    assert len(runs) == 6 * (2 + 2)
    status = runs.groupby("optimizer")["status"].unique()
    assert list(status["sgd"]) == ["diverged"]
    assert all(text.startswith("crashed: InputError: RAdam.__init__") for text in status["radam"])
    good = runs[~runs["optimizer"].isin(["sgd", "radam"])]
    assert set(good["status"]) == {"ok"}
    final = good[good["role"] == "final"]
    measured = ["selection_metric", "heldout_metric", "heldout_loss", "train_loss", "gap_loss", "gap_metric"]
    measured += ["hessian_top_eigenvalue", "hessian_trace", "ball_sharpness", "seconds", "peak_memory_mb"]
    assert final[measured].notna().all().all()
    assert good.loc[good["role"] == "selection", "heldout_metric"].isna().all()  # the held-out data are not used
    shares = final.groupby("optimizer")[["inverse_share_1pct", "inverse_share_10pct", "inverse_share_50pct"]].mean()
    assert shares.loc["dualadam_normalized", "inverse_share_10pct"] > 0.5 and shares.loc["adamw"].isna().all()
    assert set(final.loc[final["optimizer"] == "sam", "steps"]) == {5}


def test_the_report_is_complete(finished):
    report = (finished / "out" / "report.md").read_text()
    for part in ("**Question.**", "## Answer", "## Protocol", "## digits", "## Failed runs", "Versions:"):
        assert part in report
    assert report.index("## Answer") < report.index("## digits") < report.index("## Protocol")
    for reference in ("adamw", "adamw_warmup"):
        said = rf"the same as {reference} on|of {reference} with 95 % confidence|er\*\* than {reference} \("
        assert re.search(rf"- dualadam_normalized on digits: .*({said})", report)
    tables = [line for line in report.splitlines() if line.startswith("|")]
    assert max(line.count("|") - 1 for line in tables) <= 5
    assert "\n8 of the 24 runs failed.\n" in report
    pictures = [line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert len(pictures) == 11 and all((finished / "out" / name).stat().st_size > 5000 for name in pictures)


def test_a_second_start_repeats_nothing_and_report_only_rebuilds(finished, monkeypatch):
    def forbidden(self, run, row, curves):
        raise AssertionError(run)

    monkeypatch.setattr(KindRuns, "run", forbidden)
    before = (finished / "out" / "results.csv").read_text()
    compare_optimizers.main([str(finished / "plan.yaml"), "--output_dir", str(finished / "out")])
    assert (finished / "out" / "results.csv").read_text() == before
    (finished / "out" / "report.md").unlink()
    compare_optimizers.main(["--report_only", "--output_dir", str(finished / "out")])
    assert (finished / "out" / "report.md").exists()


def test_differences_of_several_comparisons_share_a_figure(tmp_path, capsys):
    rows = [
        {"task": "digits", "role": "final", "optimizer": name, "seed": seed, "heldout_metric": score}
        for name, scores in {"adamw": (0.90, 0.91), "sam": (0.91, 0.94)}.items()
        for seed, score in enumerate(scores)
    ]
    for task in ("digits", "letters"):
        (tmp_path / task).mkdir()
        pd.DataFrame(rows).assign(task=task).to_csv(tmp_path / task / "results.csv", index=False)
        metric = {"name": "accuracy", "greater_is_better": True}
        (tmp_path / task / "study.json").write_text(json.dumps({"metrics": {task: metric}}))
    figure, folders = tmp_path / "figure.png", [str(tmp_path / "digits"), str(tmp_path / "letters")]
    plot_differences.main([*folders, "--pairs", "sam:adamw", "nadam:adamw", "--output", str(figure)])
    printed = capsys.readouterr().out
    assert "sam against adamw" in printed and "nadam" not in printed  # it was not run
    for task in ("digits", "letters"):
        assert f"- {task}, 2 seeds: within 8.31 points of adamw with 95 % confidence (+2.00 points" in printed
    assert figure.stat().st_size > 5000
    for folder, pair, message in (
        (tmp_path, "sam:adamw", "results.csv: no such file"),
        (folders[0], "sam", "'sam' should be two names A:B"),
        (folders[0], "nadam:adamw", "no task has two seeds"),
    ):
        with pytest.raises(SystemExit):
            plot_differences.main([str(folder), "--pairs", pair, "--output", str(tmp_path / "none.png")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_report_only_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no results"):
        compare_optimizers.main(["--report_only", "--output_dir", str(tmp_path)])
