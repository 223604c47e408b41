"""Comparisons of scripts that do not use this package."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import glue_rows, save_bert, write_rows

pytest.importorskip("optuna")
pytest.importorskip("pytorch_optimizer")
pytest.importorskip("statsmodels")

from hf_dualadam import cli
from hf_dualadam.finetuning.config import InputError
from hf_dualadam.lab import compare
from hf_dualadam.lab.comparison import ComparisonArguments, make_comparison
from hf_dualadam.lab.execution import Laboratory
from hf_dualadam.lab.script_runs import ScriptRuns, _curves, _inverse_shares

SCRIPT = str(Path(__file__).with_name("plain_script.py"))
ARGS = ["--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--save_strategy", "no"]


def script_task(**changes):
    return {"script": SCRIPT, "metric": "eval_accuracy", "learning_rates": [0.1], "arguments": ARGS} | changes


def make(optimizers=("adamw", "dualadam"), **task):
    settings = ComparisonArguments(
        tasks={"plain": script_task(**task)}, optimizers=dict.fromkeys(optimizers), num_seeds=2
    )
    return make_comparison(settings)


def execute(comparison, folder, optimizer="dualadam", role="final"):
    """One run, as a row of results and its curves."""
    run = comparison.run("plain", optimizer, 0.1, 3, role)
    row, curves = comparison.empty_row(run), []
    ScriptRuns("plain", comparison, folder).run(run, row, curves)
    return row, curves, folder / "runs" / run.slug


# --- What a run is given


def test_a_run_is_the_script_with_the_optimizers_options(tmp_path):
    comparison = make(
        ("adam", "dualadam_normalized"), arguments={"do_train": True, "names": ["a", "b"], "map": {"x": 1}}
    )
    runs = ScriptRuns("plain", comparison, tmp_path)
    commands = [
        runs.command(comparison.run("plain", name, 0.1, 7, "final"), setting, tmp_path)
        for name, setting in comparison.optimizers.items()
    ]
    given = ["--do_train", "--names", "a", "b", "--map", '{"x": 1}']
    for command in commands:
        assert command[1:3] == ["-m", "hf_dualadam.lab.recording"] and command[4 : 5 + len(given)] == [SCRIPT, *given]
        assert command[-4:] == ["--seed", "7", "--output_dir", str(tmp_path / "output")]
    adam, ours = (" ".join(command[5 + len(given) : -4]) for command in commands)
    assert adam == "--learning_rate 0.1 --weight_decay 0.0 --optim adamw_torch_fused"
    assert ours == "--learning_rate 0.1 --optim dualadam --optim_args normalize_inverse=True,switch_fraction=0.16"


@pytest.mark.parametrize(
    ("task", "optimizers", "message"),
    [
        ({}, ["sam"], "optimizers.sam: sam is not an optimizer that a script can select with --optim"),
        ({}, ["nadam"], "optimizers.nadam: nadam is not an optimizer that a script can select"),
        (
            {"script": "missing.py"},
            ["adamw"],
            "tasks.plain.script: 'missing.py' - should be one of glue, .*path of a script",
        ),
        ({"script": None, "module": "no.such"}, ["adamw"], "tasks.plain.module: 'no.such' - should be the name of an"),
        ({"module": "trl"}, ["adamw"], "tasks.plain.script and module: give one of them"),
        (
            {"metric": "quality"},
            ["adamw"],
            "greater_is_better: None - should be true or false: 'quality' does not imply it",
        ),
        ({"learning_rate": 0.1}, ["adamw"], "learning_rate and learning_rates: give one of them"),
        ({"learning_rates": [0.0]}, ["adamw"], r"learning_rates: \[0.0\] - should be different numbers above 0"),
        ({"arguments": ["--seed=3"]}, ["adamw"], "arguments: seed - should be left to the comparison"),
        ({"arguments": {"optim": "sgd"}}, ["adamw"], "arguments: optim - should be left to the comparison"),
        ({"arguments": {"bf16": None}}, ["adamw"], "arguments.bf16: None - should be a value; leave the option out"),
    ],
)
def test_bad_script_tasks_are_refused_before_anything_runs(task, optimizers, message):
    values = {key: value for key, value in script_task(**task).items() if value is not None}
    with pytest.raises(InputError, match=message):
        make_comparison(ComparisonArguments(tasks={"plain": values}, optimizers=dict.fromkeys(optimizers)))


def test_a_changed_script_makes_other_runs(tmp_path):
    script = tmp_path / "train.py"
    keys = set()
    for text in ("print(1)", "print(2)"):
        script.write_text(text)
        keys.add(make(script=str(script)).run("plain", "adamw", 0.1, 0, "final").key)
    assert len(keys) == 2


# --- The short form


def test_the_short_form_needs_no_file():
    line = ["--script", SCRIPT, "--optimizers", "adamw", "dualadam", "--learning_rates", "1e-4", "3e-4"]
    line += ["--seeds", "3", "--metric", "eval_accuracy", "--jobs", "2", "--", "--max_steps", "6", "--", "x"]
    arguments, comparison = compare.read_command_line(line)
    assert (arguments.jobs, arguments.output_dir, comparison.name) == (2, None, "plain_script")
    task = comparison.tasks["plain_script"]
    assert task.arguments == ["--max_steps", "6", "--", "x"] and task.scored_by == ("accuracy", True)
    assert comparison.learning_rates("plain_script", "dualadam") == [1e-4, 3e-4]
    assert list(comparison.optimizers) == ["adamw", "dualadam"] and comparison.seeds == [0, 1, 2]
    assert comparison.size() == 2 * (2 + 3)


def test_short_form_and_file_are_not_mixed(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"tasks": {"plain": script_task()}, "optimizers": {"adamw": None}}))
    with pytest.raises(InputError, match="tasks: give them in the file, or a script on the command line, not both"):
        compare.read_command_line([str(plan), "--script", SCRIPT])
    with pytest.raises(InputError, match="the arguments after --: given without script or module"):
        compare.read_command_line([str(plan), "--", "--max_steps", "3"])


def test_the_command_refuses_what_cannot_work_before_it_works(tmp_path, monkeypatch):
    line = ["--script", SCRIPT, "--optimizers", "adamw", "--metric", "accuracy"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir: .*file is not a folder"):
        compare.main([*line, "--output_dir", str(tmp_path / "file" / "out")])
    (tmp_path / "study.json").write_text(json.dumps({"name": "other"}))
    with pytest.raises(InputError, match="holds the comparison 'other'; name another folder for 'plain_script'"):
        compare.main([*line, "--output_dir", str(tmp_path)])
    with pytest.raises(InputError, match="jobs: 0 - should be at least 1"):
        compare.main([*line, "--jobs", "0"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="hf-dualadam compare: supports one process, but 2 were started"):
        compare.main([*line, "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_each_worker_gets_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    gpus = compare._gpus()
    given = [compare._worker_environment(index, 3, gpus) for index in range(3)]
    assert given == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5", "2")]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert compare._worker_environment(0, 3, []) == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}


# --- Runs


def test_metrics_come_from_files_or_from_what_the_trainer_logs(tmp_path):
    logged, curves, folder = execute(make(), tmp_path / "logged")
    assert logged["status"] == "ok" and logged["steps"] == 6 and logged["peak_memory_mb"] > 100
    assert 0 < logged["selection_metric"] == logged["heldout_metric"] <= 1 and logged["heldout_loss"] > 0
    assert len([point for point in curves if "loss" in point]) == 6 and curves[0]["alpha"] == 0.0
    assert logged["train_metric"] is None and logged["gap_loss"] is None

    comparison = make(arguments=[*ARGS, "--save", "--save_strategy", "steps"], heldout_metric="predict_accuracy")
    saved, _, folder = execute(comparison, tmp_path / "saved")
    results = json.loads((folder / "output" / "all_results.json").read_text())
    assert saved["selection_metric"] == results["eval_accuracy"] == logged["selection_metric"]
    assert saved["heldout_metric"] == results["predict_accuracy"] and saved["heldout_loss"] == results["predict_loss"]
    assert {path.suffix for path in (folder / "output").iterdir()} == {".json"}  # checkpoints are deleted


def test_a_script_that_cannot_start_ends_the_comparison_and_one_that_fails_later_is_a_crashed_run(tmp_path):
    comparison = make(arguments=[*ARGS, "--crash"])
    result = Laboratory(comparison, tmp_path).execute(comparison.run("plain", "adamw", 0.1, 0, "final"))
    assert result["score"] is None and result["row"]["heldout_metric"] is None
    assert re.match(
        "crashed: RuntimeError: .* ended with status 1: RuntimeError: out of luck", result["row"]["status"]
    )
    comparison = make(arguments=["--no_such", "1"])
    with pytest.raises(InputError, match=r"tasks.plain: .* fails before it trains: ValueError: .*--no_such.* \(log: "):
        Laboratory(comparison, tmp_path).execute(comparison.run("plain", "adamw", 0.1, 0, "final"))


def test_a_metric_that_the_script_does_not_report_is_named_with_those_it_does(tmp_path):
    reported = {"step": 6, "eval_accuracy": 0.5, "eval_loss": 1.0}
    with pytest.raises(InputError, match="tasks.plain.metric: 'eval_f1' - .* reports eval_accuracy, eval_loss$"):
        ScriptRuns("plain", make(metric="eval_f1"), tmp_path)._scores(reported, final=True)
    with pytest.raises(InputError, match="tasks.plain.heldout_metric: 'predict_accuracy' - .* reports eval_accuracy"):
        ScriptRuns("plain", make(heldout_metric="predict_accuracy"), tmp_path)._scores(reported, final=True)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(happened, what):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited for a minute: {what}")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_and_continued_and_shared_by_two_processes(tmp_path):
    """The worker and its script die; rerun with two workers, the same command then executes each run once."""
    script = tmp_path / "train.py"
    wait = f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, f'started-{{os.getpid()}}').touch()\n"
    script.write_text(wait + f"if not pathlib.Path({str(tmp_path)!r}, 'go').exists():\n    time.sleep(600)\n")
    script.write_text(script.read_text() + Path(SCRIPT).read_text())
    command = [sys.executable, "-m", "hf_dualadam", "compare", "--script", str(script), "--metric", "accuracy"]
    command += ["--optimizers", "adamw", "dualadam", "--learning_rates", "0.1", "--seeds", "2"]
    command += ["--output_dir", str(tmp_path / "out"), "--", *ARGS]

    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("started-*")), "the first script")
    (started,) = tmp_path.glob("started-*")
    pid = int(started.name.partition("-")[2])
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_for(lambda: not alive(pid), "the script of a killed worker ends")

    (tmp_path / "go").touch()
    command[command.index("--output_dir") : command.index("--output_dir")] = ["--jobs", "2"]
    continued = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert continued.returncode == 0 and "4/4" in continued.stderr, continued.stderr
    assert len(re.findall(r"final train (adamw|dualadam) lr=0.1 seed=[01]: ok 0\.\d+ in", continued.stdout)) == 4
    runs = pd.read_csv(tmp_path / "out" / "results.csv")
    assert sorted(zip(runs["optimizer"], runs["seed"], strict=True)) == [
        (name, seed) for name in ("adamw", "dualadam") for seed in (0, 1)
    ]
    assert set(runs["status"]) == {"ok"} and runs["heldout_metric"].notna().all()
    assert len(list(tmp_path.glob("started-*"))) == 1 + 4  # each run was executed once
    report = (tmp_path / "out" / "report.md").read_text()
    assert "**The learning rate and the final score use the same data** for train" in report
    assert "Sharpness was not measured." in report
    assert "- dualadam on train: " in report


def test_curves_and_shares_are_read_from_the_log():
    lines = [{"step": 1, "loss": 2.0, "inverse_share": 0.5, "other": 1.0}, {"step": 1, "eval_loss": math.nan}]
    lines += [{"step": 50, "loss": 1.0, "inverse_share": 0.1}, {"step": 100, "eval_loss": 1.5}]
    curves = _curves(lines, make(metric="eval_loss").tasks["plain"].curve_columns)
    assert curves == [
        {"step": 1, "loss": 2.0, "inverse_share": 0.5},
        {"step": 50, "loss": 1.0, "inverse_share": 0.1},
        {"step": 100, "selection_loss": 1.5, "selection_metric": 1.5},
    ]
    assert _inverse_shares(curves, 100) == {"inverse_share_1pct": 0.5, "inverse_share_50pct": 0.1}


def test_a_script_in_the_style_of_transformers_examples_with_data_of_its_own_for_the_score(tmp_path):
    files = {
        f"{split}_file": str(write_rows(tmp_path / f"{split}.csv", glue_rows(["sentence"], [0, 1], 12, seed)))
        for seed, split in enumerate(("train", "validation", "test"))
    }
    arguments = {"model_name_or_path": str(save_bert(tmp_path / "bert")), **files}
    arguments |= {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 3, "use_cpu": True}
    comparison = make(
        script=str(Path(SCRIPT).with_name("examples_style_script.py")),
        arguments=arguments,
        heldout_metric="predict_accuracy",
    )
    row, curves, folder = execute(comparison, tmp_path / "out")
    results = json.loads((folder / "output" / "all_results.json").read_text())
    assert row["status"] == "ok" and row["steps"] == 3 and row["seconds"] == results["train_runtime"]
    assert row["selection_metric"] == results["eval_accuracy"] and row["selection_loss"] == results["eval_loss"]
    assert row["heldout_metric"] == results["predict_accuracy"] and row["heldout_loss"] == results["predict_loss"]
    assert not list(folder.rglob("*.safetensors"))


def test_trls_sft_module(tmp_path):
    pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    data = [{"text": row["sentence"]} for row in glue_rows(["sentence"], [0], 12)]
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", data)
    folder = save_bert(tmp_path / "model")  # for its tokenizer
    for leftover in ("config.json", "model.safetensors"):
        (folder / leftover).unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=3, pad_token_id=0, **sizes)).save_pretrained(folder)
    arguments = {"model_name_or_path": str(folder), "dataset_name": str(tmp_path / "data"), "eos_token": "[SEP]"}
    arguments |= {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "logging_steps": 1, "bf16": False}
    arguments |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False}
    comparison = make(script=None, module="trl.scripts.sft", metric="eval_loss", arguments=arguments)
    row, curves, _ = execute(comparison, tmp_path / "out")
    assert row["status"] == "ok" and row["steps"] == 4
    assert row["selection_metric"] == row["heldout_metric"] == row["heldout_loss"] > 0
    assert [point["step"] for point in curves if "selection_loss" in point] == [2, 4]
    assert comparison.tasks["plain"].scored_by == ("loss", False)


def test_the_launcher_has_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-dualadam"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--jobs", "0"])
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: jobs: 0 - should be at least 1\n"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and shown.startswith("usage: hf-dualadam compare [CONFIG.yaml]")
    assert "\n    hf-dualadam compare configs/compare/quickstart.yaml\n" in shown and "--heldout_metric" in shown


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "main", interrupted)
    with pytest.raises(SystemExit) as stopped:
        compare.run_command([])
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted: the same command resumes\n"
