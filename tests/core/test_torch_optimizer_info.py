"""The tests of torch's own optimizers, applied to ours through torch's database of optimizers.

Entries for DualAdam and InvAdam go into ``torch.testing._internal.common_optimizers.optim_db``; the tests below are
ours and run over each set of options in these entries on each path (for-loop, foreach, fused), and over the error
inputs that torch has for all optimizers. Of torch's generic tests these do not apply:

- complex and sparse ones: neither is supported; both are refused, and that is tested.
- ``differentiable``: there is no such option; gradients do not flow through our step.
- amsgrad and betas as tensors: there are no such options.
- ``GradScaler`` inside the step (``found_inf``, ``grad_scale``): left out on purpose, since the learning-rate schedule
  then moves on skipped steps (accelerate issue 4242). Skipped steps are tested in test_trainer.py.
- peak memory, multi-GPU, CUDA graphs, fused on CUDA against fused on the CPU: they need GPUs.
- "the default is foreach": ours is the one-pass kernel, where there is one.
- parity of a compiled step: tested in test_optimizer.py.
- closures for every optimizer, whichever it is: that is for LBFGS; ours is tested in test_optimizer.py.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytest.importorskip("expecttest", reason="torch.testing imports it")
if torch.__version__ < (2, 6):
    pytest.skip("needs torch 2.6: its database had other fields before", allow_module_level=True)

from torch.testing._internal import common_optimizers as torch_db  # noqa: E402

from hf_dualadam import DualAdam, InvAdam  # noqa: E402
from hf_dualadam.kernels import cpu  # noqa: E402

SCHEDULERS = [
    lambda optimizer: StepLR(optimizer, gamma=0.9, step_size=10),
    lambda optimizer: LinearLR(optimizer, start_factor=0.4, total_iters=4),
    lambda optimizer: ExponentialLR(optimizer, gamma=0.99),
    lambda optimizer: ReduceLROnPlateau(optimizer),
]


def _inputs(optim_cls):
    """The function that torch's database requires: sets of options, without parameters and without a path."""
    options = {
        "default": {},
        "lr": {"lr": 0.01},
        "weight decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "normalized": {"normalize_inverse": True},
        "Tensor lr": {"lr": torch.tensor(0.001)},
        "no decay of the moments": {"betas": (0.0, 0.0)},
    }
    if optim_cls is DualAdam:
        options |= {"never inverse": {"switch_rate": 1.0}, "switch": {"switch_rate": 0.3, "normalize_inverse": True}}

    def inputs(device, dtype=None):
        # capturable is for accelerators, and the fused path refuses it on the CPU
        more = {} if torch.device(device).type == "cpu" else {"capturable": {"capturable": True}}
        return [torch_db.OptimizerInput(None, kwargs, desc) for desc, kwargs in (options | more).items()]

    return inputs


def _error_inputs(device, dtype):
    """Torch's errors for every optimizer, ours for the options, and those of a step."""
    sample = Parameter(torch.randn(1, 1, device=device, dtype=dtype))
    errors = [
        error
        for error in torch_db.get_error_inputs_for_all_optims(device, dtype)
        if "lr" not in error.optimizer_error_input.kwargs  # our message differs
    ]
    for kwargs, error, message in [
        ({"lr": torch.ones(2)}, ValueError, r"Invalid lr: tensor of shape \(2,\)"),
        ({"betas": (1.0, 0.0)}, ValueError, r"Invalid betas\[0\]: 1.0 - should be in"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay: -1 - should be in"),
        ({"eps": -1e-8}, ValueError, "Invalid eps: -1e-08 - should be in"),
        ({"foreach": True, "fused": True}, ValueError, "Invalid foreach: True with fused=True"),
        ({"differentiable": True}, TypeError, "unexpected keyword argument 'differentiable'"),
        ({"amsgrad": True}, TypeError, "unexpected keyword argument 'amsgrad'"),
    ]:
        errors.append(_error([sample], kwargs, error, message))
    complex_sample, sparse = Parameter(torch.ones(1, dtype=torch.complex64)), Parameter(torch.ones(3, 2))
    errors.append(_error([complex_sample], {}, ValueError, "complex64 - should be real floating point"))
    sparse.grad = torch.ones(3, 2).to_sparse()
    on_step = torch_db.OptimizerErrorEnum.STEP_ERROR
    errors.append(_error([sparse], {}, RuntimeError, "does not support sparse gradients", error_on=on_step))
    return errors


def _error(params, kwargs, error_type, message, **more):
    given = torch_db.OptimizerInput(params, kwargs, f"{kwargs}")
    return torch_db.ErrorOptimizerInput(given, error_type=error_type, error_regex=message, **more)


torch_db.optim_db.extend(
    torch_db.OptimizerInfo(
        optim_cls,
        optim_inputs_func=_inputs(optim_cls),
        optim_error_inputs_func=_error_inputs,
        scheduler_inputs=tuple([scheduler] for scheduler in SCHEDULERS),
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=("foreach", "fused", "maximize", "capturable", "normalize_inverse"),
        supports_complex=False,
        has_capturable_arg=True,
        supports_fused_on=("cpu", "cuda") if cpu.load() else ("cuda",),
    )
    for optim_cls in (DualAdam, InvAdam)
)
INFOS = [info for info in torch_db.optim_db if info.optim_cls.__module__.startswith("hf_dualadam")]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _with_paths(device, info):
    """Each set of options on each path; torch's own helper leaves foreach out on the CPU."""
    paths = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}}
    if device in info.supports_fused_on:
        paths["fused"] = {"fused": True}
    return [
        torch_db.OptimizerInput(None, {**given.kwargs, **flags}, f"{given.desc}, {path}")
        for given in info.optim_inputs_func(device)
        for path, flags in paths.items()
    ]


def _cases(inputs_of):
    """(device, entry, its options) for pytest."""
    return pytest.mark.parametrize(
        ("device", "info", "given"),
        [
            pytest.param(device, info, given, id=f"{device}-{info.name}-{given.desc}")
            for device in DEVICES
            for info in INFOS
            for given in inputs_of(device, info)
        ],
    )


every_option = _cases(lambda device, info: info.optim_inputs_func(device))
every_option_and_path = _cases(_with_paths)
every_entry = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def _params(device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in [(2, 3), (3,), (), (0,), (1,)]
    ]


def _gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def _build(info, params, given, **more):
    return info.optim_cls(params, **copy.deepcopy(given.kwargs), **more)


def _steps(optimizer, first=0, last=5):
    for seed in range(first, last):
        for group in optimizer.param_groups:
            _gradients(group["params"], seed)
        optimizer.step()


def _values(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def _tensors(optimizer):
    """Everything that a step changes: parameters and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return _values(params) + _values(optimizer.state[p][name] for p in params for name in optimizer.state[p])


def _through_file(state, **kwargs):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, **kwargs)


def test_entries_name_no_path_and_are_ours():
    assert [info.name for info in INFOS] == ["DualAdam", "InvAdam"]
    for info in INFOS:
        for given in info.optim_inputs_func("cpu"):
            assert not {"foreach", "fused", "differentiable"} & given.kwargs.keys()


@every_entry
def test_errors(info):
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        params = _params() if given.params is None else given.params
        if error.error_on is torch_db.OptimizerErrorEnum.STEP_ERROR:
            optimizer = info.optim_cls(params, **given.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                optimizer.step()
        elif issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.optim_cls(params, **given.kwargs)


@every_option
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["foreach", "fused"])
def test_paths_match_the_for_loop(device, info, given, path, dtype):
    if path == "fused" and device not in info.supports_fused_on:
        pytest.skip("the kernel was not built")
    ends = []
    for flags in ({"foreach": False, "fused": False}, {path: True}):
        params = _params(device, dtype)
        optimizer = _build(info, params, given, **flags)
        _steps(optimizer)
        ends.append(_tensors(optimizer))
    for loop, other in zip(*ends, strict=True):
        torch.testing.assert_close(other, loop)


@every_option_and_path
@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_goes_in_the_right_direction(device, info, given, scheduler):
    weight, bias = Parameter(torch.ones(6, 5, device=device)), Parameter(torch.ones(6, device=device))
    x = torch.linspace(0, 1, 5, device=device)
    optimizer = _build(info, [weight, bias], given)
    schedule = scheduler and scheduler(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure)]
    for _ in range(20):
        loss = optimizer.step(closure).detach()
        if schedule:
            schedule.step(*([loss] if isinstance(schedule, ReduceLROnPlateau) else []))
    losses.append(closure())
    assert (losses[1] > losses[0]) if given.kwargs.get("maximize") else (losses[1] < losses[0])


@every_option_and_path
def test_no_gradients_no_step(device, info, given):
    params = _params(device)
    before = _values(params)
    optimizer = _build(info, params, given)
    optimizer.step()
    assert all(map(torch.equal, before, params)) and not optimizer.state


@every_option_and_path
def test_zero_gradients_leave_only_weight_decay(device, info, given):
    params = _params(device)
    before = _values(params)
    optimizer = _build(info, params, given)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    left = 1 - float(optimizer.defaults["lr"]) * optimizer.defaults["weight_decay"]
    for old, new in zip(before, params):
        torch.testing.assert_close(new.detach(), old * left, rtol=2e-7 if left != 1 else 0, atol=0)


@every_option_and_path
def test_zero_learning_rate_moves_nothing_and_keeps_state(device, info, given):
    params = _params(device)
    before = _values(params)
    optimizer = _build(info, params, given)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    _steps(optimizer, last=1)
    assert all(map(torch.equal, before, params))
    assert all({*optimizer.state[param]} == {"step", "exp_avg", "exp_avg_sq"} for param in params)


@every_option_and_path
def test_empty_and_frozen_parameters(device, info, given):
    params = [
        Parameter(torch.empty(0, 3, device=device)),
        Parameter(torch.ones(2, device=device), requires_grad=False),
    ]
    optimizer = _build(info, params, given)
    params[0].grad = torch.empty(0, 3, device=device)
    optimizer.step()
    assert torch.equal(params[1], torch.ones(2, device=device)) and params[1] not in optimizer.state


@every_option_and_path
def test_state_dict_goes_on_alike(device, info, given):
    params = _params(device)
    optimizer = _build(info, params, given)
    _steps(optimizer)
    others = [Parameter(value) for value in _values(params)]
    resumed = _build(info, others, given)
    resumed.load_state_dict(_through_file(optimizer.state_dict(), weights_only=True))
    _steps(optimizer, 5, 8)
    _steps(resumed, 5, 8)
    assert all(map(torch.equal, _tensors(optimizer), _tensors(resumed)))


@every_option_and_path
def test_state_dicts_of_equal_runs_are_equal(device, info, given):
    states = []
    for _ in range(2):
        optimizer = _build(info, _params(device), given)
        _steps(optimizer)
        states.append(optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)


@every_option_and_path
def test_older_state_dict_loads(device, info, given):
    params = _params(device)
    optimizer = _build(info, params, given)
    _steps(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for flag in info.not_og_supported_flags:
            del group[flag]
    optimizer.load_state_dict(state)
    assert all(set(group) == {*optimizer.defaults, "params"} for group in optimizer.param_groups)
    _steps(optimizer, 5, 6)


@every_option_and_path
def test_step_count_may_be_a_number(device, info, given):
    optimizer = _build(info, _params(device), given)
    _steps(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for of_param in state["state"].values():
        of_param["step"] = of_param["step"].item()
    resumed = _build(info, [Parameter(v) for v in _values(optimizer.param_groups[0]["params"])], given)
    resumed.load_state_dict(state)
    _steps(optimizer, 5, 6)
    _steps(resumed, 5, 6)
    assert all(map(torch.equal, _tensors(optimizer), _tensors(resumed)))


@every_option_and_path
def test_named_parameters(device, info, given):
    plain, named = _params(device), _params(device)
    names = [f"p{index}" for index in range(len(named))]
    optimizer = _build(info, list(zip(names, named)), given)
    _steps(optimizer)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    unnamed = _build(info, plain, given)
    unnamed.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(unnamed.state_dict())
    assert optimizer.param_groups[0]["param_names"] == names


@every_option_and_path
def test_copies_are_equal_and_printable(device, info, given):
    optimizer = _build(info, _params(device), given)
    _steps(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert public <= set(vars(other)) and type(other) is type(optimizer)
        assert repr(other).startswith(f"{info.name} (\nParameter Group 0\n")
        for option in optimizer.defaults:
            assert other.param_groups[0][option] == optimizer.param_groups[0][option]
        _steps(other, 5, 6)
        assert all(torch.isfinite(value).all() for value in _tensors(other))


@every_option_and_path
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_groups_have_their_own_options(device, info, given, option):
    value = {"lr": 0.0, "weight_decay": 1.0}[option]
    first, second, alone = _params(device), _params(device), _params(device)
    optimizer = _build(info, [{"params": first}, {"params": second, option: value}], given)
    _steps(optimizer)
    kwargs = {**given.kwargs, option: value}
    single = info.optim_cls(alone, **copy.deepcopy(kwargs))
    _steps(single)
    assert all(map(torch.equal, second, alone)) and not torch.equal(first[0], second[0])


@every_option_and_path
def test_mixed_dtypes_in_one_group(device, info, given):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    mixed, alone = ([_params(device, dtype)[0] for dtype in dtypes] for _ in range(2))
    _steps(_build(info, mixed, given))
    separate = [_build(info, [param], given) for param in alone]
    for seed in range(5):
        _gradients(alone, seed)
        for optimizer in separate:
            optimizer.step()
    for together, single in zip(mixed, alone):
        torch.testing.assert_close(together, single)


@every_option_and_path
def test_tensor_learning_rate_is_the_number(device, info, given):
    ends = []
    for rate in (0.01, torch.tensor(0.01, dtype=torch.float64), torch.tensor([[0.01]], dtype=torch.float64)):
        params = _params(device)
        optimizer = info.optim_cls(params, **{**given.kwargs, "lr": rate})
        _steps(optimizer)
        assert optimizer.param_groups[0]["lr"] is rate
        ends.append(_values(params))
    for end in ends[1:]:
        for number, tensor in zip(ends[0], end):
            torch.testing.assert_close(tensor, number)


@every_option_and_path
def test_hooks_see_every_step(device, info, given):
    seen = []
    optimizer = _build(info, _params(device), given)
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("pre")),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("post")),
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append("all pre")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("all post")),
    ]
    _steps(optimizer, last=2)
    for handle in handles:
        handle.remove()
    _steps(optimizer, last=1)
    assert sorted(seen) == sorted(["pre", "post", "all pre", "all post"] * 2)


@every_option_and_path
def test_hooks_of_the_state_dict_can_change_it(device, info, given):
    calls = []

    def after_saving(optimizer, state):
        calls.append("saved")
        return {**state, "extra": 1}

    def before_loading(optimizer, state):
        calls.append("loading")
        return {name: value for name, value in state.items() if name != "extra"}

    optimizer = _build(info, _params(device), given)
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("saving"))
    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    _steps(optimizer)
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["saving", "saved", "loading", "loaded"]
    _steps(optimizer, 5, 6)


@every_entry
def test_default_dtype_does_not_matter(info):
    ends = []
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.float64):
        params = _params()
        torch.set_default_dtype(dtype)
        try:
            _steps(info.optim_cls(params, lr=0.01))
        finally:
            torch.set_default_dtype(before)
        ends.append(_values(params))
    assert all(map(torch.equal, *ends))


@every_entry
def test_state_moves_to_the_parameters_device(info):
    optimizer = info.optim_cls(_params(), lr=0.01)
    _steps(optimizer)
    meta = info.optim_cls(_params("meta"), lr=0.01)
    meta.load_state_dict(optimizer.state_dict())
    for state in meta.state.values():
        assert state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta and state["step"].is_cpu


@every_entry
def test_fused_refuses_devices_without_a_kernel(info):
    with pytest.raises(ValueError, match="Invalid fused: True .* no kernel for meta"):
        info.optim_cls([Parameter(torch.ones(2, device="meta"))], fused=True)
