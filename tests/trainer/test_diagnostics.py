"""The statistics of the last step match the formula, for every kind of state, and reading them changes nothing."""

import pytest
import torch

from hf_dualadam import DualAdam, InvAdam, diagnostics
from hf_dualadam.diagnostics import InverseStatistics, inverse_statistics
from hf_dualadam.kernels import cpu


def _expected(optimizer):
    """The statistics by definition, in float64, from all parameters at once."""
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
    """With the kernel, if it is built, and without it."""
    if request.param == "blocks":
        monkeypatch.setattr(cpu, "is_here", lambda param: False)
    elif cpu.load() is None:
        pytest.skip("the CPU kernel is not built")
    return request.param


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


@pytest.mark.parametrize("options", [{"switch_rate": 1.0}, {"inverse_scale": 0.0}])
def test_parts_that_are_off(options):
    optimizer = _run(**options)
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)


KINDS_OF_STATE = [
    {"state_bits": 8},
    {"state_bits": 8, "dtype": torch.bfloat16},
    {"state_bits": 8, "dtype": torch.float16},
    {"master_weight_bits": 24, "dtype": torch.bfloat16},
    {"master_weight_bits": 32, "dtype": torch.float16},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", KINDS_OF_STATE, ids=lambda options: "-".join(map(str, options.values())))
def test_kinds_of_state(options, way, monkeypatch):
    if way == "kernel":  # it reads them all
        monkeypatch.setattr(diagnostics, "_squares_in_blocks", lambda *_: pytest.fail("the kernel left something out"))
    optimizer = _run(**options)
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)


def _share_memory(optimizer, params):
    params[1].data = params[0].data[0, :7]


def _transpose_moments(optimizer, params):
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[params[0]][name] = optimizer.state[params[0]][name].t().contiguous().t()


def _widen_moment(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].double()


def _replace_moment(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = torch.full((300, 300), 0.5)


def _change_step(optimizer, params):
    optimizer.state[params[0]]["step"] = torch.tensor(7)


def _change_options(optimizer, params):
    optimizer.param_groups[1].update(lr=torch.tensor(0.5), betas=(0.5, 0.6), inverse_scale=7.0)


def _choose_foreach(optimizer, params):
    optimizer.param_groups[0]["foreach"] = True


CHANGES = [
    _share_memory,
    _transpose_moments,
    _widen_moment,
    _replace_moment,
    _change_step,
    _change_options,
    _choose_foreach,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_the_last_figures_is_measured_as_it_is(change):
    optimizer = _run()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    inverse_statistics(optimizer)
    change(optimizer, params)
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)


def test_a_parameter_that_is_first_updated_later_is_measured_from_then_on():
    optimizer = _run()
    inverse_statistics(optimizer)
    unused = optimizer.param_groups[2]["params"][0]
    unused.grad = torch.full_like(unused, 1e3)
    optimizer.step()
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(_expected(optimizer)), rel=1e-5)


def test_gradients_of_zero_and_no_step_at_all():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = DualAdam([param])
    assert inverse_statistics(optimizer) is None
    param.grad = torch.zeros(3)
    optimizer.step()
    assert inverse_statistics(optimizer) == (0.99, 0.0, 0.0, 0.0)


def test_large_weights_and_whole_step_counts_are_measured():
    optimizer = _run()
    param = optimizer.param_groups[0]["params"][0]
    with torch.no_grad():
        param.fill_(1e20)
    assert 0 < inverse_statistics(optimizer).relative_step < 1e-15
    before = inverse_statistics(optimizer)
    optimizer.state[param]["step"] = int(optimizer.state[param]["step"])  # as in the state of another library
    assert tuple(inverse_statistics(optimizer)) == pytest.approx(tuple(before), rel=1e-5)


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


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["kernel", "blocks"])
def test_a_state_without_a_step_has_no_update(options):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = DualAdam([param], **options)
    moments = {name: torch.zeros(3) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
    assert inverse_statistics(optimizer)[1:] == (0, 0, 0)
