"""State, groups, arguments: DualAdam as a torch.optim optimizer."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_dualadam import DualAdam, InvAdam

PATHS = {"single": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "default": {}}


def _model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def _steps(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()


def _through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("options", [{"switch_rate": 0.1}, {"switch_rate": 0.1, "normalize_inverse": True}])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("route", ["file", "deepcopy", "pickle", "distributed_checkpoint"])
def test_resumes_bit_for_bit_within_the_inverse_phase(options, path, dtype, route):
    straight = _model(dtype=dtype)
    optimizer = DualAdam(straight.parameters(), lr=0.01, weight_decay=0.1, **options, **PATHS[path])
    _steps(straight, optimizer, 0, 4)
    model = copy.deepcopy(straight)
    resumed = DualAdam(model.parameters(), lr=0.01, weight_decay=0.1, **options, **PATHS[path])
    if route == "file":
        resumed.load_state_dict(_through_file(optimizer.state_dict()))
    elif route == "deepcopy":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif route == "pickle":
        resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer)).state_dict())
    else:
        state = copy.deepcopy(get_optimizer_state_dict(straight, optimizer))  # torch shares the tensors that it loads
        set_optimizer_state_dict(model, resumed, state)
    _steps(straight, optimizer, 4, 20)
    _steps(model, resumed, 4, 20)
    assert _equal(straight, model)


def test_deepcopy_of_the_optimizer_goes_on_alone():
    model = _model()
    optimizer = DualAdam(model.parameters(), lr=0.01, switch_rate=0.1)
    _steps(model, optimizer, 0, 3)
    both = copy.deepcopy((model, optimizer))
    _steps(model, optimizer, 3, 9)
    _steps(*both, 3, 9)
    assert _equal(model, both[0])


@pytest.mark.parametrize("source", PATHS)
@pytest.mark.parametrize("target", PATHS)
def test_state_moves_between_paths(source, target):
    model = _model()
    optimizer = DualAdam(model.parameters(), lr=0.01, switch_rate=0.1, **PATHS[source])
    _steps(model, optimizer, 0, 4)
    other = copy.deepcopy(model)
    resumed = DualAdam(other.parameters(), lr=0.01, switch_rate=0.1, **PATHS[target])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _steps(model, optimizer, 4, 15)
    _steps(other, resumed, 4, 15)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)
    assert resumed.param_groups[0]["foreach"] is PATHS[target].get("foreach")


def test_loading_keeps_the_dtypes_of_the_moments():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = DualAdam([param])
    param.grad = torch.full_like(param, 1e-4)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].dtype == torch.float32  # 1e-8 * 0.001 would be 0 in float16
    optimizer.load_state_dict(_through_file(optimizer.state_dict()))
    assert optimizer.state[param]["exp_avg"].dtype == optimizer.state[param]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[param]["step"].shape == ()


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.Adam])
def test_state_of_adamw_is_noticed_and_taken_over(optimizer_cls):
    model = _model()
    adamw = optimizer_cls(model.parameters(), lr=0.03)
    _steps(model, adamw, 0, 5)
    ours = DualAdam(model.parameters(), lr=0.01, switch_rate=0.125)
    with pytest.warns(UserWarning, match="saved by another optimizer"):
        ours.load_state_dict(_through_file(adamw.state_dict()))
    group = ours.param_groups[0]
    assert group["switch_rate"] == 0.125 and group["optimizer"] == "DualAdam" and group["lr"] == 0.03
    assert ours.state[next(model.parameters())]["step"].item() == 5
    _steps(model, ours, 5, 8)


def test_adamw_takes_our_state():
    model = _model()
    ours = DualAdam(model.parameters(), lr=0.01, switch_rate=0.5)
    _steps(model, ours, 0, 5)
    other = copy.deepcopy(model)
    adamw = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    adamw.load_state_dict(_through_file(ours.state_dict()))
    _steps(model, ours, 5, 9)
    _steps(other, adamw, 5, 9)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)


def test_state_without_moments_is_refused_and_nothing_changes():
    model = _model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _steps(model, sgd, 0, 2)
    ours = DualAdam(model.parameters(), lr=0.01)
    _steps(model, ours, 0, 2)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="lacks step, exp_avg"):
        ours.load_state_dict(sgd.state_dict())
    assert str(before) == str(ours.state_dict())


def test_replaced_options_are_reported_once():
    model = _model()
    saved = DualAdam(model.parameters(), switch_rate=0.1, betas=(0.8, 0.99)).state_dict()
    ours = DualAdam(model.parameters(), switch_rate=0.2, normalize_inverse=True)
    with pytest.warns(UserWarning) as caught:
        ours.load_state_dict(saved)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert (
        "switch_rate: 0.1 instead of 0.2" in message and "normalize_inverse: False" in message and "betas" in message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(ours.state_dict())


def test_options_missing_from_an_older_state_get_their_defaults():
    model = _model()
    ours = DualAdam(model.parameters(), switch_rate=0.2)
    saved = ours.state_dict()
    for name in ("normalize_inverse", "maximize", "capturable"):
        del saved["param_groups"][0][name]
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["normalize_inverse"] is False and ours.param_groups[0]["switch_rate"] == 0.2


def test_groups_have_their_own_options_and_count():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = DualAdam([{"params": [a], "lr": 0.0}, {"params": [b], "switch_rate": 1.0}], lr=0.1)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(a, torch.ones(3)) and torch.allclose(b, torch.full((3,), 0.9))


def test_parameter_unfrozen_later_starts_its_own_count():
    early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = DualAdam([early, late], lr=0.1, switch_rate=0.5)
    for step in range(4):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if step == 3 else None
        optimizer.step()
    assert optimizer.state[early]["step"] == 4 and optimizer.state[late]["step"] == 1
    assert torch.allclose(late, torch.full((3,), 0.9))  # alpha = 0.5 of equal parts: m/d = m*d = 1


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_left_as_they_were(path):
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = DualAdam([param], maximize=True, normalize_inverse=True, **PATHS[path])
    param.grad = torch.tensor([1.0, -2.0, 3.0, 0.0])
    optimizer.step()
    assert torch.equal(param.grad, torch.tensor([1.0, -2.0, 3.0, 0.0]))


@pytest.mark.parametrize("path", PATHS)
def test_maximize_is_descent_on_the_negative(path):
    up, down = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    grad = torch.tensor([1.0, -2.0, 3.0, 0.5])
    ascend, descend = DualAdam([up], maximize=True, **PATHS[path]), DualAdam([down], **PATHS[path])
    for _ in range(3):
        up.grad, down.grad = grad, -grad
        ascend.step()
        descend.step()
    assert torch.equal(up, down)


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    param = torch.nn.Parameter(torch.tensor(3.0))
    optimizer = DualAdam([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param**2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert param.item() < 3.0


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_lr_and_zero_gradient_move_nothing(decay, normalize):
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = DualAdam([param], lr=0.0, weight_decay=decay, normalize_inverse=normalize)
    param.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(param, torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalize", [True, False])
def test_empty_and_scalar_tensors(path, normalize):
    empty, scalar = torch.nn.Parameter(torch.empty(0, 3)), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = DualAdam([empty, scalar], lr=0.1, normalize_inverse=normalize, **PATHS[path])
    for _ in range(3):
        empty.grad, scalar.grad = torch.empty(0, 3), torch.tensor(0.5)
        optimizer.step()
    assert empty.shape == (0, 3) and 0 < scalar.item() < 1


@pytest.mark.parametrize("path", PATHS)
def test_any_memory_layout_gives_the_contiguous_result(path):
    start = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    layouts = {
        "contiguous": (start.clone(), grad.clone()),
        "channels_last": (start.contiguous(memory_format=torch.channels_last), grad.clone()),
        "channels_last_grad": (start.clone(), grad.contiguous(memory_format=torch.channels_last)),
        "transposed": (start.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), grad.clone()),
        "strided": (torch.stack([start, start])[0:1].squeeze(0), torch.stack([grad, grad], -1)[..., 0]),
        "every_other": (torch.stack([start, -start], -1)[..., 0], grad.clone()),
    }
    results = []
    for data, gradient in layouts.values():
        param = data.detach().requires_grad_()
        optimizer = DualAdam([param], lr=0.1, **PATHS[path])
        for _ in range(3):
            param.grad = gradient
            optimizer.step()
        results.append(param.detach().contiguous())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_half_precision_computes_in_float32(dtype, path):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, generator=generator).to(dtype)
    half, full = start.clone().requires_grad_(), start.float().requires_grad_()
    pair = [DualAdam([half], lr=1e-2, **PATHS[path]), DualAdam([full], lr=1e-2, **PATHS[path])]
    half.grad = torch.randn(64, generator=generator).to(dtype)
    full.grad = half.grad.float()
    for optimizer in pair:
        optimizer.step()
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("foreach", [True, False])
def test_compiled_step_follows_the_plain_one(foreach):
    plain, compiled = _model(), _model()
    optimizer = DualAdam(plain.parameters(), lr=0.01, switch_rate=0.3, foreach=foreach, fused=False)
    twin = DualAdam(compiled.parameters(), lr=0.01, switch_rate=0.3, foreach=foreach, fused=False)
    step = torch.compile(twin.step, backend="aot_eager")
    for index in range(6):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(index))
        for model, advance in ((plain, optimizer.step), (compiled, step)):
            model.zero_grad()
            model(x).pow(2).mean().backward()
            advance()
    for a, b in zip(plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"capturable": True}])
def test_tensor_learning_rate(options):
    number, tensor = _model(), _model()
    plain = DualAdam(number.parameters(), lr=0.01, switch_rate=0.2)
    ours = DualAdam(tensor.parameters(), lr=torch.tensor(0.01, dtype=torch.float64), switch_rate=0.2, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (plain, ours)]
    for step in range(8):
        _steps(number, plain, step, step + 1)
        _steps(tensor, ours, step, step + 1)
        for schedule in schedules:
            schedule.step()
    for a, b in zip(number.parameters(), tensor.parameters()):
        torch.testing.assert_close(a, b)
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("optimizer_cls", [DualAdam, InvAdam])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid lr: -1.0 - should be in \[0.0, inf\)"),
        ({"lr": float("nan")}, ValueError, "Invalid lr: nan"),
        ({"lr": float("inf")}, ValueError, "Invalid lr: inf"),
        ({"lr": "1e-3"}, TypeError, "Invalid lr: '1e-3'"),
        ({"lr": torch.ones(2)}, ValueError, r"Invalid lr: tensor of shape \(2,\)"),
        ({"lr": torch.tensor(float("nan"))}, ValueError, "Invalid lr: nan"),
        ({"betas": (0.9, 1.0)}, ValueError, r"Invalid betas\[1\]: 1.0 - should be in \[0.0, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"Invalid betas\[0\]: -0.1"),
        ({"betas": (float("nan"), 0.9)}, ValueError, r"Invalid betas\[0\]: nan"),
        ({"betas": 0.9}, TypeError, "Invalid betas: 0.9"),
        ({"betas": (0.9,)}, TypeError, "Invalid betas"),
        ({"eps": -1e-8}, ValueError, "Invalid eps: -1e-08"),
        ({"eps": float("nan")}, ValueError, "Invalid eps: nan"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay: -0.1"),
        ({"weight_decay": float("inf")}, ValueError, "Invalid weight_decay: inf"),
        ({"weight_decay": None}, TypeError, "Invalid weight_decay: None"),
        ({"normalize_inverse": "False"}, TypeError, "Invalid normalize_inverse: 'False' - should be True or False"),
        ({"foreach": 1}, TypeError, "Invalid foreach: 1 - should be True or False or None"),
        ({"maximize": None}, TypeError, "Invalid maximize"),
        ({"foreach": True, "fused": True}, ValueError, "Invalid foreach: True with fused=True"),
    ],
)
def test_bad_arguments_are_named(optimizer_cls, options, error, match):
    with pytest.raises(error, match=match):
        optimizer_cls([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan"), float("inf")])
def test_bad_switch_rate_is_named(rate):
    with pytest.raises(ValueError, match=rf"Invalid switch_rate: {rate} - should be in \[0.0, 1.0\]"):
        DualAdam([torch.nn.Parameter(torch.ones(1))], switch_rate=rate)


def test_bad_group_leaves_the_optimizer_as_it_was():
    optimizer = DualAdam([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="Invalid eps: -1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("param", "match"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2).to_sparse(), "sparse_coo"),
    ],
)
def test_unsupported_parameters_are_refused(param, match):
    with pytest.raises(ValueError, match=f"Invalid params: .*{match}"):
        DualAdam([torch.nn.Parameter(param)])


def test_sparse_gradient_is_refused_before_anything_moves():
    first = torch.nn.Parameter(torch.ones(3))
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = DualAdam([first, embedding.weight])
    first.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))
