"""run_glue.py with a tiny random model: every task, its output, and the errors."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG, FAST, ROOT, WORDS, glue_rows, load_script, read_json, save_bert, write_rows
from transformers import TrainingArguments

from hf_dualadam.finetuning import glue
from hf_dualadam.finetuning.config import InputError, run_main
from hf_dualadam.finetuning.models import ModelArguments
from hf_dualadam.finetuning.training import run

run_glue = load_script("run_glue")

MEASURES = {
    "cola": {"matthews_correlation"},
    "sst2": {"accuracy"},
    "mrpc": {"accuracy", "f1", "combined_score"},
    "stsb": {"pearson", "spearmanr", "combined_score"},
    "qqp": {"accuracy", "f1", "combined_score"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "wnli": {"accuracy"},
}
FORMATS = dict(zip(MEASURES, ["parquet", "csv", "tsv", "jsonl"] * 3, strict=False))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


def make_task(folder, name, extension="parquet", train=14, held_out=6):
    """A folder in GLUE's format; labels of the first four tasks are numbers, of the others class names."""
    task = glue.TASKS[name]
    labels = list(task.classes) if name > "q" and task.classes else list(range(len(task.classes) or 6))
    splits = {"train": train, "validation": held_out, "test": held_out}
    if name == "mnli":
        splits = {"train": train, "validation_matched": 5, "validation_mismatched": 4, "test_matched": 3}
    for seed, (split, count) in enumerate(splits.items()):
        rows = glue_rows(task.texts, labels, count, seed)
        rows = [row | {"label": -1} for row in rows] if split.startswith("test") else rows
        write_rows(folder / f"{split}.{extension}", rows)
    return folder


def command(model, folder, name, output, *options):
    paths = ["--task_name", name, "--data_dir", str(folder), "--output_dir", str(output)]
    return [*paths, "--model_name_or_path", str(model), *FAST, *options]


@pytest.mark.parametrize("name", MEASURES)
def test_every_task_trains_evaluates_and_predicts(tmp_path, model, name):
    folder = make_task(tmp_path / "data", name, FORMATS[name])
    options = ["--do_train", "--do_eval", "--do_predict", "--max_train_samples", "12"]
    finished = run_glue.main(command(model, folder, name, tmp_path / "out", *options))
    results = read_json(tmp_path / "out" / "all_results.json")
    for suffix in ("", "_mm") if name == "mnli" else ("",):
        for measure in MEASURES[name] | {"loss"}:
            held_out, train = results[f"eval_{measure}{suffix}"], results[f"train_eval_{measure}"]
            gap = held_out - train if measure == "loss" else train - held_out
            assert results[f"generalization_gap_{measure}{suffix}"] == pytest.approx(gap)
    assert results["train_samples"] == 12
    assert results["train_eval_samples"] == results["eval_samples"] == (5 if name == "mnli" else 6)
    header, *lines = (tmp_path / "out" / f"predict_results_{name}.txt").read_text().splitlines()
    assert header == "index\tprediction" and len(lines) == (3 if name == "mnli" else 6)
    predicted = {line.split("\t")[1] for line in lines}
    classes = glue.TASKS[name].classes
    assert predicted <= set(classes) if classes else all(float(score) == float(score) for score in predicted)
    assert finished.trainer.model.config.id2label == (dict(enumerate(classes)) or {0: "score"})


def test_a_run_leaves_what_users_expect(tmp_path, model):
    folder = make_task(tmp_path / "data", "sst2")
    run_glue.main(command(model, folder, "sst2", tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"README.md", "all_results.json", "config.json", "eval_results.json", "learning_curves.png"}
    expected |= {"model.safetensors", "tokenizer.json", "train_results.json", "trainer_state.json"}
    assert written >= expected | {"training_args.bin", "checkpoint-3"}
    assert "DUALADAM" in (tmp_path / "out" / "README.md").read_text()
    history = read_json(tmp_path / "out" / "trainer_state.json")["log_history"]
    assert {"alpha", "inverse_share"} <= {key for entry in history for key in entry}
    assert read_json(tmp_path / "out" / "train_results.json").keys().isdisjoint({"eval_loss", "train_eval_loss"})
    output = tmp_path / "evaluated"
    metrics = run_glue.main(command(tmp_path / "out", folder, "sst2", output, "--do_eval")).metrics
    assert metrics["eval_loss"] == pytest.approx(read_json(tmp_path / "out" / "eval_results.json")["eval_loss"])
    assert not (output / "model.safetensors").exists() and "generalization_gap_loss" not in metrics


def test_resumed_run_ends_with_the_same_weights(tmp_path, model):
    folder = make_task(tmp_path / "data", "sst2", train=24)
    options = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "5", "--save_total_limit", "9"]
    whole = command(model, folder, "sst2", tmp_path / "out", *options)
    run_glue.main(whole)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(InputError, match="holds another run.*resume_from_checkpoint=true"):
        run_glue.main(whole)
    run_glue.main([*whole, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")])
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    state = tmp_path / "out" / "checkpoint-5" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # as if the run had been killed while writing it
    with pytest.raises(InputError, match="checkpoint-5/trainer_state.json: cannot be read: it is truncated"):
        run_glue.main([*whole, "--resume_from_checkpoint", str(state.parent)])
    resumed = run_glue.main([*whole, "--resume_from_checkpoint", "true"])
    assert resumed.trainer.state.global_step == 5 and state.read_text().endswith("}\n")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path, model):
    folder, output = make_task(tmp_path / "data", "sst2"), tmp_path / "out"
    run_glue.main(command(model, folder, "sst2", output, "--do_train", "--do_predict"))
    (output / "notes.txt").write_text("mine")
    run_glue.main(command(model, folder, "sst2", output, "--max_steps", "1", "--overwrite_output_dir"))
    written = {path.name for path in output.iterdir()}
    assert {"notes.txt", "checkpoint-1"} <= written
    assert written.isdisjoint({"checkpoint-3", "predict_results_sst2.txt"})


def test_seed_decides_new_weights_and_nothing_is_written(tmp_path, model):
    folder = make_task(tmp_path / "data", "sst2")
    scratch = ModelArguments(model_config={"model_type": "bert", "vocab_size": 60, **CONFIG})
    options = glue.GlueArguments(task_name="sst2", data_dir=str(folder), tokenizer_name=str(model))
    task = glue.build(options, scratch)

    def train(seed, name):
        args = TrainingArguments(
            str(tmp_path / name), seed=seed, max_steps=2, use_cpu=True, do_train=True, do_eval=True, report_to="none"
        )
        return run(task, args, write=False).metrics["eval_loss"]

    first, again, other = train(1, "a"), train(1, "b"), train(2, "c")
    assert first == again != other
    assert not list(tmp_path.glob("a/*.json"))


@pytest.mark.parametrize(
    "optimizer",
    [["--optim", "adamw_torch"], ["--optim", "invadam", "--optim_args", "normalize_inverse=true"], ["--optim", "sgd"]],
)
def test_other_optimizers_run_through_the_same_script(tmp_path, model, optimizer):
    folder = make_task(tmp_path / "data", "sst2")
    metrics = run_glue.main(command(model, folder, "sst2", tmp_path / "out", *optimizer)).metrics
    assert metrics["eval_accuracy"] >= 0


def test_an_optimizer_without_a_name(tmp_path, model):
    folder = make_task(tmp_path / "data", "sst2")
    task = glue.build(glue.GlueArguments(task_name="sst2", data_dir=str(folder)), ModelArguments(str(model)))
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, do_train=True, report_to="none")
    finished = run(task, args, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1}), write=False)
    assert isinstance(finished.trainer.optimizer.optimizer, torch.optim.Adagrad)


def test_labels_follow_the_order_of_the_model(tmp_path):
    names = {0: "contradiction", 1: "entailment", 2: "neutral"}
    model = save_bert(tmp_path / "bert", id2label=names, label2id={name: index for index, name in names.items()})
    folder = make_task(tmp_path / "data", "mnli")
    task = glue.build(glue.GlueArguments(task_name="mnli", data_dir=str(folder)), ModelArguments(str(model)))
    assert task.label_names == list(names.values())
    assert task.train_dataset["label"][:3] == [1, 2, 0]  # the first rows are entailment, neutral, contradiction


def test_texts_without_a_task_name_and_a_new_model(tmp_path, model):
    rows = [
        {"id": i, "text": "good film" if i % 2 else "bad film", "label": "up" if i % 2 else "down"} for i in range(8)
    ]
    path = write_rows(tmp_path / "rows.csv", rows)
    config = f"{{model_type: bert, vocab_size: 60, max_position_embeddings: 16, {str(CONFIG)[1:-1]}}}"
    options = ["--train_file", str(path), "--validation_file", str(path), "--output_dir", str(tmp_path / "out")]
    finished = run_glue.main([*options, "--model_config", config, "--tokenizer_name", str(model), *FAST])
    assert finished.task.label_names == ["down", "up"] and finished.task.baseline == 0.5
    assert finished.trainer.model.config.max_position_embeddings == 16


def test_padding_and_truncation(tmp_path, model):
    folder = make_task(tmp_path / "data", "rte", train=20)
    for pad, lengths in ((False, set(range(3, 9))), (True, {8})):
        args = glue.GlueArguments(task_name="rte", data_dir=str(folder), max_seq_length=8, pad_to_max_length=pad)
        task = glue.build(args, ModelArguments(str(model)))
        assert {len(ids) for ids in task.train_dataset["input_ids"]} <= lengths
        batch = task.data_collator([task.train_dataset[i] for i in range(4)])
        assert batch["labels"].shape == (4,) and batch["input_ids"].shape[1] <= 8


def test_user_errors_are_one_line_before_anything_is_written(tmp_path, model, capsys):
    good, bad = make_task(tmp_path / "good", "sst2"), make_task(tmp_path / "bad", "sst2", "csv")
    write_rows(bad / "train.csv", [{"sentence": WORDS[0], "label": 0}, {"sentence": WORDS[1], "label": 7}])
    empty, part = tmp_path / "empty", make_task(tmp_path / "part", "sst2")
    empty.mkdir()
    (part / "validation.parquet").unlink()
    output = tmp_path / "out"
    cases = {
        "unexpected value '7' in row 1; allowed: 0 to 1 or negative, positive": command(model, bad, "sst2", output),
        "holds no train file": command(model, empty, "sst2", output),
        "data_dir: no such folder": command(model, tmp_path / "no", "sst2", output),
        "column 'sentence1' and 'sentence2' is missing": command(model, good, "rte", output),
        "holds no validation file": command(model, part, "sst2", output),
        "task_name: 'imdb' is not one of cola": command(model, good, "imdb", output),
        "unknown key 'swich_rate'": command(model, good, "sst2", output, "--optim_args", "swich_rate=0.1"),
        "model_name_or_path: 'no/model' cannot be loaded": command("no/model", good, "sst2", output),
        "unknown option 'lerning_rate', did you mean learning_rate": command(
            model, good, "sst2", output, "--lerning_rate", "1"
        ),
        "holds no complete checkpoint-<step> folder": command(
            model, good, "sst2", output, "--resume_from_checkpoint", "true"
        ),
        "model_config: bert has no setting hidden_sise": command(
            "", good, "sst2", output, "--model_config", "{model_type: bert, hidden_sise: 3}"
        ),
    }
    for message, argv in cases.items():
        with pytest.raises(SystemExit) as caught:
            run_main(lambda argv=argv: run_glue.main(argv))
        error = capsys.readouterr().err.strip()
        assert caught.value.code == 2 and message in error and "\n" not in error.split("error: ")[-1], error
        assert not output.exists()


def test_script_exits_with_status_2_and_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "run_glue.py"), "--task_name", "sst2", "--data_dir", "no/such"],
        capture_output=True, text=True, cwd=tmp_path, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "error: data_dir: no such folder: no/such"
    assert not list(tmp_path.iterdir())
