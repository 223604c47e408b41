"""Checks of the CUDA kernel, run by test_kernels_triton.py: in Triton's interpreter on the CPU, and on a GPU."""

import operator
import os

import pytest
import torch
from reference import dualadam, dualadam_normalized

from hf_dualadam import DualAdam, kernels
from hf_dualadam.kernels import cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

SMALL = (0, 1, 7, 31, 32, 33, 1023, 1024, 1025, 2049)  # a program processes 1024 elements
LARGE = (2**15 - 1, 2**15, 2**15 + 1)
PERIOD = 61
RATE = 0.3  # inverse until step 2, Adam from step 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
if INTERPRETED:
    TOLERANCE[torch.bfloat16] = 0.1  # the interpreter does not round bfloat16 to nearest even


@pytest.fixture(autouse=True)
def kernel_only(monkeypatch):
    """Every tensor goes to the kernel; the test fails if one takes another path."""
    if INTERPRETED:
        monkeypatch.setattr(cuda, "is_here", operator.attrgetter("is_cpu"))
        monkeypatch.setattr(kernels, "_kernels", lambda: [cuda])
    monkeypatch.setattr(DualAdam, "_update", lambda *_: pytest.fail("a tensor was left to another path"))


def _numbers(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def _params(sizes, dtype=torch.float32):
    base = _numbers(PERIOD, 0, dtype)
    return [torch.nn.Parameter(base[torch.arange(n) % PERIOD].to(DEVICE)) for n in sizes]


def _train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        for p in params:
            base = _numbers(PERIOD, 100 + t, p.dtype)
            p.grad = torch.empty_like(p).copy_(base[torch.arange(p.numel()) % PERIOD].reshape(p.shape))
        optimizer.step()


def _grads(steps, dtype, sign=1):
    return [[sign * g for g in _numbers(PERIOD, 100 + t, dtype).tolist()] for t in range(steps)]


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1, "maximize": True}, {"weight_decay": 0.1, "capturable": True}],
    ids=["plain", "decay, maximize", "decay, capturable"],
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_size_follows_the_paper_over_the_switch(dtype, options):
    params = _params(SMALL + LARGE if dtype == torch.float32 and not options else SMALL, dtype)
    theta = params[-1][:PERIOD].tolist()
    optimizer = DualAdam(params, lr=0.02, switch_rate=RATE, **options)
    _train(optimizer, params, steps=3)
    grads = _grads(3, dtype, sign=-1 if "maximize" in options else 1)
    decay = options.get("weight_decay", 0.0)
    paper = [dualadam(x, [g[i] for g in grads], eta=0.02, lam=decay, rate=RATE) for i, x in enumerate(theta)]
    for p in params:
        expected = torch.tensor(paper, dtype=torch.float64)[torch.arange(p.numel()) % PERIOD]
        torch.testing.assert_close(p.detach().double().cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("capturable", [False, True])
def test_normalized_update_follows_the_reference(capturable):
    params = _params((1, 33, 5000), torch.float64)
    start = [p.tolist() for p in params]
    optimizer = DualAdam(
        params, lr=0.02, weight_decay=0.1, switch_rate=RATE, normalize_inverse=True, capturable=capturable
    )
    _train(optimizer, params, steps=3)
    for p, theta in zip(params, start):
        grads = [[g[i % PERIOD] for i in range(p.numel())] for g in _grads(3, torch.float64)]
        expected = dualadam_normalized(theta, grads, eta=0.02, lam=0.1, rate=RATE)
        torch.testing.assert_close(p.tolist(), expected, rtol=1e-12, atol=1e-12)


def test_unaligned_and_permuted_tensors():
    storage = _numbers(400, 7, torch.float32).to(DEVICE)
    params = [torch.nn.Parameter(view) for view in (storage[1:100], storage[200:].reshape(20, 10).t())]
    start = [p.tolist() for p in params]
    _train(DualAdam(params, lr=0.02, switch_rate=RATE), params, steps=3)
    grads = _grads(3, torch.float32)
    for p, rows in zip(params, start):
        theta = rows if p.dim() == 1 else [x for row in rows for x in row]
        expected = [dualadam(x, [g[i % PERIOD] for g in grads], eta=0.02, rate=RATE) for i, x in enumerate(theta)]
        torch.testing.assert_close(p.flatten().tolist(), expected, rtol=2e-6, atol=2e-6)


def _count_launches(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("update_kernel", "norms_kernel", "norm_sums_kernel", "step_scalars_kernel"):
        monkeypatch.setattr(cuda.load(), name, Counted(name, getattr(cuda.load(), name)))
    return launches


def test_groups_dtypes_and_late_parameters_take_one_launch_per_dtype(monkeypatch):
    launches = _count_launches(monkeypatch)
    params = [*_params((5,) * 40), *_params((5,) * 3, torch.float64)]
    late = _params((5,), torch.float64)[0]
    groups = [
        {"params": params[:20], "lr": 0.1},
        {"params": params[20:], "lr": torch.tensor(0.05), "betas": (0.4, 0.9)},
    ]
    optimizer = DualAdam(groups, lr=0.02, weight_decay=0.1, switch_rate=RATE)
    _train(optimizer, params, steps=2)
    optimizer.add_param_group({"params": [late]})
    _train(optimizer, [*params, late], steps=2, start=2)
    assert launches == ["update_kernel"] * 8
    grads = _grads(4, torch.float64)
    for p, eta, beta1, beta2, first in ((params[-1], 0.05, 0.4, 0.9, 0), (late, 0.02, 0.9, 0.999, 2)):
        own = [[g[i] for g in grads[first:]] for i in range(5)]
        options = {"eta": eta, "beta1": beta1, "beta2": beta2, "lam": 0.1, "rate": RATE}
        expected = [dualadam(x, g, **options) for x, g in zip(_numbers(PERIOD, 0).tolist(), own)]
        tolerance = 1e-7 if p is params[-1] else 1e-12  # that lr is a float32 tensor
        torch.testing.assert_close(p.tolist(), expected, rtol=tolerance, atol=tolerance)


def test_tables_are_sent_once_while_addresses_stay(monkeypatch):
    sent = []
    send = cuda._on_device
    monkeypatch.setattr(cuda, "_on_device", lambda numbers, *args: sent.append(len(numbers)) or send(numbers, *args))
    params = _params((5, 6))
    optimizer = DualAdam(params, capturable=True)
    _train(optimizer, params, steps=1)
    assert sent
    sent.clear()
    optimizer.step()
    assert not sent


def test_shared_memory_is_left_to_the_loop_over_tensors(monkeypatch):
    monkeypatch.undo()
    storage = torch.ones(100, device=DEVICE)
    params = [torch.nn.Parameter(storage[:60]), torch.nn.Parameter(storage[40:])]
    for p in params:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(cuda, "is_here", operator.attrgetter(f"is_{DEVICE}"))
    monkeypatch.setattr(kernels, "_kernels", lambda: [cuda])
    left = []
    monkeypatch.setattr(DualAdam, "_update", lambda self, group, items: left.append([item[0] for item in items]))
    DualAdam(params).step()
    assert [[id(p) for p in part] for part in left] == [[id(p)] for p in params]
