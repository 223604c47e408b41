"""Loss, gradient and inverse share of a step are those of its global batch, however it is split."""

import pytest
import torch
import transformers
from datasets import Dataset
from tiny import CONFIG
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    TrainingArguments,
    default_data_collator,
)

from hf_dualadam.finetuning.exact_loss import ClassifierTrainer
from hf_dualadam.finetuning.tasks import Task
from hf_dualadam.finetuning.training import run

DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
TEXT = CONFIG | {"vocab_size": 40, "max_position_embeddings": 16}
TEXT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "bert": TEXT,
    "roberta": TEXT | {"pad_token_id": 1},
    "distilbert": DISTILBERT | {"vocab_size": 40, "seq_classif_dropout": 0.0, "max_position_embeddings": 16},
    "vit": CONFIG | {"image_size": 8, "patch_size": 4, "num_channels": 1},
}
FIGURES = ("loss", "grad_norm", "inverse_rms_ratio", "inverse_share")


def task(kind, rows=8, regression=False):
    """A real classifier of the library and ``rows`` random examples."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        columns = {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator).tolist()}
    else:
        columns = {"input_ids": torch.randint(4, 40, (rows, 6), generator=generator).tolist()}
    if regression:
        columns["label"] = torch.randn(rows, generator=generator).tolist()
    else:
        columns["label"] = [row % 3 for row in range(rows)]
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    config = AutoConfig.for_model(kind, **MODELS[kind], num_labels=1 if regression else 3)
    data = Dataset.from_dict(columns)
    return Task(
        name=kind,
        build_model=lambda trained=False: auto.from_config(config),
        train_dataset=data,
        eval_datasets={"": data},
        compute_metrics=None,
        main_metric="loss",
        data_collator=default_data_collator,
        trainer_cls=ClassifierTrainer,
    )


def step(of, folder, per_device, accumulation, **options):
    """The first training log and the evaluation of a run of one step."""
    values = {"max_grad_norm": 0.5, "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    values |= {"optim": "dualadam", "optim_args": "switch_rate=0.1", "learning_rate": 1e-2, "use_cpu": True}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=per_device,
        do_train=True,
        do_eval=True,
        save_strategy="no",
        **(values | options),
    )
    finished = run(of, args, write=False, print_logs=False)
    log = next(entry for entry in finished.trainer.state.log_history if "loss" in entry)
    return {name: log[name] for name in FIGURES} | {"eval_loss": finished.metrics["eval_loss"]}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("distilbert", {"label_smoothing_factor": 0.2}),
        ("vit", {}),
        ("bert", {"regression": True}),
    ],
)
def test_micro_batches_give_the_figures_of_the_whole(tmp_path, kind, options):
    of = task(kind, regression=options.pop("regression", False))
    whole = step(of, tmp_path / "whole", 8, 1, **options)
    assert 0.1 < whole["loss"] < 5
    for per_device, accumulation in ((4, 2), (2, 4), (3, 3)):  # the last: parts of 3, 3 and 2 examples
        parts = step(of, tmp_path / f"{per_device}x{accumulation}", per_device, accumulation, **options)
        assert parts == pytest.approx(whole, rel=2e-4)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="Transformers 4 is right")
def test_trainer_alone_multiplies_the_loss_of_a_classifier(tmp_path):
    """The problem solved here; when this test fails, Transformers has solved it."""
    of = task("bert")
    of.trainer_cls = type(of).trainer_cls
    whole = step(of, tmp_path / "whole", 8, 1)["loss"]
    assert step(of, tmp_path / "parts", 2, 4)["loss"] == pytest.approx(4 * whole, rel=1e-3)
