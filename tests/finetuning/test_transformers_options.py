"""Command lines and args.json files of Transformers' example scripts work, or the message names our equivalent.

The options are those of run_glue.py, run_image_classification.py and run_clm.py, versions 4.20 to 5.
"""

import dataclasses
import json

import pytest
from tiny import load_script

from hf_dualadam.finetuning.config import InputError, parse
from hf_dualadam.finetuning.models import load_config
from hf_dualadam.finetuning.tasks import task_kind
from hf_dualadam.finetuning.training import RunArguments

COMMON = {
    "model_name_or_path": "some/model",
    "config_name": "some/config",
    "cache_dir": "cache",
    "model_revision": "v1",
    "token": "secret",
    "trust_remote_code": True,
    "dataset_name": "some/data",
    "dataset_config_name": "plain",
    "max_train_samples": 5,
    "max_eval_samples": 6,
    "overwrite_output_dir": True,
    "overwrite_cache": True,
    "do_train": True,
    "do_eval": True,
    "output_dir": "out",
    "learning_rate": 5e-05,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "warmup_ratio": 0.1,
    "logging_steps": 10,
    "save_total_limit": 3,
    "evaluation_strategy": "no",
    "per_gpu_train_batch_size": None,
    "seed": 1337,
}
OPTIONS = {
    "glue": {
        "task_name": "MRPC",
        "max_seq_length": 64,
        "pad_to_max_length": True,
        "max_predict_samples": 7,
        "do_predict": True,
        "tokenizer_name": "some/tokenizer",
        "use_fast_tokenizer": False,
        "ignore_mismatched_sizes": True,
    },
    "image_classification": {
        "train_val_split": 0.2,
        "image_processor_name": "some/processor",
        "image_column_name": "img",
        "label_column_name": "labels",
        "ignore_mismatched_sizes": True,
        "remove_unused_columns": False,
    },
    "clm": {
        "tokenizer_name": "some/tokenizer",
        "use_fast_tokenizer": False,
        "block_size": 128,
        "validation_split_percentage": 10,
        "preprocessing_num_workers": 2,
        "keep_linebreaks": False,
        "torch_dtype": "bfloat16",
    },
}
NOT_ASKED = {"streaming": False, "use_auth_token": False, "low_cpu_mem_usage": False}
SCRIPTS = {"glue": "run_glue", "image_classification": "run_image_classification", "clm": "run_clm"}


def parsed(kind_name, argv):
    """All options by name."""
    kind = task_kind(kind_name)
    types = (*kind.argument_classes, RunArguments, kind.training_arguments)
    values = {}
    for part in parse(types, argv, defaults=load_script(SCRIPTS[kind_name]).defaults):
        values |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return values


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_is_taken_from_a_command_line_and_from_json(tmp_path, kind):
    if kind == "clm":
        pytest.importorskip("trl")
    options = {name: value for name, value in (COMMON | OPTIONS[kind]).items() if name != "per_gpu_train_batch_size"}
    (tmp_path / "args.json").write_text(json.dumps(options | NOT_ASKED))
    by_file = parsed(kind, [str(tmp_path / "args.json")])
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    by_line = parsed(kind, [*argv, "--streaming", "False", "--use_auth_token=false"])
    ours = {"evaluation_strategy": "eval_strategy", "torch_dtype": "dtype", "warmup_ratio": "warmup_steps"}
    ours["preprocessing_num_workers"] = "dataset_num_proc"
    for name, value in options.items():
        name = ours.get(name, name) if ours.get(name, name) in by_line else name
        value = value.lower() if name == "task_name" else value
        assert by_file[name] == by_line[name] == value, name


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--streaming"], "streaming: not an option here: examples are loaded completely; use max_train_samples"),
        (["--streaming", "True"], "max_train_samples"),
        (["--use_auth_token"], "set token"),
        (["--low_cpu_mem_usage=True"], "remove it"),
    ],
)
def test_what_has_no_place_names_our_equivalent(kind, argv, message):
    if kind == "clm":
        pytest.importorskip("trl")
    with pytest.raises(InputError, match=message):
        parsed(kind, argv)


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        ("glue", ["--block_size", "3"], "use max_seq_length"),
        ("glue", ["--preprocessing_num_workers", "3"], "one process"),
        ("clm", ["--max_seq_length", "3"], "use max_length or block_size"),
    ],
)
def test_an_option_of_another_script_is_explained(kind, argv, message):
    if kind == "clm":
        pytest.importorskip("trl")
    with pytest.raises(InputError, match=message):
        parsed(kind, argv)


def test_negated_switches_and_old_names():
    values = parsed("glue", ["--no_use_fast_tokenizer", "--evaluation_strategy", "epoch", "--no_cuda"])
    assert values["use_fast_tokenizer"] is False and values["use_cpu"] is True
    assert values["eval_strategy"] == "epoch"


def model_arguments(*argv):
    return parse(task_kind("glue").argument_classes, list(argv), defaults=lambda given: {})[1]


def test_a_new_model_from_its_type_with_changes():
    arguments = model_arguments("--model_type", "gpt2", "--config_overrides", "n_embd=8,resid_pdrop=0.2,n_head=2")
    config = load_config(arguments, vocab_size=300)
    assert (config.n_embd, config.resid_pdrop, config.n_head, config.vocab_size) == (8, 0.2, 2, 300)
    assert load_config(model_arguments("--model_type", "gpt2"), vocab_size=300).vocab_size == 300
    changed = model_arguments("--model_type", "gpt2", "--config_overrides", "vocab_size=400,scale_attn_weights=false")
    config = load_config(changed, vocab_size=300)
    assert config.vocab_size == 400 and config.scale_attn_weights is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model_type", "gpt2", "--config_overrides", "n_emb=8"], "config_overrides: key n_emb"),
        (["--model_type", "gpt2", "--config_overrides", "n_embd"], "'n_embd' has no value"),
        (["--model_type", "gpt2", "--config_overrides", "n_embd=8,n_embd=9"], "'n_embd' is given twice"),
        (["--model_type", "gpt2", "--config_overrides", "n_embd=x"], "config_overrides: invalid literal"),
        (["--model_type", "gpt3"], "model_type 'gpt3' is not known"),
        (["--config_overrides", "n_embd=8"], "config_overrides: allowed only with model_type"),
        (
            ["--model_type", "gpt2", "--config_name", "x", "--config_overrides", "n_embd=8"],
            "allowed only with model_type",
        ),
        (["--model_type", "gpt2", "--model_config", "{model_type: bert}"], "model_type and model_config"),
        (["--model_config", "{model_type: gpt2, n_embd: x}"], "model_config: gpt2"),
    ],
)
def test_bad_model_settings_are_named(argv, message):
    with pytest.raises(InputError, match=message):
        load_config(model_arguments(*argv))
