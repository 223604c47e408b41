"""A loss that Trainer scales wrongly gets a one-line warning, in every Trainer it affects and in no other."""

import pytest
import torch
from tiny import CONFIG
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_dualadam.trainer.loss_scaling import CountWitness

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = BertConfig(vocab_size=32, num_labels=3, **CONFIG, **NO_DROPOUT)
LLAMA = LlamaConfig(vocab_size=32, num_labels=3, pad_token_id=0, **CONFIG)


class _OwnMean(Trainer):
    """A custom loss that is the mean over the micro-batch, a common mistake."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class _OwnSum(Trainer):
    """The same loss, divided as Trainer expects."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum")
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class _Plus(Trainer):
    """Adds to Trainer's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss + 0 * sum(p.sum() for p in model.parameters())


def _mean_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def _sum_loss(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else float(num_items_in_batch))


# Model, Trainer, and options of both; which combinations are wrong depends on transformers, so it is measured.
CASES = {
    "bert": (BertForSequenceClassification, Trainer, {}, {}),
    "bert, adamw": (BertForSequenceClassification, Trainer, {}, {"optim": "adamw_torch"}),
    "bert, smoothed labels": (BertForSequenceClassification, Trainer, {}, {"label_smoothing_factor": 0.1}),
    "bert, own mean": (BertForSequenceClassification, _OwnMean, {}, {}),
    "bert, own sum": (BertForSequenceClassification, _OwnSum, {}, {}),
    "bert, function mean": (BertForSequenceClassification, Trainer, {"compute_loss_func": _mean_loss}, {}),
    "bert, function sum": (BertForSequenceClassification, Trainer, {"compute_loss_func": _sum_loss}, {}),
    "bert, masked": (BertForMaskedLM, Trainer, {}, {}),
    "llama": (LlamaForSequenceClassification, Trainer, {}, {}),
    "llama, causal": (LlamaForCausalLM, Trainer, {}, {}),
    "llama, causal, plus": (LlamaForCausalLM, _Plus, {}, {}),
}


def _rows(model_cls, rows=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 32, (rows, 6), generator=generator)
    per_token = model_cls in (BertForMaskedLM, LlamaForCausalLM)
    labels = tokens if per_token else torch.arange(rows) % 3
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y} for t, y in zip(tokens, labels)]


def _first_loss(case, accumulation, folder, set_up=lambda trainer: None):
    model_cls, trainer_cls, options, arguments = case
    torch.manual_seed(0)
    model = model_cls(LLAMA if model_cls.__name__.startswith("Llama") else BERT)
    args = {
        "optim": "dualadam",
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = trainer_cls(model, TrainingArguments(str(folder), **args), train_dataset=_rows(model_cls), **options)
    set_up(trainer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("name", CASES)
def test_warns_where_the_loss_depends_on_how_the_batch_is_cut_up(name, tmp_path, caplog):
    whole = _first_loss(CASES[name], 1, tmp_path)
    assert "too large" not in caplog.text
    cut_up = _first_loss(CASES[name], 4, tmp_path)
    wrong = cut_up > 1.5 * whole
    assert cut_up == pytest.approx(4 * whole if wrong else whole, rel=1e-3)
    assert caplog.text.count("loss and gradients of this run are 4 times too large (4 accumulation steps)") == wrong


@pytest.mark.parametrize("name", ["bert", "bert, own mean"])
def test_the_remedy_in_the_message_is_one(name, tmp_path, caplog):
    def set_up(trainer):
        trainer.model_accepts_loss_kwargs = False

    losses = [_first_loss(CASES[name], accumulation, tmp_path, set_up) for accumulation in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and "too large" not in caplog.text


@pytest.mark.parametrize(
    ("use", "used"),
    [
        (lambda n, x: x / n, True),
        (lambda n, x: x * (1 / n), True),
        (lambda n, x: x / n.to(torch.float64).reshape(1), True),
        (lambda n, x: x / n.item(), True),
        (lambda n, x: x / int(n), True),
        (lambda n, x: torch.stack([n.float(), x]), True),
        (lambda n, x: x / n.clamp(min=1), True),
        (lambda n, x: (n.to("cpu"), n.device, n.dtype, n.shape, n.clone(), torch.is_tensor(n)), False),
        (lambda n, x: x.mean(), False),
    ],
)
def test_a_count_knows_whether_it_is_used(use, used):
    count = torch.tensor(4)
    witness = CountWitness.of(count)
    result = use(witness, torch.tensor(2.0))
    assert bool(witness.used) is used
    assert not (used and isinstance(result, CountWitness)) and type(count) is torch.Tensor
