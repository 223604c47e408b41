"""The formula against the paper's, number by number."""

import math

import pytest
import torch
from reference import dualadam, dualadam_normalized

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.functional import inverse_weight, step_scalars

STEPS, SIZE = 150, 6


def _train(optimizer_cls, start, grads, dtype=torch.float64, **options):
    param = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = optimizer_cls([param], **options)
    for grad in grads:
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach().double()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    grads = torch.randn(STEPS, SIZE, generator=generator, dtype=torch.float64) * torch.logspace(-3, 1, SIZE).double()
    return start, grads


@pytest.mark.parametrize("rate", [0.0, 0.008, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("foreach", [True, False])
def test_matches_the_paper_over_the_switch(problem, rate, decay, foreach):
    start, grads = problem
    ours = _train(DualAdam, start, grads, lr=0.02, weight_decay=decay, switch_rate=rate, foreach=foreach)
    paper = [dualadam(x, g, eta=0.02, lam=decay, rate=rate) for x, g in zip(start.tolist(), grads.T.tolist())]
    torch.testing.assert_close(ours, torch.tensor(paper, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("foreach", [True, False])
def test_normalized_inverse_has_adams_rms(problem, rate, foreach):
    start, grads = problem
    ours = _train(DualAdam, start, grads, lr=0.02, switch_rate=rate, normalize_inverse=True, foreach=foreach)
    paper = dualadam_normalized(start.tolist(), grads.tolist(), eta=0.02, rate=rate)
    torch.testing.assert_close(ours, torch.tensor(paper, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_one_step_worked_by_hand():
    # g = (3, -4), first step: m^ = g, d = |g| + eps, alpha = 0.5; (1-alpha) m^/d + alpha m^ d = 0.5 sign + 0.5 g|g|
    ours = _train(DualAdam, torch.zeros(2), [torch.tensor([3.0, -4.0])], lr=1.0, switch_rate=0.5, eps=0.0)
    torch.testing.assert_close(ours, torch.tensor([-(0.5 + 4.5), 0.5 + 8.0], dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_without_inverse_part_it_is_adamw(problem, dtype, tolerance):
    start, grads = problem
    options = {"lr": 0.02, "weight_decay": 0.1, "dtype": dtype}
    ours = _train(DualAdam, start, grads, switch_rate=1.0, **options)
    adamw = _train(torch.optim.AdamW, start, grads, **options)
    torch.testing.assert_close(ours, adamw, rtol=tolerance, atol=tolerance)


def test_switch_rate_zero_is_invadam(problem):
    start, grads = problem
    dual = _train(DualAdam, start, grads, lr=0.02, switch_rate=0.0)
    assert torch.equal(dual, _train(InvAdam, start, grads, lr=0.02))


@pytest.mark.parametrize(
    ("step", "rate", "alpha"),
    [(1, 0.01, 0.99), (98, 0.01, 0.02), (100, 0.01, 0.0), (1, 0.3, 0.7), (2, 0.3, 0.4), (3, 0.3, 0.0), (9, 0.0, 1.0)],
)
def test_alpha_leaves_the_blend_one_step_early(step, rate, alpha):
    assert inverse_weight(step, rate) == pytest.approx(alpha, abs=1e-12)
    assert inverse_weight(torch.tensor(float(step), dtype=torch.float64), rate).item() == inverse_weight(step, rate)


def test_authors_rate_ends_at_step_12499():
    alphas = [inverse_weight(step, 8e-5) for step in (12_498, 12_499, 12_500)]
    assert alphas[0] > 8e-5 and alphas[2] == 0.0
    assert alphas[1] in (0.0, pytest.approx(8e-5))  # the edge itself depends on rounding


def test_scalars_stay_exact_late_in_training():
    scalars = step_scalars(10_000_000, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, switch_rate=1e-8)
    assert scalars.step_size == 1e-3 and scalars.bias2_rsqrt == 1.0 and math.isclose(scalars.alpha, 0.9)


@pytest.mark.parametrize("capturable", [True, False])
def test_overflowing_square_moves_nothing_after_the_switch(capturable):
    grad = torch.tensor([1e25, 1.0])
    options = {"lr": 0.1, "switch_rate": 1.0, "capturable": capturable, "fused": False}
    ours = _train(DualAdam, torch.zeros(2), [grad], dtype=torch.float32, **options)
    torch.testing.assert_close(ours, torch.tensor([0.0, -0.1], dtype=torch.float64))
