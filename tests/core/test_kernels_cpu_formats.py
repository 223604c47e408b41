"""The CPU kernel's formats (8-bit moments, 16-bit weights with corrections) against hf_dualadam.states."""

import copy
import inspect

import pytest
import torch

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.kernels import cpu
from hf_dualadam.kernels.layout import operands

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="the CPU kernel is not built: no C compiler")

SHAPES = [(64, 65), (33, 127), (5, 1000), (32, 128), (40, 129), (14, 300), (3, 70, 25), (5000,), (4,), (300, 128)]
STEPS = 4
LOOP = {"foreach": False, "fused": False}
FORMATS = [
    pytest.param(dtype, bits, weight_bits, id=f"{dtype}-{bits}-{weight_bits}".removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for bits in (32, 8)
    for weight_bits in ((None,) if dtype == torch.float32 else (None, 24, 32))
]


def _params(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _gradients(params, step, scale=1.0):
    """Numbers whose magnitude depends on row and element, a tenth of them zero."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        rows = torch.logspace(-3, 0, p.shape[0]).reshape(-1, *[1] * (p.dim() - 1))
        grad = torch.randn(p.shape, generator=generator) * rows * scale
        p.grad = torch.where(torch.rand(p.shape, generator=generator) < 0.1, 0.0, grad).to(p.dtype)


def _copy(optimizer, params, **paths):
    """The same optimizer and parameters, on another path."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    arguments = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in arguments and k not in paths}
    twin = type(optimizer)(twins, **options, **paths)
    for p, other in zip(params, twins):
        other.grad = p.grad.clone()
        if p in optimizer.state:
            twin.state[other] = copy.deepcopy(optimizer.state[p])
    return twin, twins


def _assert_one_code_apart(optimizer, params, twin, twins, tolerance):
    for p, other in zip(params, twins):
        state, expected = optimizer.state[p], twin.state[other]
        assert state.keys() == expected.keys()
        assert state["step"] == expected["step"]
        for name, value in state.items():
            if name == "weight_correction":
                continue  # it wraps if the parameter is rounded the other way; the weight is compared below
            if not value.is_floating_point():
                assert (value.int() - expected[name].int()).abs().max() <= 1, name
            else:
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-7, equal_nan=True, msg=name)
        weight, target = optimizer.master_weights(p), twin.master_weights(other)
        unit = 2.0 ** -(23 if p.dtype == torch.float32 else 7)
        if "weight_correction" in state:
            unit *= 2.0 ** -(8 if state["weight_correction"].dtype == torch.int8 else 16)
        torch.testing.assert_close(weight, target, rtol=4 * unit, atol=1e-6, equal_nan=True)


def _step_beside_the_loop(optimizer, params, tolerance=1e-5):
    """Take one step with the kernel alone, and compare it with the loop's from the same state."""
    twin, twins = _copy(optimizer, params, **LOOP)
    twin.step()
    optimizer._update = lambda *_: pytest.fail("the kernel left a tensor to another path")
    optimizer.step()
    _assert_one_code_apart(optimizer, params, twin, twins, tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"normalize_inverse": True}, {"maximize": True, "inverse_scale": 3.0}], ids=str
)
@pytest.mark.parametrize("dtype, state_bits, weight_bits", FORMATS)
def test_every_step_is_one_code_from_the_readable_statement(dtype, state_bits, weight_bits, options):
    params = _params(dtype)
    formats = {"state_bits": state_bits, "master_weight_bits": weight_bits}
    optimizer = DualAdam(params, lr=0.01, weight_decay=0.1, switch_rate=0.3, **formats, **options)
    for step in range(STEPS):
        _gradients(params, step)
        _step_beside_the_loop(optimizer, params, 1e-2 if dtype == torch.bfloat16 else 1e-5)


ODD_GRADIENTS = {
    "NaN": lambda grad: grad[0, 3].fill_(float("nan")),
    "infinite": lambda grad: grad[1, :2].fill_(-float("inf")),
    "overflows v": lambda grad: grad[2, 5].fill_(1e25),
    "a block of zeros": lambda grad: grad[:, :128].zero_(),
    "all zero": torch.Tensor.zero_,
    "one in a block": lambda grad: grad[:, 1:].zero_(),
    "subnormal v": lambda grad: grad.mul_(1e-20),
    "subnormal m": lambda grad: grad.mul_(1e-38),
    "over 40 octaves": lambda grad: grad.mul_(torch.logspace(-12, 2, grad.shape[1])),
}


@pytest.mark.parametrize("name", ODD_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_gradients_are_coded_as_by_the_readable_statement(dtype, name):
    params = _params(dtype, [(40, 300)])
    weight_bits = None if dtype == torch.float32 else 24
    optimizer = InvAdam(params, lr=0.01, state_bits=8, master_weight_bits=weight_bits)
    for step in range(3):
        _gradients(params, step)
        grad = params[0].grad.float()
        ODD_GRADIENTS[name](grad)
        params[0].grad = grad.to(dtype)
        _step_beside_the_loop(optimizer, params)


def test_states_that_do_not_fit_are_left_to_another_path():
    (param,) = _params(torch.float32, [(64, 128)])
    for name, broken in {
        "exp_avg_scale": torch.zeros(64, 2),
        "exp_avg_sq_min": torch.zeros(64, 1, dtype=torch.float64),
        "exp_avg": torch.zeros(128, 64, dtype=torch.int8).t(),
    }.items():
        optimizer = DualAdam([param], state_bits=8)
        _gradients([param], 0)
        optimizer.step()
        optimizer.state[param][name] = broken
        item = param, param.grad, optimizer.state[param]
        assert cpu.prepare(item, operands(*item), optimizer.param_groups[0]) is None


def test_a_transposed_parameter_is_coded_by_its_own_rows():
    (param,) = _params(torch.float32, [(128, 64)])
    param = torch.nn.Parameter(param.detach().t())
    optimizer = DualAdam([param], state_bits=8)
    twin = DualAdam([torch.nn.Parameter(param.detach().contiguous())], state_bits=8)
    for step in range(2):
        _gradients([param], step)
        twin.param_groups[0]["params"][0].grad = param.grad.clone()
        optimizer.step()
        twin.step()
    for moment, expected in zip(optimizer.moments(param), twin.moments(twin.param_groups[0]["params"][0])):
        torch.testing.assert_close(moment, expected, rtol=0.2, atol=1e-5)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_codes_do_not_depend_on_the_number_of_threads(state_bits):
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            params = _params(torch.bfloat16, [(300, 300), (1000,), (400, 70)])
            formats = {"state_bits": state_bits, "master_weight_bits": 24}
            optimizer = DualAdam(params, normalize_inverse=True, switch_rate=0.1, **formats)
            for step in range(3):
                _gradients(params, step)
                optimizer.step()
            results.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
