"""scripts/run_clm.py: texts and instructions, full and LoRA, exact perplexities, and clear errors."""

import importlib.util
import math
import random

import pytest
import torch
import yaml
from tiny import FAST, ROOT, load_script, read_json, sentence, write_rows

pytest.importorskip("trl", reason="the extra [clm] is not installed")
pytest.importorskip("peft", reason="the extra [clm] is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: E402

from hf_dualadam import DualAdam  # noqa: E402
from hf_dualadam.finetuning import clm, perplexity  # noqa: E402
from hf_dualadam.finetuning.config import InputError, parse  # noqa: E402
from hf_dualadam.finetuning.models import ModelArguments, load_config  # noqa: E402
from hf_dualadam.finetuning.training import RunArguments  # noqa: E402

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NEW_MODEL = ["--model_config", yaml.safe_dump(MODEL, default_flow_style=True, width=1000).strip()]
NEW_MODEL += ["--new_tokenizer_size", "300"]
SHORT = [*FAST, "--max_new_tokens", "5", "--logging_steps", "1"]
CONFIGS = [*sorted((ROOT / "configs" / "clm").glob("*.yaml")), ROOT / "configs" / "quickstart" / "clm.yaml"]


@pytest.fixture(scope="module")
def script():
    return load_script("run_clm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of very different lengths, and prompts with completions, as files of several kinds."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    texts = [". ".join(sentence(generator) for _ in range(generator.choice([1, 12]))) for _ in range(40)]
    write_rows(folder / "train.jsonl", [{"text": text, "source": index} for index, text in enumerate(texts[:30])])
    write_rows(folder / "validation.parquet", [{"text": text} for text in texts[30:]])
    (folder / "texts.txt").write_text("\n\n".join(texts))
    pairs = [{"prompt": f"{sentence(generator)} =", "completion": f" {sentence(generator)}"} for _ in range(30)]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "int8.yaml").write_text("dtype: int8")
    return folder


@pytest.fixture(scope="module")
def text_run(script, data, tmp_path_factory):
    """A new model trained on texts, without packing: batches hold different numbers of tokens."""
    folder = tmp_path_factory.mktemp("text_run")
    files = ["--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "validation.parquet")]
    options = [
        "--per_device_eval_batch_size",
        "3",
        "--max_length",
        "48",
        "--eval_strategy",
        "no",
        "--packing",
        "false",
    ]
    return script.main([*NEW_MODEL, *files, *options, *SHORT, "--output_dir", str(folder)]), folder


def tokens_of(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text + tokenizer.eos_token)["input_ids"][:48] for text in texts]


def test_run_leaves_the_files_of_the_other_scripts(text_run):
    finished, folder = text_run
    assert isinstance(finished.trainer.optimizer.optimizer, DualAdam)
    results = read_json(folder / "all_results.json")
    assert results == finished.metrics
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    gap = results["eval_perplexity"] - results["train_eval_perplexity"]
    assert results["generalization_gap_perplexity"] == pytest.approx(gap)
    assert not {name for name in results if name.endswith(perplexity.TRL_METRICS)}
    for name in ("model.safetensors", "tokenizer.json", "learning_curves.png", "README.md", "trainer_state.json"):
        assert (folder / name).exists(), name


def test_perplexity_is_that_of_the_saved_model_per_token(text_run):
    finished, folder = text_run
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = 0
    for ids in tokens_of(folder, finished.task.eval_datasets[""]["text"]):
        batch = torch.tensor([ids])
        with torch.no_grad():
            total += float(model(input_ids=batch, labels=batch).loss) * (len(ids) - 1)
        count += len(ids) - 1
    assert finished.metrics["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_unigram_perplexity_is_on_the_same_tokens(text_run):
    finished, folder = text_run
    train = [token for ids in tokens_of(folder, finished.task.train_dataset["text"]) for token in ids]
    held_out = [t for ids in tokens_of(folder, finished.task.eval_datasets[""]["text"]) for t in ids[1:]]
    size = len(AutoTokenizer.from_pretrained(folder))
    losses = [-math.log((train.count(token) + 1) / (len(train) + size)) for token in held_out]
    assert finished.metrics["unigram_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)))


def test_samples_go_on_from_held_out_texts(text_run):
    finished, folder = text_run
    samples = read_json(folder / "generation_results.json")
    assert len(samples) == 3
    held_out = finished.task.eval_datasets[""]["text"]
    for sample in samples:
        assert sample["prompt"] + sample["reference"] in list(held_out)
        assert isinstance(sample["generated"], str)


def test_lora_learns_completions_only_on_a_saved_model(script, data, text_run, tmp_path, capsys):
    options = ["--model_name_or_path", str(text_run[1]), "--train_file", str(data / "pairs.jsonl"), "--use_peft"]
    finished = script.main([*options, *SHORT, "--output_dir", str(tmp_path), "--validation_split_percentage", "20"])
    trainer = finished.trainer
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    assert (len(finished.task.train_dataset), len(finished.task.eval_datasets[""])) == (24, 6)
    tokenizer = trainer.processing_class
    for row, example in zip(trainer.train_dataset, finished.task.train_dataset, strict=True):
        learned = tokenizer.decode([token for token in row["labels"] if token >= 0])
        assert learned == example["completion"] + tokenizer.eos_token
    assert finished.metrics["eval_perplexity"] > 1
    samples = read_json(tmp_path / "generation_results.json")
    assert {sample["prompt"] for sample in samples} <= set(finished.task.eval_datasets[""]["prompt"])
    assert "perplexity of a unigram model on the same tokens" in capsys.readouterr().out


def test_evaluation_alone_packs_text_files(script, data, text_run, tmp_path):
    options = ["--model_name_or_path", str(text_run[1]), "--validation_file", str(data / "texts.txt"), "--do_eval"]
    packing = [
        "--packing",
        "--packing_strategy",
        "wrapped",
        "--max_length",
        "32",
        "--generation_prompts",
        "the film is",
    ]
    finished = script.main([*options, *packing, *SHORT, "--output_dir", str(tmp_path)])
    assert len(finished.task.eval_datasets[""]) == 40
    lengths = [len(row["input_ids"]) for row in finished.trainer.eval_dataset]
    assert set(lengths[:-1]) == {32} and lengths[-1] <= 32
    assert "unigram_perplexity" not in finished.metrics and finished.metrics["eval_perplexity"] > 1
    assert [sample["prompt"] for sample in read_json(tmp_path / "generation_results.json")] == ["the film is"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no examples: set"),
        (["--train_file", "{data}/train.jsonl", "--dataset_text_field", "body"], "'body' .* columns: text, source"),
        (["--train_file", "{data}/texts.txt", "--validation_file", "{data}/train.jsonl"], "both should be .txt"),
        (["--validation_file", "{data}/texts.txt"], "no train examples"),
        (["--train_file", "{data}/texts.txt", "--tokenizer_name", "x"], "set only one of them"),
        (["--train_file", "{data}/texts.txt", "--new_tokenizer_size", "100"], "100 is out of range; should be 258"),
        (["--train_file", "{data}/texts.txt", "--max_new_tokens", "0"], "max_new_tokens: 0 is out of range"),
        (["{data}/int8.yaml", "--train_file", "{data}/texts.txt"], "dtype: 'int8' should be one of auto"),
        (["--train_file", "{data}/texts.txt", "--load_in_4bit"], "only for a pretrained model"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(script, data, tmp_path, argv, message):
    argv = [part.format(data=data) for part in argv]
    config = argv[:1] if argv and argv[0].endswith(".yaml") else []
    with pytest.raises(InputError, match=message):
        script.main([*config, *NEW_MODEL, *argv[len(config) :], "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_four_bits_need_lora_and_bitsandbytes(script, data, text_run, tmp_path, monkeypatch):
    options = ["--model_name_or_path", str(text_run[1]), "--train_file", str(data / "pairs.jsonl"), "--load_in_4bit"]
    with pytest.raises(InputError, match="set use_peft=true"):
        script.main([*options, "--output_dir", str(tmp_path / "out")])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(InputError, match="load_in_4bit: needs the package bitsandbytes"):
        script.main([*options, "--use_peft", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_loads_and_its_optimizer_builds(path, script):
    types = (ModelArguments, clm.ModelConfig, clm.ClmArguments, RunArguments, clm.SFTConfig)
    model_args, _, _, _, args = parse(types, [str(path)], defaults=script.defaults)
    assert path.read_text().startswith("# ")
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert isinstance(optimizer_cls([torch.nn.Parameter(torch.ones(2))], **kwargs), DualAdam)
    assert args.learning_rate == yaml.safe_load(path.read_text())["learning_rate"]
    if model_args.model_config:
        assert load_config(model_args).hidden_size == model_args.model_config["hidden_size"]
