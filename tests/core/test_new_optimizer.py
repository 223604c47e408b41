"""A third optimizer needs only its formula and one entry to get states, paths, state dicts and checks."""

import copy
import re

import pytest
import torch

from hf_dualadam import DualAdam
from hf_dualadam.base import MomentOptimizer
from hf_dualadam.functional import DUAL_UPDATE, UpdateRule


def sign_update_(param, grad, s):
    """theta <- theta * (1 - eta*lambda) - eta * sign(g), without moments."""
    param.mul_(s.decay).sub_(s.lr * s.sign * grad.sign())


def lion_update_(param, grad, exp_avg, s):
    """Lion (arXiv 2302.06675)."""
    grad = s.sign * grad
    param.mul_(s.decay).sub_(s.lr * exp_avg.lerp(grad, 1 - s.beta1).sign())
    exp_avg.lerp_(grad, 1 - s.beta2)


def foreach_lion_update_(params, grads, exp_avgs, s):
    """The same for lists."""
    for tensors in zip(params, grads, exp_avgs):
        lion_update_(*tensors, s)


class SignDescent(MomentOptimizer):
    rule = UpdateRule(sign_update_)
    moments_of_state = ()


class Lion(MomentOptimizer):
    rule = UpdateRule(lion_update_, foreach_lion_update_)
    moments_of_state = ("exp_avg",)


PATHS = [{}, {"foreach": True}, {"foreach": False}, {"fused": False}]


def _train(optimizer_cls, steps=5, shape=(70, 70), dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = optimizer_cls([param], lr=0.125, weight_decay=0.5, **options)
    for _ in range(steps):
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_a_formula_without_moments(path, maximize):
    param, optimizer = _train(SignDescent, maximize=maximize, **path)
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(70, 70, generator=generator)
    for _ in range(5):
        sign = torch.randn(70, 70, generator=generator).sign()
        expected = expected * (1 - 0.125 * 0.5) - (-1 if maximize else 1) * 0.125 * sign
    torch.testing.assert_close(param.detach(), expected)
    assert list(optimizer.state[param]) == ["step"] and optimizer.moments(param) == ()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_formula_with_one_moment(path):
    reference, _ = _train(Lion, foreach=False)
    param, optimizer = _train(Lion, **path)
    assert torch.equal(param, reference) and list(optimizer.state[param]) == ["step", "exp_avg"]


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"dtype": torch.bfloat16, "master_weight_bits": 24}], ids=str)
def test_storage_formats_are_there_for_every_optimizer(options):
    param, optimizer = _train(Lion, **options)
    assert {"state_bits": "exp_avg_scale", "dtype": "weight_correction"}[next(iter(options))] in optimizer.state[param]
    assert param.isfinite().all()


def test_no_kernel_computes_another_formula():
    with pytest.raises(ValueError, match="Invalid fused: True .* Lion has no kernel"):
        Lion([torch.nn.Parameter(torch.ones(3))], fused=True)


def test_a_subclass_with_another_formula_does_not_get_its_parents_kernel():
    class Doubled(DualAdam):
        rule = UpdateRule(lambda *args: (DUAL_UPDATE.single(*args), args[0].mul_(2)))

    doubled, _ = _train(Doubled, steps=1)
    plain, _ = _train(DualAdam, steps=1)
    torch.testing.assert_close(doubled, 2 * plain)


def test_state_dicts_and_checks_come_with_the_base():
    param, optimizer = _train(Lion)
    resumed = Lion([param])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.state[param]["exp_avg"], optimizer.state[param]["exp_avg"])
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        Lion([param], lr=-1)
    with pytest.raises(TypeError, match="switch_rate"):
        Lion([param], switch_rate=0.1)
    with pytest.raises(ValueError, match=re.escape("lacks exp_avg - should come from Lion")):
        resumed.load_state_dict(_train(SignDescent)[1].state_dict())
