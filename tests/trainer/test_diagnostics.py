"""The figures of the last step are those of its formula, for every kind of state, and reading them changes nothing."""

import pytest
import torch

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.diagnostics import InverseStatistics, inverse_statistics
from hf_dualadam.kernels import cpu, part_norms


def _expected(optimizer):
    """The figures by definition, in float64, from all parameters at once."""
    parts = {name: [] for name in ("adam", "inverse", "weighted", "whole", "moved", "size")}
    alphas = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if "step" not in optimizer.state.get(param, {}):
                continue
            step = optimizer.state[param]["step"].double()
            m, v = (moment.double().flatten() for moment in optimizer.moments(param))
            m_hat = m / (1 - group["betas"][0] ** step)
            d = (v / (1 - group["betas"][1] ** step)).sqrt() + group["eps"]
            alpha = 1 - step * group["switch_rate"]
            alpha = 0.0 if alpha < group["switch_rate"] else alpha
            adam, inverse = m_hat / d, m_hat * d
            scaled = inverse * adam.norm() / inverse.norm() if group["normalize_inverse"] else inverse
            weighted = alpha * group["inverse_scale"] * scaled
            whole = (1 - alpha) * adam + weighted
            values = (adam, inverse, weighted, whole, group["lr"] * whole, param.detach().double().flatten())
            for name, value in zip(parts, values):
                parts[name].append(value)
            alphas.append((step.item(), float(alpha)))
    norms = {name: torch.cat(values).norm().item() for name, values in parts.items()}
    return InverseStatistics(
        max(alphas)[1],
        norms["weighted"] / norms["whole"],
        norms["inverse"] / norms["adam"],
        norms["moved"] / norms["size"],
    )


def _run(cls=DualAdam, dtype=torch.float32, size=1.0, steps=3, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 300), (7,), (2, 4, 5, 3), (0, 3)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    rate = min(1.0, size**-2)  # InvAdam's steps grow with the square
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1, "lr": 0.1 * rate}]
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([*groups, {"params": [unused]}], lr=0.01 * rate, eps=1e-8 * size, **options)
    for step in range(steps):
        for index, param in enumerate(params):
            param.grad = (size * torch.randn(param.shape, generator=generator)).to(dtype) if index or step else None
        optimizer.step()
    return optimizer


@pytest.fixture(params=["kernel", "blocks"], autouse=True)
def way(request, monkeypatch):
    """With the kernel, where it is built, and without."""
    if request.param == "blocks":
        monkeypatch.setattr(part_norms, "is_supported", lambda *tensors: False)
    elif cpu.load() is None:
        pytest.skip("the CPU kernel is not built")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_figures_are_the_formulas(dtype, normalize):
    for cls in (DualAdam, InvAdam):
        rate = {"switch_rate": 0.125} if cls is DualAdam else {}
        optimizer = _run(cls, dtype, normalize_inverse=normalize, inverse_scale=3.0, **rate)
        before = torch.cat([moment.flatten() for p in optimizer.state for moment in optimizer.moments(p)])
        assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)
        after = torch.cat([moment.flatten() for p in optimizer.state for moment in optimizer.moments(p)])
        assert torch.equal(before, after)


@pytest.mark.parametrize("size", [1e-17, 1e-14, 1e-9, 1e-4, 1e2, 1e7, 1e12])
def test_gradients_of_any_size(size):
    optimizer = _run(size=size)
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"switch_rate": 1.0}, {"inverse_scale": 0.0}])
def test_kinds_of_state_and_parts_that_are_off(options):
    optimizer = _run(**options)
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)


def test_gradients_of_zero_and_no_step_at_all():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = DualAdam([param])
    assert inverse_statistics(optimizer) is None
    param.grad = torch.zeros(3)
    optimizer.step()
    assert inverse_statistics(optimizer) == (0.99, 0.0, 0.0, 0.0)


def test_what_is_not_finite_is_shown():
    optimizer = _run()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(float("nan"))
    statistics = inverse_statistics(optimizer)
    assert statistics.relative_step != statistics.relative_step


def test_one_thread_and_two_give_the_same_figures():
    optimizer, threads = _run(), torch.get_num_threads()
    figures = []
    for count in (1, 2):
        torch.set_num_threads(count)
        figures.append(inverse_statistics(optimizer))
    torch.set_num_threads(threads)
    assert tuple(figures[0]) == pytest.approx(tuple(figures[1]), rel=1e-6)
