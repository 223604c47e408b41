"""State dicts from elsewhere: other dtypes, shapes, hooks, optimizers and keys."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from paths import PATHS
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_dualadam import DualAdam, InvAdam

CPU_PATHS = {name: options for name, options in PATHS.items() if name != "capturable"}
every_path = pytest.mark.parametrize("options", CPU_PATHS.values(), ids=CPU_PATHS)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _param(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))
    param.grad = torch.randn(*shape, generator=generator).to(dtype)
    return param


def _stepped(param, steps=2, **options):
    optimizer = DualAdam([param], switch_rate=0.25, **options)
    for _ in range(steps):
        optimizer.step()
    return optimizer


@every_path
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_a_loaded_moment_is_never_narrower_than_a_new_or_the_saved_one(source, target, options):
    saved = _stepped(_param(3, 5, dtype=source), **options)
    param = _param(3, 5, dtype=target)
    loaded = DualAdam([param], switch_rate=0.25, **options)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    new = _stepped(_param(3, 5, dtype=target)).state_dict()["state"][0]["exp_avg"].dtype
    old = saved.state_dict()["state"][0]["exp_avg"].dtype
    state = loaded.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.promote_types(new, old)
    assert torch.equal(state["exp_avg"].double(), saved.state_dict()["state"][0]["exp_avg"].double())
    loaded.step()
    assert param.isfinite().all() and state["step"] == 3


@every_path
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_moved_to_another_dtype_between_steps_goes_on(before, after, options):
    layer, reference = torch.nn.Linear(5, 3, dtype=before), torch.nn.Linear(5, 3, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    optimizers = [DualAdam(m.parameters(), 0.01, switch_rate=0.25, **options) for m in (layer, reference)]
    for step in range(6):
        if step == 3:
            layer.to(after)
        for model, optimizer in zip((layer, reference), optimizers):
            for param in model.parameters():
                generator = torch.Generator().manual_seed(step)
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()
    torch.testing.assert_close(layer.weight.double(), reference.weight, rtol=1e-5, atol=1e-6)


@every_path
def test_hooks_that_change_the_state_before_and_after_loading_are_followed(options):
    """As in torch's documentation of register_load_state_dict_pre_hook: states are reordered by name."""
    first, second = _param(3, dtype=torch.float16, seed=1), _param(3, dtype=torch.float16, seed=2)
    saved = DualAdam([first, second], **options)
    saved.step()
    loaded = DualAdam([second, first], **options)

    def reorder(optimizer, state_dict):
        return {**state_dict, "state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}

    loaded.register_load_state_dict_pre_hook(reorder)
    loaded.register_load_state_dict_post_hook(lambda optimizer: optimizer.state[first].update(seen=True))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for param in (first, second):
        assert torch.equal(loaded.state[param]["exp_avg"], saved.state[param]["exp_avg"])
        assert loaded.state[param]["exp_avg"].dtype == torch.float32
    assert loaded.state[first]["seen"] and "seen" not in loaded.state[second]


def test_a_pre_hook_may_convert_foreign_keys():
    param = _param(3)
    foreign = {
        "state": {0: {"t": 4, "m": torch.ones(3), "v": torch.full((3,), 2.0)}},
        "param_groups": [{"params": [0]}],
    }
    optimizer = DualAdam([param])

    def convert(_, state_dict):
        state = {i: {"step": s["t"], "exp_avg": s["m"], "exp_avg_sq": s["v"]} for i, s in state_dict["state"].items()}
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    optimizer.register_load_state_dict_pre_hook(convert)
    optimizer.load_state_dict(foreign)
    assert optimizer.state[param]["step"] == 4 and optimizer.state[param]["exp_avg_sq"][0] == 2


def _copied(optimizer, route):
    if route == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
        return optimizer
    return copy.deepcopy(optimizer) if route == "copied" else pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("optimizer_cls", [DualAdam, InvAdam])
@pytest.mark.parametrize("route", ["loaded", "copied", "pickled"])
def test_groups_and_defaults_have_the_same_keys_on_every_route(optimizer_cls, route):
    optimizer = optimizer_cls([_param(3)])
    groups, defaults = set(optimizer.param_groups[0]), set(optimizer.defaults)
    other = _copied(optimizer, route)
    assert set(other.param_groups[0]) == groups and set(other.defaults) == defaults
    other.step()
    assert set(other.state_dict()["param_groups"][0]) == groups


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="needs torch 2.6: no_dist")
def test_a_distributed_checkpoint_loads_twice(tmp_path):
    model = torch.nn.Linear(5, 3)
    optimizer = DualAdam(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    for _ in range(2):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert optimizer.state[model.weight]["step"] == 1


@every_path
@pytest.mark.parametrize(
    "kind", [*FLOATS, torch.int64, torch.int32, torch.int8, "int", "float", "numpy", "one element"]
)
def test_a_step_count_of_any_type_is_read_as_the_number_it_is(kind, options):
    param, expected = _param(4), _param(4)
    optimizer, reference = _stepped(param, **options), _stepped(expected, **options)
    step = optimizer.state[param]["step"]
    kinds = {
        "int": int,
        "float": float,
        "numpy": lambda s: np.float32(s.item()),
        "one element": lambda s: s.reshape(1),
    }
    optimizer.state[param]["step"] = kinds[kind](step) if isinstance(kind, str) else step.to(kind)
    optimizer.step()
    reference.step()
    assert torch.equal(param, expected) and optimizer.state[param]["step"] == 3


@every_path
@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (1,)])
def test_moments_of_another_shape_are_refused_when_loading(shape, options):
    optimizer = _stepped(_param(2, 3), **options)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq"] = torch.ones(shape)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 0 has shape .* - should be \(2, 3\)"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before


@every_path
def test_moments_of_another_shape_in_the_state_stop_a_step_before_anything_moves(options):
    params = [_param(4), _param(2, 3)]
    optimizer = DualAdam(params, **options)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.ones(3, 2)
    before = copy.deepcopy((params, optimizer.state[params[0]]))
    with pytest.raises(RuntimeError, match=r"exp_avg has shape \(3, 2\), its parameter \(2, 3\)"):
        optimizer.step()
    assert str((params, optimizer.state[params[0]])) == str(before)


@every_path
def test_a_key_that_a_wrapper_put_into_the_state_first_stays(options):
    param, expected = _param(3), _param(3)
    optimizer, reference = DualAdam([param], **options), DualAdam([expected], **options)
    optimizer.state[param]["slow_weights"] = torch.zeros(3)
    optimizer.step()
    reference.step()
    assert torch.equal(param, expected) and "slow_weights" in optimizer.state[param]


@pytest.mark.parametrize(
    "step", [None, "5", [5, 6], -3, 5.5, float("nan"), float("inf"), 10**400, torch.ones(2), torch.tensor(1j), True]
)
def test_a_loaded_step_that_is_no_count_is_refused_by_name(step):
    optimizer = _stepped(_param(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match="Invalid state_dict: .*parameter 0.* - should be"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("moment", [None, [1.0], np.ones(3), torch.ones(3).to_sparse(), torch.ones(3) * 1j])
def test_a_loaded_moment_that_is_no_dense_real_tensor_is_refused_by_name(name, moment):
    optimizer = _stepped(_param(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = moment
    with pytest.raises(ValueError, match=f"Invalid state_dict: {name} of parameter 0 is .* - should be a dense real"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("bits", [8, 32])
def test_codes_and_scales_of_another_dtype_are_refused(key, dtype, bits):
    saved = copy.deepcopy(_stepped(_param(64, 64), state_bits=8).state_dict())
    saved["state"][0][key] = saved["state"][0][key].to(dtype)
    with pytest.raises(ValueError, match="Invalid state"):
        DualAdam([_param(64, 64)], state_bits=bits).load_state_dict(saved)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [("switch_rate", 7.0, "switch_rate"), ("eps", -1.0, "eps"), ("lr", float("nan"), "lr"), ("lr", "x", "lr")]
    + [("betas", 0.9, "betas"), ("maximize", 1.5, "maximize"), ("inverse_scale", -2.0, "inverse_scale")],
)
def test_loaded_options_are_checked_like_the_constructors(option, value, error):
    optimizer = _stepped(_param(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][option] = value
    with pytest.raises(ValueError, match=f"Invalid state_dict: group 0: Invalid {error}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][option] != value


def test_what_changes_with_the_state_of_another_optimizer_is_said():
    param = _param(3)
    other = torch.optim.Adam([param], weight_decay=0.1, amsgrad=True, maximize=True)
    other.step()
    optimizer = DualAdam([param])
    says_which_decay = "decoupled_weight_decay" in other.defaults  # since torch 2.7
    said = "weight decay was added to gradients.*amsgrad" if says_which_decay else "amsgrad"
    with pytest.warns(UserWarning, match=said):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.param_groups[0]["maximize"] is True  # the direction does not change


def test_the_state_of_sgd_without_momentum_is_said_to_hold_no_moments():
    param = _param(3)
    sgd = torch.optim.SGD([param], lr=0.1)
    sgd.step()
    optimizer = DualAdam([param])
    with pytest.warns(UserWarning, match="holds no moments: DualAdam starts at step 1"):
        optimizer.load_state_dict(sgd.state_dict())


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, np.array, lambda x: np.array([x]), int])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "switch_rate", "inverse_scale"])
def test_numbers_of_other_types_are_taken_and_saved_as_floats(name, number):
    optimizer = DualAdam([_param(3)], **{name: number(0.25)})
    value = optimizer.param_groups[0][name]
    assert type(value) is float and value == float(np.asarray(number(0.25)).item())


@pytest.mark.parametrize("value", ["0.1", None, True, np.array([0.1, 0.2]), np.True_, 1j, [0.1]])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="Invalid eps: .* - should be a number"):
        DualAdam([_param(3)], eps=value)


@pytest.mark.parametrize("rate", [1e-8, 2.0**-25, 5e-324])
def test_a_switch_that_would_never_come_is_refused(rate):
    with pytest.raises(ValueError, match="Invalid switch_rate: .*step counts stop at 16,777,216"):
        DualAdam([_param(3)], switch_rate=rate)
    assert DualAdam([_param(3)], switch_rate=2.0**-24).param_groups[0]["switch_rate"] == 2.0**-24


@every_path
def test_beyond_the_largest_count_steps_go_on(options):
    param, adamw_param = _param(3), _param(3)
    optimizer = _stepped(param, **options)
    optimizer.state[param]["step"].fill_(2**24 - 1)
    adamw = torch.optim.AdamW([adamw_param], weight_decay=0.0)
    adamw.step()
    for name in ("exp_avg", "exp_avg_sq"):
        adamw.state[adamw_param][name].copy_(optimizer.state[param][name])
    adamw.state[adamw_param]["step"].fill_(2**24 - 1)
    adamw_param.data.copy_(param.data)
    for _ in range(3):
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(param, adamw_param)


@pytest.mark.parametrize(
    "missing",
    [(), ("_accelerator_graph_capture_health_check",), ("_cuda_graph_capture_health_check",)]
    + [("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")],
)
def test_steps_do_not_need_torchs_private_check(monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(torch.optim.Optimizer, name, raising=False)
    param = _param(3)
    _stepped(param)
    assert param.isfinite().all()


def test_loading_what_is_already_loaded_says_nothing():
    optimizer = _stepped(_param(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
