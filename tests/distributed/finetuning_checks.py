"""The scripts' trainers and output folder on two processes, compared with one. See two_processes.py."""

import importlib.util
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "finetuning")]

from test_exact_loss import step, task  # noqa: E402
from tiny import FAST, load_script, save_bert, write_rows  # noqa: E402
from trainer_checks import one_process  # noqa: E402

from hf_dualadam.finetuning.config import InputError  # noqa: E402


def both(function, folder):
    """What ``function(folder, processes)`` returns in two processes and in one."""
    two = function(folder / "two", 2)
    with one_process():
        one = function(folder / f"one{dist.get_rank()}", 1)
    return two, one


def check_classifiers_take_the_same_step(folder):
    for kind in ("bert", "vit"):
        two, one = both(lambda at, n, kind=kind: step(task(kind), at / kind, 8 // (2 * n), 2), folder)
        assert two == pytest.approx(one, rel=2e-4), kind


def check_every_held_out_example_counts_once(folder):
    """7 examples in batches of 2 on 2 processes: the last batches are padded."""
    for kind in ("bert", "vit"):
        two, one = both(lambda at, n, kind=kind: step(task(kind, rows=7), at / kind, 2, 1), folder)
        assert two["eval_loss"] != one["eval_loss"] or two["loss"] == pytest.approx(one["loss"])
        evaluated, alone = both(lambda at, n, kind=kind: evaluate(task(kind, rows=7), at / kind), folder)
        assert evaluated == pytest.approx(alone, rel=1e-5), kind


def evaluate(of, folder):
    from transformers import TrainingArguments

    from hf_dualadam.finetuning.training import run

    args = TrainingArguments(
        str(folder),
        do_eval=True,
        use_cpu=True,
        per_device_eval_batch_size=2,
        report_to="none",
        disable_tqdm=True,
    )
    return run(of, args, write=False, print_logs=False).metrics["eval_loss"]


def check_perplexity_is_that_of_one_process(folder):
    if importlib.util.find_spec("trl") is None:
        return
    words = "the a film is good bad dull fine this that was not very and cat dog runs sleeps".split()
    rows = [{"text": " ".join(words[: 3 + index])} for index in range(7)]
    path = folder / "texts.jsonl"
    if dist.get_rank() == 0:
        write_rows(path, rows)
    dist.barrier()
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    argv = ["--train_file", str(path), "--validation_file", str(path), "--model_config", json.dumps(config)]
    argv += ["--new_tokenizer_size", "300", "--per_device_eval_batch_size", "2", "--packing", "false", *FAST]
    argv += ["--max_steps", "1", "--learning_rate", "0", "--eval_strategy", "no", "--generation_samples", "0"]
    script = load_script("run_clm")

    def perplexities(at, processes):
        metrics = script.main([*argv, "--output_dir", str(at)]).metrics
        return {name: metrics[name] for name in ("eval_perplexity", "train_eval_perplexity", "unigram_perplexity")}

    two, one = both(perplexities, folder)
    assert two == pytest.approx(one, rel=1e-5)


def check_summary_is_printed_once_and_the_folder_is_taken_by_one_job(folder):
    if dist.get_rank() == 0:
        save_bert(folder / "bert")
        rows = [{"sentence": f"the film is {word}", "label": index % 2} for index, word in enumerate("abcdefgh")]
        write_rows(folder / "data" / "train.csv", rows)
        write_rows(folder / "data" / "validation.csv", rows[:7])
    dist.barrier()
    argv = ["--task_name", "sst2", "--data_dir", str(folder / "data"), "--model_name_or_path", str(folder / "bert")]
    printed = io.StringIO()
    with redirect_stdout(printed):
        load_script("run_glue").main([*argv, *FAST, "--output_dir", str(folder / "out")])
    assert ("sst2: optim=dualadam" in printed.getvalue()) == (dist.get_rank() == 0)
    try:
        load_script("measure_sharpness").main([str(folder / "out"), *argv[:4]])
    except InputError as error:
        assert "2 were started" in str(error)
    else:
        raise AssertionError("measured on two processes")
