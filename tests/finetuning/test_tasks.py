"""A GLUE-like data set takes one table entry, a kind of task one registry entry; other texts need neither."""

import logging

import pytest
import torch
from datasets import Dataset
from tiny import FAST, load_script, read_json, save_bert, write_rows
from transformers import default_data_collator

from hf_dualadam.finetuning import glue, tasks
from hf_dualadam.finetuning.config import InputError, parse
from hf_dualadam.finetuning.models import ModelArguments
from hf_dualadam.finetuning.tasks import Task, TaskKind, task_kind
from hf_dualadam.finetuning.training import run

ROWS = [{"text": f"the film is {word}", "label": index % 2} for index, word in enumerate("abcdefgh")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


def built(model, train, **options):
    arguments = glue.GlueArguments(train_file=str(train), validation_file=str(train), **options)
    return glue.build(arguments, ModelArguments(str(model)))


def test_a_data_set_like_glue_is_one_table_entry(tmp_path, model, monkeypatch):
    toy = glue.GlueTask(("title", "body"), ("ham", "spam"), ("accuracy", "f1"), splits=glue.MNLI_SPLITS)
    monkeypatch.setitem(glue.TASKS, "toy", toy)
    rows = [{"title": "the film", "body": row["text"], "label": ["ham", "spam"][row["label"]]} for row in ROWS]
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_rows(tmp_path / "data" / f"{split}.csv", rows)
    options = ["--task_name", "toy", "--data_dir", str(tmp_path / "data"), "--model_name_or_path", str(model), *FAST]
    load_script("run_glue").main([*options, "--output_dir", str(tmp_path / "out")])
    results = read_json(tmp_path / "out" / "all_results.json")
    assert {"eval_f1", "eval_f1_mm", "eval_combined_score"} <= results.keys() and results["total_flos"] > 0, results


def test_a_kind_of_task_is_one_registry_entry(tmp_path, monkeypatch):
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(1, 1)

        def forward(self, x, labels=None):
            return {"loss": ((self.line(x[:, None]).squeeze(1) - labels) ** 2).mean(), "logits": self.line(x[:, None])}

    def build(args, *, training_args, splits):
        data = Dataset.from_dict({"x": [1.0, 2.0], "labels": [2.0, 4.0]})
        return Task(
            name="line",
            build_model=lambda trained=False: Line(),
            train_dataset=data,
            eval_datasets={"": data},
            compute_metrics=lambda prediction: {"zero": 0.0},
            main_metric="zero",
            data_collator=default_data_collator,
        )

    monkeypatch.setitem(tasks.KINDS, "line", TaskKind((ModelArguments,), build))
    kind = task_kind("line")
    own, args = parse((*kind.argument_classes, kind.training_arguments), ["--output_dir", str(tmp_path), *FAST])
    finished = run(kind.build(own, training_args=args, splits=["train"]), args, write=False)
    assert finished.metrics["eval_zero"] == 0.0
    with pytest.raises(
        InputError, match="'lines' is not a kind of task; should be one of glue, image_classification, clm, line"
    ):
        task_kind("lines")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(tasks.KINDS, "toy", "hf_dualadam.no_such_module")
    with pytest.raises(InputError, match=r'pip install "hf_dualadam\[clm\]"'):
        task_kind("toy")


@pytest.mark.parametrize(
    ("header", "row", "used", "unused"),
    [
        (",review,label", "{n},bad thing {n},{c}", "'review'", "''"),
        ("Unnamed: 0,review,label", "{n},bad thing {n},{c}", "'review'", "'Unnamed: 0'"),
        ("id,year,review,label", "{n},2024,bad thing {n},{c}", "'review'", "'id', 'year'"),
        ("sentence2,sentence1,label", "b {n},a {n},{c}", "'sentence1' and 'sentence2'", None),
        ("author,text,label", "me,a {n},{c}", "'text'", "'author'"),
        ("one,two,three,label", "a {n},b {n},c {n},{c}", "'one' and 'two'", "'three'"),
        ("label,review", "{c},fine {n}", "'review'", None),
    ],
)
def test_text_columns_are_found_and_said(tmp_path, model, caplog, header, row, used, unused):
    lines = [row.format(n=n, c=n % 2) for n in range(6)]
    (tmp_path / "a.csv").write_text("\n".join([header, *lines]) + "\n")
    with caplog.at_level(logging.INFO, "hf_dualadam"):
        task = built(model, tmp_path / "a.csv")
    assert f"the texts are {used}" in caplog.text and (unused is None or f"not {unused}" in caplog.text)
    assert len(task.train_dataset) == 6 and task.label_names == ["0", "1"]


def test_numbers_alone_are_no_text(tmp_path, model):
    (tmp_path / "a.csv").write_text("id,label\n1,0\n2,1\n")
    with pytest.raises(InputError, match="has no text column; its columns are 'id', 'label'"):
        built(model, tmp_path / "a.csv")


@pytest.mark.parametrize("scores", [[0.01, 0.5, -3.0], ["0.25", "100", "7"], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_texts_with_scores_are_a_regression(tmp_path, model, scores, ending):
    rows = [{"text": f"the film {index}", "label": scores[index % 3]} for index in range(9)]
    path = write_rows(tmp_path / f"a.{ending}", rows)
    task = built(model, path)
    assert task.label_names is None and task.main_metric == "pearson"
    assert task.train_dataset["label"][:3] == [float(score) for score in scores]
    model_built = task.build_model()
    assert model_built.config.num_labels == 1 and model_built.config.problem_type == "regression"


def test_a_regression_runs_and_is_evaluated_alone(tmp_path, model):
    rows = [{"text": f"the film {index}", "label": index / 7} for index in range(9)]
    path = str(write_rows(tmp_path / "a.csv", rows))
    options = ["--train_file", path, "--validation_file", path, "--test_file", path, *FAST]
    run_glue = load_script("run_glue")
    first = [*options, "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    metrics = run_glue.main([*first, "--do_train", "--do_eval", "--do_predict"]).metrics
    assert metrics["eval_mse"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert metrics["generalization_gap_mse"] == pytest.approx(metrics["eval_mse"] - metrics["train_eval_mse"])
    assert "eval_combined_score" not in metrics
    again = ["--validation_file", path, "--model_name_or_path", str(tmp_path / "out"), "--do_eval", "--use_cpu"]
    alone = run_glue.main([*again, "--output_dir", str(tmp_path / "again")]).metrics
    assert alone["eval_mse"] == pytest.approx(metrics["eval_mse"])


@pytest.mark.parametrize("bad", ["high", None])
def test_a_score_that_is_no_number_is_named(tmp_path, model, bad):
    rows = [{"text": "a", "label": value} for value in (0.5, 1.5, bad)]
    with pytest.raises(InputError, match="row 2"):
        built(model, write_rows(tmp_path / "a.jsonl", rows))
