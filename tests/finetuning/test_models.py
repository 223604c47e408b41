"""Checkpoints found in practice: adapters, bfloat16, trained for another task, or in need of a missing package."""

import json

import pytest
import torch
from tiny import FAST, load_script, read_json, save_bert, write_rows
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_dualadam.finetuning.config import InputError
from hf_dualadam.finetuning.models import ModelArguments, load_config, loading, model_builder, model_order

ROWS = [{"sentence": f"the film is {word}", "label": index % 2} for index, word in enumerate("abcdefgh")]
MODEL = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
SHARPNESS = ["--lanczos_steps", "2", "--trace_samples", "1", "--examples", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Examples, a BERT without a head, and one trained on the examples."""
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    for split in ("train", "validation"):
        write_rows(folder / "data" / f"{split}.csv", ROWS)
    argv = ["--task_name", "sst2", "--data_dir", str(folder / "data"), "--model_name_or_path", str(folder / "bert")]
    load_script("run_glue").main([*argv, *FAST, "--output_dir", str(folder / "trained")])
    return folder


def measure(checkpoint, *argv):
    load_script("measure_sharpness").main([str(checkpoint), *SHARPNESS, *argv])


def test_a_head_that_nobody_trained_is_not_measured(folder, tmp_path):
    data = ["--task_name", "sst2", "--data_dir", str(folder / "data")]
    with pytest.raises(InputError, match="bert' has no trained weights for this task: it lacks classifier.bias"):
        measure(folder / "bert", *data, "--output_dir", str(tmp_path / "out"))
    causal = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=32, pad_token_id=0))
    causal.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gpt2" / name).write_bytes((folder / "bert" / name).read_bytes())
    with pytest.raises(InputError, match="it lacks score.weight"):
        measure(tmp_path / "gpt2", *data, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_checkpoint_is_measured_in_float32(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "trained", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((folder / "trained" / name).read_bytes())
    data = ["--task_name", "sst2", "--data_dir", str(folder / "data")]
    measure(tmp_path / "half", *data)
    figures = read_json(tmp_path / "half" / "sharpness.json")
    assert figures["hessian_trace_stderr"] is None and figures["loss"] > 0
    measure(folder / "trained", *data, "--output_dir", str(tmp_path / "whole"))
    assert figures["loss"] == pytest.approx(read_json(tmp_path / "whole" / "sharpness.json")["loss"], rel=0.05)


def test_held_out_examples_are_measured_without_training_examples(folder, tmp_path):
    file = ["--validation_file", str(folder / "data" / "validation.csv"), "--split=validation", "--script=glue"]
    measure(folder / "trained", "--task_name", "sst2", *file, "--output_dir", str(tmp_path))
    assert read_json(tmp_path / "sharpness.json")["split"] == "validation"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lanczos_steps", "1"], "lanczos_steps: 1 is out of range; should be 2 to 1000"),
        (["--lanczos_steps", "1000000"], "lanczos_steps: 1000000 is out of range"),
        (["--rho", "1e30"], r"rho: 1e\+30 is out of range"),
        (["--trace_samples", "0"], "trace_samples: 0 is out of range"),
        (["--slice_radius", "inf"], "slice_radius"),
        (["--examples", "0"], "examples: 0 is out of range"),
        (["--split", "test"], "split: 'test' is not one of"),
        (["--script=clip"], "'clip' is not a kind of task"),
        (["--script", "image_classification", "--task_name", "sst2"], "unknown option 'task_name'"),
    ],
)
def test_bad_numbers_are_refused_before_the_work(folder, argv, message):
    with pytest.raises(InputError, match=message):
        load_script("measure_sharpness").main([str(folder / "trained"), "--task_name", "sst2", *argv])


def test_an_adapter_is_loaded_as_what_it_is(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    write_rows(tmp_path / "texts.jsonl", [{"text": f"some text to learn, number {n}"} for n in range(8)])
    run_clm = load_script("run_clm")
    data = ["--train_file", str(tmp_path / "texts.jsonl"), "--validation_file", str(tmp_path / "texts.jsonl"), *FAST]
    data += ["--generation_samples", "0", "--eval_strategy", "no"]
    new = ["--model_config", json.dumps(MODEL), "--new_tokenizer_size", "270", "--output_dir", str(tmp_path / "base")]
    run_clm.main([*data, *new])
    base = ["--model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "lora"), "--use_peft"]
    trained = run_clm.main([*data, *base, "--learning_rate", "0.1"])
    adapter = ["--model_name_or_path", str(tmp_path / "lora")]
    alone = run_clm.main([*data, *adapter, "--do_eval", "--output_dir", str(tmp_path / "eval")])
    assert alone.metrics["eval_loss"] == pytest.approx(trained.metrics["eval_loss"], rel=1e-5)
    further = run_clm.main([*data, *adapter, "--output_dir", str(tmp_path / "further")])
    names = [name for name, parameter in further.trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert (tmp_path / "further" / "adapter_model.safetensors").exists()
    with pytest.raises(InputError, match="use_peft: .* is already an adapter"):
        run_clm.main([*data, *adapter, "--use_peft", "--output_dir", str(tmp_path / "x")])
    measure(tmp_path / "lora", "--script", "clm", "--train_file", str(tmp_path / "texts.jsonl"), "--max_length", "16")
    assert read_json(tmp_path / "lora" / "sharpness.json")["hessian_top_eigenvalue"] is not None


def test_an_adapter_without_its_base_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such"}')
    with pytest.raises(InputError, match="model_name_or_path: 'no/such' cannot be loaded"):
        load_config(ModelArguments(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="names no base model"):
        load_config(ModelArguments(str(tmp_path)))


def test_a_checkpoint_of_an_absent_package_is_one_line(folder, tmp_path):
    pytest.importorskip("accelerate")
    for path in (folder / "trained").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = read_json(tmp_path / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ModelArguments(str(tmp_path))
    build = model_builder(arguments, load_config(arguments), AutoModelForSequenceClassification)
    with pytest.raises(InputError, match="model_name_or_path: .* cannot be loaded: .*(bitsandbytes|GPU|CUDA)"):
        build()


@pytest.mark.parametrize("error", [ImportError("\n\nneeds x\nmore"), KeyError("x"), OSError("x"), RuntimeError("x")])
def test_what_cannot_be_loaded_is_one_line(error):
    with pytest.raises(InputError, match="option: 'name' cannot be loaded: .*x"), loading("option", "name"):
        raise error
    with pytest.raises(torch.OutOfMemoryError), loading("option", "name"):
        raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    ("of_model", "classes", "expected"),
    [
        (["b", "a"], ("a", "b"), ("b", "a")),
        (["B", "A"], ("a", "b"), ("b", "a")),
        (["a", "A"], ("A", "a"), ("a", "A")),
        (["LABEL_0", "LABEL_1"], ("a", "b"), ("a", "b")),
        (["a", "A"], ("a", "b"), ("a", "b")),
        (["A", "b"], ("a", "A"), ("a", "A")),
    ],
)
def test_classes_take_the_order_of_a_model_that_knows_them(of_model, classes, expected):
    config = GPT2Config(id2label=dict(enumerate(of_model)), label2id={name: i for i, name in enumerate(of_model)})
    assert model_order(classes, config) == expected
