"""Checks of 8-bit moments, corrected weights and training logs in the CUDA kernel, run by test_kernels_triton.py."""

import pytest
import torch
from triton_checks import DEVICE, kernel_only  # noqa: F401 (every tensor goes to the kernel)

from hf_dualadam import DualAdam, diagnostics, kernels

SHAPES = [(33, 128), (67, 130), (64, 64)]


def _problem(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype).to(DEVICE)) for s in shapes]


def _train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for index, p in enumerate(params):
            noise = torch.Generator().manual_seed(100 * step + index)
            grad = torch.randn(p.shape, generator=noise) * torch.logspace(-3, 1, p.shape[-1])
            p.grad = torch.empty_like(p).copy_(grad.to(p.dtype))
        optimizer.step()


@pytest.mark.parametrize(
    "dtype, bits, options",
    [
        (torch.float32, None, {}),
        (torch.float32, None, {"normalize_inverse": True}),
        (torch.bfloat16, 24, {"capturable": True}),
        (torch.bfloat16, 32, {}),
        (torch.float16, 24, {"normalize_inverse": True}),
        (torch.float16, 32, {}),
    ],
    ids=str,
)
def test_coded_tensors_follow_the_readable_statement_up_to_a_code(dtype, bits, options, monkeypatch):
    common = {"lr": 0.01, "switch_rate": 0.3, "weight_decay": 0.1, "state_bits": 8, "master_weight_bits": bits}
    params = _problem(dtype)
    ours = DualAdam(params, **common, **options)
    _train(ours, params, 1)
    first = [{k: v.clone() for k, v in ours.state[p].items()} for p in params]
    _train(ours, params, 2, start=1)
    monkeypatch.undo()
    others = _problem(dtype)
    readable = DualAdam(others, foreach=False, fused=False, **common, **options)
    _train(readable, others, 1)
    for found, q in zip(first, others):
        expected = readable.state[q]
        assert found.keys() == expected.keys()
        for key in ("exp_avg", "exp_avg_sq"):
            assert (found[key].int() - expected[key].int()).abs().max() <= 1, key
        for key in ("exp_avg_scale", "exp_avg_sq_min", "exp_avg_sq_max"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=0)
    _train(readable, others, 2, start=1)
    start = _problem(dtype)
    for p, q, s in zip(params, others, start):
        moved = readable.master_weights(q) - s.float()
        assert (ours.master_weights(p) - readable.master_weights(q)).norm() <= 5e-3 * moved.norm()
        assert ours.state[p]["step"] == 3


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"normalize_inverse": True}], ids=str)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_corrected_weights_with_exact_moments_follow_the_readable_statement(dtype, bits, options, monkeypatch):
    """So train the small tensors of a model with 8-bit moments, too."""
    shapes = [(2049,), (7,), (33, 128), (4, 6, 3, 3)]
    common = {"lr": 0.01, "switch_rate": 0.3, "weight_decay": 0.1, "master_weight_bits": bits}
    params, others, start = (_problem(dtype, shapes) for _ in range(3))
    for p in (params[-1], others[-1]):
        p.data = p.data.to(memory_format=torch.channels_last)
    ours = DualAdam(params, **common, **options)
    _train(ours, params, 3)
    monkeypatch.undo()
    readable = DualAdam(others, foreach=False, fused=False, **common, **options)
    _train(readable, others, 3)
    for p, q, s in zip(params, others, start):
        assert ours.state[p]["weight_correction"].any()
        moved = readable.master_weights(q) - s.float()
        assert (ours.master_weights(p) - readable.master_weights(q)).norm() <= 1e-3 * moved.norm()
        torch.testing.assert_close(ours.state[p]["exp_avg_sq"], readable.state[q]["exp_avg_sq"])


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"normalize_inverse": True}),
        (torch.float64, {}),
        (torch.float32, {"state_bits": 8}),
        (torch.bfloat16, {"state_bits": 8, "master_weight_bits": 24}),
    ],
    ids=str,
)
def test_a_training_log_is_measured_by_the_kernel(dtype, options, monkeypatch):
    params = _problem(dtype, [*SHAPES, (2049,), (7,)])
    optimizer = DualAdam(params, lr=0.01, switch_rate=0.1, weight_decay=0.1, **options)
    _train(optimizer, params, 3)
    for p in params:
        p.grad = None
    with monkeypatch.context() as patch:
        patch.setattr(diagnostics, "_squares_in_blocks", lambda *_: pytest.fail("a tensor was left to another path"))
        found = diagnostics.inverse_statistics(optimizer)
    monkeypatch.setattr(kernels, "_kernels", lambda: [])
    diagnostics._plans.clear()
    torch.testing.assert_close(tuple(found), tuple(diagnostics.inverse_statistics(optimizer)), rtol=1e-4, atol=0)


def test_values_that_are_not_finite_stay_so():
    params = _problem(torch.float32, [(33, 128), (64, 64)])
    optimizer = DualAdam(params, state_bits=8)
    _train(optimizer, params, 1)
    for value in (float("nan"), float("inf")):
        params[0].grad[3, 5] = value
        optimizer.step()
    _train(optimizer, params, 2, start=2)
    assert not params[0][3, 5].isfinite() and params[0][4:].isfinite().all()
    assert all(p.isfinite().all() for p in params[1:])
