"""``state_bits``, ``master_weight_bits`` and ``release_gradients`` in Trainer, from ``optim_args``."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_dualadam import DualAdam, release_gradients
from hf_dualadam.gradient_release import releases
from hf_dualadam.precision import master_state_dict, to_bfloat16
from hf_dualadam.trainer import StopOnNonFinite

MEMORY = "state_bits=8,master_weight_bits=24,switch_fraction=0.5"


class Model(torch.nn.Module):
    """A regression with matrices large enough for 8-bit moments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = torch.nn.Linear(64, 96), torch.nn.LayerNorm(96), torch.nn.Linear(96, 1)

    def forward(self, x, labels=None):
        logits = self.down(torch.tanh(self.norm(self.up(x.to(self.up.weight.dtype))))).squeeze(-1).float()
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


def _train(folder, optim_args, resume=None, model=None, callbacks=None, optimizers=(None, None), **options):
    defaults = {
        "output_dir": str(folder),
        "optim": "dualadam",
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
    }
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    data = [{"x": a, "labels": b} for a, b in zip(x, x[:, :5].sum(1))]
    args = TrainingArguments(**{**defaults, "optim_args": optim_args, **options})
    trainer = Trainer(
        model or to_bfloat16(Model()), args, train_dataset=data, callbacks=callbacks, optimizers=optimizers
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _weights(trainer):
    return torch.cat([w.flatten() for w in master_state_dict(trainer.model, trainer.optimizer).values()])


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="transformers loads no optimizer.pt with an older torch")
@pytest.mark.parametrize("released", ["false", "true"])
def test_interrupted_run_ends_with_the_same_weights(released, tmp_path):
    optim_args = f"{MEMORY},release_gradients={released}"
    whole = _train(tmp_path / "whole", optim_args)
    _train(tmp_path / "cut", optim_args, save_strategy="steps", save_steps=4)
    resumed = _train(tmp_path / "cut", optim_args, resume=str(tmp_path / "cut" / "checkpoint-4"))
    state = whole.optimizer.state[whole.model.up.weight]
    assert state["exp_avg"].dtype == state["weight_correction"].dtype == torch.int8
    assert torch.equal(_weights(resumed), _weights(whole))
    assert [set(log) & {"alpha", "loss"} for log in whole.state.log_history[:-1]] == [{"alpha", "loss"}] * 4


def test_released_gradients_change_nothing_and_leave_nothing(tmp_path):
    runs = [_train(tmp_path, f"{MEMORY},release_gradients={value}") for value in ("false", "true")]
    assert torch.equal(*map(_weights, runs))
    assert all(not p._post_accumulate_grad_hooks for p in runs[1].model.parameters())
    assert all(p.grad is None for p in runs[1].model.parameters())
    assert runs[0].state.log_history[-2]["loss"] == runs[1].state.log_history[-2]["loss"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0.*set it to 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: set it to 1"),
        ({"callbacks": [StopOnNonFinite()]}, "StopOnNonFinite with release_gradients"),
        ({"optim_args": "release_gradients=yes"}, "should be true or false"),
    ],
)
def test_what_excludes_release_stops_before_training(options, match, tmp_path):
    model = Model()
    before = model.up.weight.detach().clone()
    with pytest.raises(ValueError, match=match) as error:
        _train(tmp_path, **{"optim_args": "release_gradients=true", "model": model, **options})
    assert "\n" not in str(error.value)
    assert torch.equal(before, model.up.weight)


def test_what_a_stopped_training_left_behind_is_removed(tmp_path):
    model, reference = Model(), Model()
    with pytest.raises(ValueError, match="StopOnNonFinite"):
        _train(tmp_path, "release_gradients=true", model=model, callbacks=[StopOnNonFinite()])
    assert releases(model)
    for own in (model, reference):
        _train(tmp_path, None, model=own, optim="adamw_torch")
    assert not releases(model)
    assert torch.equal(model.up.weight, reference.up.weight)


def test_release_by_hand_is_checked_and_kept(tmp_path):
    model = Model()
    optimizer = DualAdam(model.parameters())
    handle = release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="release_gradients.* max_grad_norm=1.0"):
        _train(tmp_path, None, model=model, optimizers=(optimizer, None), max_grad_norm=1.0)
    _train(tmp_path, None, model=model, optimizers=(optimizer, None))
    assert releases(model) == {handle} and optimizer.state[model.up.weight]["step"] == 8


def test_float32_models_have_no_use_for_master_weights(tmp_path):
    with pytest.raises(ValueError, match="float32 parameters are weights of 32 bits already"):
        _train(tmp_path, MEMORY, model=Model())
