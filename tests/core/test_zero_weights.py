"""A part of the update whose weight is 0 is not computed, so an overflow in it has no effect, on any path."""

import pytest
import torch
from paths import PATHS

from hf_dualadam import DualAdam, InvAdam

every_path = pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
DTYPES = [torch.float32, torch.bfloat16]


def _step(optimizer_cls, grads, dtype=torch.float32, start=1.0, **options):
    param = torch.nn.Parameter(torch.full((len(grads),), start, dtype=dtype))
    param.grad = torch.tensor(grads, dtype=dtype)
    optimizer_cls([param], **options).step()
    return param.detach()


@every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("grad", [1e20, 1e38, 0.0])
def test_a_learning_rate_of_zero_moves_nothing(dtype, normalize, grad, options):
    param = _step(DualAdam, [grad, 1.0], dtype, lr=0.0, switch_rate=0.1, normalize_inverse=normalize, **options)
    assert torch.equal(param, torch.ones(2, dtype=dtype))


@every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invadam_does_not_divide(dtype, options):
    param = _step(InvAdam, [0.0, 2.0], dtype, lr=0.25, eps=0.0, **options)  # g = 0 would be 0/0 in Adam's part
    torch.testing.assert_close(param, torch.tensor([1.0, 0.0], dtype=dtype))


@every_path
def test_an_inverse_scale_of_zero_leaves_adams_part(options):
    param = _step(DualAdam, [1e25, 2.0], lr=0.5, switch_rate=0.25, inverse_scale=0.0, **options)
    torch.testing.assert_close(param[1], torch.tensor(1 - 0.5 * 0.25))  # sign(g), weighted 1 - alpha


@every_path
def test_inverse_scale_multiplies_the_inverse_part(options):
    ones, halves = (
        _step(InvAdam, [2.0, -3.0], lr=lr, inverse_scale=scale, **options) for lr, scale in ((0.5, 1.0), (1.0, 0.5))
    )
    torch.testing.assert_close(ones, halves)
    both = _step(DualAdam, [2.0, -3.0], lr=0.1, switch_rate=0.25, inverse_scale=10.0, eps=0.0, **options)
    expected = [1 - 0.1 * (0.25 * 1 + 0.75 * 10 * 4), 1 + 0.1 * (0.25 * 1 + 0.75 * 10 * 9)]
    torch.testing.assert_close(both, torch.tensor(expected))


@every_path
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_an_inverse_scale_of_zero_is_adamw_with_a_warm_up(rate, options):
    param, control = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = DualAdam([param], 0.1, weight_decay=0.0, switch_rate=rate, inverse_scale=0.0, **options)
    adamw = torch.optim.AdamW([control], lr=0.1, weight_decay=0.0)
    for t in range(1, 25):
        alpha = 1 - t * rate
        adamw.param_groups[0]["lr"] = 0.1 * (1 if alpha < rate else 1 - alpha)
        for p in (param, control):
            p.grad = torch.randn(3, generator=torch.Generator().manual_seed(t))
        ours.step()
        adamw.step()
    torch.testing.assert_close(param, control, rtol=1e-5, atol=1e-6)
