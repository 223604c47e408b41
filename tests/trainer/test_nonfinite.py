"""Non-finite gradients: the same result on every path, a warning in the first log, a callback that stops training."""

import functools
import math

import pytest
import torch
from paths import PATHS
from test_trainer import TinyModel, _arguments, _data, _train, _weights
from transformers import Trainer

from hf_dualadam import DualAdam
from hf_dualadam.trainer.nonfinite import StopOnNonFinite

BAD = [math.nan, math.inf, -math.inf, 1e25, -1e25]  # the square of the last two overflows float32


def _after_one_bad_gradient(path, dtype, bad, switch_rate, normalize_inverse):
    """Parameter and moments after three steps, the second of which has one bad element in its gradient."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 33, generator=generator)
    params = [torch.nn.Parameter(row.to(dtype)) for row in start]
    options = {"lr": 0.1, "switch_rate": switch_rate, "normalize_inverse": normalize_inverse, **PATHS[path]}
    optimizer = DualAdam(params, **options)
    for step in range(3):
        grads = torch.randn(2, 33, generator=generator)
        if step == 1:
            grads[0, 5] = bad
        for param, grad in zip(params, grads):
            param.grad = grad.to(dtype)
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    return [*params, *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]


@pytest.mark.parametrize("normalize_inverse", [False, True])
@pytest.mark.parametrize("switch_rate", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_path_ends_in_the_same_place(dtype, switch_rate, normalize_inverse):
    for bad in BAD:
        if dtype == torch.float64 and abs(bad) == 1e25:
            continue  # its square is finite there
        reference = _after_one_bad_gradient("single", dtype, bad, switch_rate, normalize_inverse)
        for path in PATHS:
            ours = _after_one_bad_gradient(path, dtype, bad, switch_rate, normalize_inverse)
            for a, b in zip(ours, reference):
                torch.testing.assert_close(a, b, equal_nan=True, msg=lambda text: f"{path}, {bad}: {text}")  # noqa: B023


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_the_element_with_the_bad_gradient_is_lost(path, bad):
    first, second, *moments = _after_one_bad_gradient(path, torch.float32, bad, 0.01, False)
    lost = torch.arange(33) == 5
    assert torch.equal(~first.isfinite(), lost) and second.isfinite().all()
    assert torch.equal(~moments[0].isfinite(), lost)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_normalized_tensor_with_a_bad_gradient_is_lost_whole(path, bad):
    first, second, *_ = _after_one_bad_gradient(path, torch.float32, bad, 0.01, True)
    assert not first.isfinite().any() and second.isfinite().all()


def test_products_that_underflow_leave_adams_share_on_every_path():
    results = []
    for path in PATHS.values():
        param = torch.nn.Parameter(torch.zeros(3))
        optimizer = DualAdam([param], lr=1.0, eps=0.0, switch_rate=0.25, normalize_inverse=True, **path)
        param.grad = torch.full((3,), 1e-30)
        # m = 1e-31 and d = 3e-19: float32 holds m/d, and 0 for m*d.
        moments = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.full((3,), 1e-40)}
        optimizer.state[param] = {"step": torch.zeros(()), **moments}
        optimizer.step()
        results.append(param.detach())
    for result in results:
        assert result.abs().max() > 0
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("logging_nan_inf_filter", [True, False])
def test_divergence_is_told_in_the_first_log_after_it(bf16, logging_nan_inf_filter, tmp_path, caplog):
    options = {"bf16": bf16, "logging_nan_inf_filter": logging_nan_inf_filter, "max_grad_norm": 0.0}
    trainer = _train(tmp_path, optim="invadam", learning_rate=1e30, logging_steps=2, **options)
    assert not torch.isfinite(_weights(trainer)).all()
    (warning,) = (r.getMessage() for r in caplog.records if "has diverged" in r.getMessage())
    assert "InvAdam has diverged by step 2" in warning and "Lower learning_rate or clip gradients" in warning


class _BadFrom(TinyModel):
    """Its second layer sends a NaN back from the given call on."""

    def __init__(self, call):
        super().__init__()
        self.call, self.calls = call, 0

    def forward(self, x, labels=None):
        hidden = self.layers[1](self.layers[0](x))
        self.calls += 1
        if self.calls >= self.call:
            hidden = hidden * torch.where(torch.arange(8) == 3, torch.nan, 1.0)
        logits = self.layers[2](hidden).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optim", ["dualadam", "adamw_torch"])
def test_stops_before_the_step_and_names_the_parameters_in_backward_order(max_grad_norm, optim, tmp_path):
    model = _BadFrom(call=5)
    args = _arguments(tmp_path, optim=optim, max_grad_norm=max_grad_norm, gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=_data(), callbacks=[StopOnNonFinite()])
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "not finite at step 3: first in layers.2." in message and "(4 of 4 parameters)" in message
    names = message.split("first in ")[1].split(" (")[0].split(", ")
    assert set(names[:2]) == {"layers.2.weight", "layers.2.bias"} and set(names[2:]) == {
        "layers.0.weight",
        "layers.0.bias",
    }
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_names_only_the_parameters_before_clipping_spoils_the_rest(tmp_path):
    model = TinyModel()
    model.layers[0].bias.register_hook(lambda grad: grad * torch.inf)
    args = _arguments(tmp_path, max_grad_norm=1.0)
    with pytest.raises(FloatingPointError, match=r"at step 1: first in layers.0.bias \(1 of 4 parameters\)"):
        Trainer(model, args, train_dataset=_data(), callbacks=[StopOnNonFinite()]).train()


def test_a_healthy_run_is_not_touched(tmp_path):
    model = TinyModel()
    model.layers[0].bias.requires_grad_(False)
    trainer = Trainer(model, _arguments(tmp_path), train_dataset=_data(), callbacks=[StopOnNonFinite()])
    trainer.train()
    assert trainer.state.global_step == 12
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_not_with_loss_scaling(tmp_path):
    args = _arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="StopOnNonFinite with fp16, whose loss scaling"):
        StopOnNonFinite().on_train_begin(args, None, None, model=TinyModel())


class _Holder:
    """A model that is not a module, such as setfit's."""

    def __init__(self):
        self.name, self.body = "holder", TinyModel()


class _HoldingTrainer(Trainer):
    """Passes the model's holder to its callbacks, as setfit's Trainer does."""

    def create_scheduler(self, *args, **kwargs):
        scheduler = super().create_scheduler(*args, **kwargs)
        self.callback_handler.call_event = functools.partial(_call_event, self.callback_handler)
        return scheduler


def _call_event(handler, *args, **kwargs):
    holder = _Holder()
    holder.body, handler.model = handler.model, holder
    try:
        return type(handler).call_event(handler, *args, **kwargs)
    finally:
        handler.model = holder.body


@pytest.mark.parametrize("optim", ["dualadam", "adamw_torch"])
def test_a_model_that_is_no_module_is_watched_too(optim, tmp_path):
    model = TinyModel()
    model.layers[0].bias.register_hook(lambda grad: grad * torch.inf)
    trainer = _HoldingTrainer(
        model, _arguments(tmp_path, optim=optim), train_dataset=_data(), callbacks=[StopOnNonFinite()]
    )
    with pytest.raises(FloatingPointError, match="at step 1: first in layers.0.bias"):
        trainer.train()
