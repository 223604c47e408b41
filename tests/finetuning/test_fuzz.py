"""Odd or hostile input ends with a one-line error, and an old run in the output folder is not changed.

Configs, ``optim_args``, text files and images are drawn at random; what is accepted must then train and evaluate.
120 configs, 200 ``optim_args``, 24 sets of text files and 12 of images by default; ``HYPOTHESIS_PROFILE=nightly``
tries ten times as many.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image as PILImage
from tiny import FAST, VIT, load_script, save_bert
from transformers import TrainingArguments

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.finetuning import training
from hf_dualadam.finetuning.config import parse, run_main
from hf_dualadam.finetuning.glue import GlueArguments
from hf_dualadam.finetuning.images import ImageArguments
from hf_dualadam.finetuning.models import ModelArguments
from hf_dualadam.finetuning.training import RunArguments
from hf_dualadam.trainer import OPTIM_ARGS, parse_optim_args

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TYPES = (ModelArguments, GlueArguments, ImageArguments, RunArguments, TrainingArguments)
DEFAULTS = {field.name: field.default for cls in TYPES for field in dataclasses.fields(cls) if field.init}


def tries(count):
    """Settings for this many examples, always the same; the nightly run uses ten times as many, chosen at random."""
    return hypothesis.settings(
        max_examples=count * (10 if NIGHTLY else 1),
        derandomize=not NIGHTLY,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


odd_text = st.one_of(
    st.sampled_from(
        ["", " ", "é", "日本語", "🙂", "\u202e", "no", "null", "1e5", "../..", "a" * 500, "%s", "{}", "\x00"]
    ),
    st.text(max_size=12),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30]),
    st.floats(),
    odd_text,
)
anything = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3))
)
LIKE = {bool: st.booleans(), int: st.integers(), float: st.floats(), str: odd_text}
entries = st.sampled_from(sorted(DEFAULTS)).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(LIKE.get(type(DEFAULTS[name]), anything), anything))
)
configs = st.one_of(
    st.lists(entries, min_size=1, max_size=3).map(dict).map(lambda c: yaml.safe_dump(c, allow_unicode=True)),
    anything.map(yaml.safe_dump),
    st.text(),
    st.sampled_from(
        [
            "task_name: !!python/object/apply:os.system ['touch hacked']",
            "!!python/object/new:os.system ['touch hacked']",
            "model_config: !!python/name:os.system ''",
            "seed: &a [*a]",
            "a: &a {b: *a}",
            "? [1, 2]\n: 3",
            "? {a: 1}\n: 3",
            "seed: 1\n---\nseed: 2",
            "learning_rate: !!float x",
            "seed: !!int ''",
            "output_dir: !!binary x",
            "logging_steps: 2001-99-99",
            "<<: [1]",
            "seed: 0x",
            "x: " + "[" * 5000,
        ]
    ),
)


@contextlib.contextmanager
def no_traces():
    """A new working folder; afterwards, the environment variables are restored, since some arguments set them."""
    environment, folder, level = dict(os.environ), os.getcwd(), logging.root.level
    with tempfile.TemporaryDirectory() as new:
        os.chdir(new)
        try:
            yield Path(new)
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            logging.root.setLevel(level)


def one_line(function):
    """The line that a user reads if this fails as intended, None if it succeeds; anything else fails the test."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            run_main(function)
            return None
        except SystemExit as stop:
            assert stop.code == 2
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and stderr.getvalue().rstrip().splitlines()[-1] == lines[0]
    return lines[0]


@tries(120)
@hypothesis.given(configs)
def test_any_config_is_read_or_refused_in_one_line(text):
    with no_traces() as folder:
        (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        one_line(lambda: parse(TYPES, ["config.yaml"]))
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]


pieces = st.one_of(
    st.sampled_from(
        [*OPTIM_ARGS, "=", ",", "==", ",,", " ", "0.1", "1e999", "-1", "nan", "true", "False", "1_0", "½"]
    ),
    odd_text,
)


@tries(200)
@hypothesis.given(st.lists(pieces, max_size=7).map("".join), st.sampled_from([DualAdam, InvAdam]))
def test_any_optim_args_are_read_or_refused(text, optimizer_cls):
    try:
        options = parse_optim_args(text, optimizer_cls)
    except ValueError as error:
        assert str(error).startswith("Invalid optim_args: ")
        optim = ["--optim", optimizer_cls.__name__.lower(), f"--optim_args={text}"]
        line = one_line(lambda: parse((TrainingArguments,), ["--output_dir", "out", "--use_cpu", *optim]))
        assert line.startswith("error: Invalid optim_args: ")
    else:
        options.pop("switch_fraction", None)
        optimizer_cls([torch.nn.Parameter(torch.ones(2))], **options)


def old_run(folder):
    """The files of an earlier run, which are replaced only when training begins."""
    for name in ("trainer_state.json", "model.safetensors", "checkpoint-3/optimizer.pt", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"old " + name.encode())
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_over_old(main, folder, *argv):
    """Run a script over an old run: it replaces it, or says why not in one line and leaves it byte for byte."""
    output = old_run(folder / "out")
    before = contents(output)
    fixed = ["--output_dir", str(output), "--overwrite_output_dir", *FAST, "--max_steps", "1"]
    line = one_line(lambda: main([*argv, *fixed]))
    if line is None:
        assert json.loads((output / "all_results.json").read_text())["train_samples"] > 0
        assert (output / "notes.txt").read_bytes() == before["notes.txt"]
        assert (output / "model.safetensors").read_bytes() != before["model.safetensors"]
    else:
        assert contents(output) == before
    return line


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """Skip the plots, which take most of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_learning_curves", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


cells = st.one_of(st.sampled_from([0, 1, "0", "1", "good film"]), st.sampled_from([0, 1]), anything)
rows = st.lists(
    st.fixed_dictionaries(
        {"sentence": st.one_of(odd_text, odd_text, cells), "label": st.one_of(st.sampled_from([0, 1]), cells)},
        optional={"idx": cells},
    ),
    max_size=4,
)
sound_rows = st.lists(
    st.fixed_dictionaries({"sentence": odd_text, "label": st.sampled_from([0, 1])}), min_size=1, max_size=4
)
tables = st.one_of(
    rows,
    sound_rows,
    sound_rows,
    st.lists(st.dictionaries(odd_text, cells, max_size=2), max_size=3),
    st.lists(cells, max_size=3),
    st.text(),
)


def write_table(path, table):
    """As a file of the kind that its name says, as far as the values allow; text is written as it is."""
    if isinstance(table, str):
        path.write_bytes(table.encode("utf-8", "surrogatepass"))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    else:
        frame = pd.DataFrame([row if isinstance(row, dict) else {"sentence": row} for row in table]).map(str)
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False, errors="replace")


@tries(24)
@hypothesis.given(
    tables, tables, st.sampled_from(["jsonl", "json", "csv", "parquet"]), st.sampled_from(["sst2", None])
)
def test_any_text_file_trains_or_is_refused_in_one_line(bert, train, held_out, kind, task):
    with no_traces() as folder:
        for split, table in {"train": train, "validation": held_out}.items():
            write_table(folder / f"{split}.{kind}", table)
        argv = ["--data_dir", ".", "--model_name_or_path", str(bert), *(["--task_name", task] if task else [])]
        run_over_old(load_script("run_glue").main, folder, *argv)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lr_scheduler_kwargs: {a: 1}", "unexpected keyword argument 'a'"),
        ("lr_scheduler_type: warmup_stable_decay", "num_decay_steps"),
        ("adam_beta1: 1.5", r"Invalid betas[0]: 1.5 - should be in [0.0, 1.0)"),
        ("adam_epsilon: -1", "Invalid eps: -1"),
        ("neftune_noise_alpha: -1", "neftune_noise_alpha: -1 is out of range"),
        ("eval_accumulation_steps: 0", "eval_accumulation_steps: 0 is out of range"),
        ("dataloader_num_workers: -1", "dataloader_num_workers: -1 is out of range"),
        ("log_level: nope", "log_level: 'nope' is not one of"),
        ("report_to: [nope]", "nope is not supported"),
        ("save_strategy: best", "metric_for_best_model"),
        ("metric_for_best_model: f1", "metric_for_best_model: 'f1' - should be one of loss, accuracy"),
        ("metric_for_best_model: eval_runtime", "should be one of loss, accuracy"),
        ("batch_eval_metrics: true", "batch_eval_metrics"),
        ("torch_compile_backend: nope", "'NOPE' is not a valid"),
        ("accelerator_config: nope.json", "nope.json"),
        ("push_to_hub: true", "offline"),
        ("optim_args: switch_rat=0.1", "Invalid optim_args: unknown key 'switch_rat'"),
        ("optim_args: switch_rate=2", "Invalid optim_args: switch_rate=2"),
        ("model_config: {model_type: bert, hidden_size: x}", "model_name_or_path and model_config"),
        ("max_seq_length: 0", "max_seq_length: 0 is out of range"),
    ],
)
def test_an_argument_that_only_trainer_understands_is_refused_before_the_old_run_is_gone(bert, option, message):
    with no_traces() as folder:
        (folder / "config.yaml").write_text(option)
        for split in ("train", "validation"):
            write_table(folder / f"{split}.jsonl", [{"sentence": "a film", "label": label} for label in (0, 1)])
        argv = ["config.yaml", "--data_dir", ".", "--model_name_or_path", str(bert), "--task_name", "sst2"]
        assert message in run_over_old(load_script("run_glue").main, folder, *argv)


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    PILImage.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = png(9, 7)
images = st.one_of(
    st.just(GOOD),
    st.sampled_from([png(1, 1), png(300, 1), png(8, 8, "L"), png(8, 8, "P"), png(8, 8, "I;16"), png(8, 8, "1")]),
    st.integers(0, len(GOOD) - 1).map(lambda end: GOOD[:end]),
    st.binary(max_size=20),
)
names = st.sampled_from(["a.png", "b.png", "é.png", "🙂.jpg", "c.PNG", "notes.txt", "d.gif", "no_ending"])
classes = st.sampled_from(["cat", "dog", "日本語", "a b", ".hidden", ""])
folders = st.one_of(
    st.dictionaries(st.tuples(classes, names), images, max_size=5),
    st.dictionaries(st.tuples(classes, st.sampled_from(["a.png", "b.png"])), st.just(GOOD), min_size=2, max_size=5),
)


@tries(12)
@hypothesis.given(folders, st.one_of(st.none(), folders))
def test_any_image_folder_trains_or_is_refused_in_one_line(train, held_out):
    with no_traces() as folder:
        for split, files in {"train": train, "validation": held_out}.items():
            for (label, name), content in (files or {}).items():
                (folder / split / label).mkdir(parents=True, exist_ok=True)
                (folder / split / label / name).write_bytes(content)
        argv = ["--data_dir", ".", "--model_config", str(VIT)]
        run_over_old(load_script("run_image_classification").main, folder, *argv)
