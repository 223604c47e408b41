"""Formats of the state: codes of 8-bit moments and weights of 16 bits with a correction."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from paths import PATHS
from tracking import DigitsViT, digits_loss, share_in_eight_bits, track, words_model

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.states import (
    MOMENT_FORMATS,
    ExactMoments,
    dither,
    new_correction,
    new_moment,
    read_weight,
    write_weight_,
)

CPU = torch.device("cpu")
CPU_PATHS = {name: options for name, options in PATHS.items() if name != "capturable"}
every_path = pytest.mark.parametrize("options", CPU_PATHS.values(), ids=CPU_PATHS)
HALF = [torch.bfloat16, torch.float16]
EIGHT = MOMENT_FORMATS[8]


def _coded(moment, name, step=1.0):
    state = {"step": torch.tensor(step), **new_moment(EIGHT, moment, name, torch.float32)}
    EIGHT.encode_(state, name, moment)
    return state


def _roundtrip(moment, name, step=1.0):
    return EIGHT.decode(_coded(moment, name, step), name)


def _problem(dtype=torch.float32, seed=0):
    """A matrix with 8-bit moments, a vector without, and a function that sets their gradients for a step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(40, 150), (150,)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]

    def set_grads(step):
        noise = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=noise) * torch.logspace(-3, 1, p.shape[-1])).to(p.dtype)

    return params, set_grads


def _train(optimizer, set_grads, steps, start=0):
    for step in range(start, start + steps):
        set_grads(step)
        optimizer.step()


# ---- codes ----


@pytest.mark.parametrize("shape", [(3, 128), (5, 7, 40), (2, 129), (1, 64)])
def test_codes_hold_each_moment_to_half_a_step(shape):
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 3, (shape[0],) + (1,) * (len(shape) - 1))
    v = m.square() * torch.rand(shape, generator=generator).add(0.5)
    decoded = _roundtrip(m, "exp_avg")
    rows, found = m.reshape(shape[0], -1), decoded.reshape(shape[0], -1)
    for row, other in zip(rows, found):
        for block, back in zip(row.split(128), other.split(128)):
            scale = block.abs().max()
            position, code = (block.abs() / scale).sqrt() * 127, (back.abs() / scale).sqrt() * 127
            assert torch.all((position - code).abs() <= torch.where(position < 16, 1.001, 0.501))
            assert torch.all((back == 0) | (back.sign() == block.sign()))
            torch.testing.assert_close(back[block.abs().argmax()], block[block.abs().argmax()])
    octaves = math.log2(v.reshape(shape[0], -1).max() / v[v > 0].min())
    error = torch.log2(_roundtrip(v, "exp_avg_sq") / v).abs().max()
    assert error <= 1.5 * min(40, octaves) / 254 + 1e-4


def test_zeros_stay_zero_and_extremes_stay_in_range():
    m = torch.zeros(2, 130)
    assert not _roundtrip(m, "exp_avg").any() and not _roundtrip(m, "exp_avg_sq").any()
    v = torch.zeros(1, 128)
    v[0, :4] = torch.tensor([3.4e38, 1.0, 1e-38, 1e-45])
    decoded = _roundtrip(v, "exp_avg_sq")
    assert not decoded[0, 4:].any()
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded[0, 0], v[0, 0], rtol=1e-4, atol=0)
    # Values beyond the range are raised to its end, so no update divides by a root that is too small.
    torch.testing.assert_close(decoded[0, 2], torch.tensor(3.4e38 * 2.0**-40), rtol=1e-4, atol=0)
    alike = torch.full((1, 128), 0.3)
    torch.testing.assert_close(_roundtrip(alike, "exp_avg_sq"), alike, rtol=1e-6, atol=0)
    torch.testing.assert_close(_roundtrip(-alike, "exp_avg"), -alike, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF], ids=["inf", "NaN", "NaN of a GPU"])
def test_moments_that_are_not_finite_spoil_their_block_and_no_other(bits):
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    m = torch.rand(3, 256) + 0.1
    m[1, 5] = bad
    for name, step in (("exp_avg", 1.0), ("exp_avg_sq", 1.0), ("exp_avg_sq", 2.0)):
        decoded = _roundtrip(m, name, step)
        assert not decoded[1, :128].isfinite().any(), name
        assert decoded[1, 128:].isfinite().all() and decoded[[0, 2]].isfinite().all()


@every_path
def test_a_gradient_that_is_not_finite_does_not_heal(options):
    for bad in (math.nan, math.inf):
        params, set_grads = _problem()
        optimizer = DualAdam(params, state_bits=8, switch_rate=0.3, **options)
        _train(optimizer, set_grads, 2)
        params[0].grad[3, 5] = bad
        optimizer.step()
        _train(optimizer, set_grads, 5, start=3)
        assert not params[0][3, 5].isfinite()
        assert not optimizer.moments(params[0])[0][3, 5].isfinite()
        assert params[0][4].isfinite().all()


def test_dither_takes_all_values_equally_often():
    values = torch.stack([dither(torch.tensor(float(step)), CPU) for step in range(1, 2001)])
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    assert counts.min() >= 95 and counts.max() <= 105
    counts = torch.histc(values[700:740], 8, 0, 1)  # even over a short range
    assert counts.min() >= 3 and counts.max() <= 7
    assert dither(2.0**24) == dither(torch.tensor(2.0**24), CPU) < 1


def test_moments_that_get_no_gradient_decay_as_in_32_bits():
    # Rounding to nearest would keep exp_avg at up to 0.5 % of its block's largest, while exp_avg_sq decays below it.
    params = [torch.nn.Parameter(torch.zeros(32, 128)) for _ in range(2)]
    optimizers = [DualAdam([p], 1.0, state_bits=bits, switch_rate=1.0) for p, bits in zip(params, (32, 8))]
    generator = torch.Generator().manual_seed(0)
    for step in range(2000):
        grad = torch.randn(32, 128, generator=generator)
        grad[:, ::2] *= step < 50
        grad[:, 1::4] *= torch.rand(32, 32, generator=generator) < 0.005
        if step == 1000:
            before = [p.detach().clone() for p in params]
        for p, optimizer in zip(params, optimizers):
            p.grad = grad.clone()
            optimizer.step()
    moved = [p.detach() - b for p, b in zip(params, before)]
    assert not optimizers[1].moments(params[1])[0][:, ::2].any()
    assert not moved[1][:, ::2].any()
    rare = (moved[0][:, 1::4], moved[1][:, 1::4])
    torch.testing.assert_close(rare[1].norm(), rare[0].norm(), rtol=0.05, atol=0)


def test_noisy_steps_do_not_drift(steps=1500):
    sizes = torch.logspace(-4, 0, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(1))].view(16, 256)
    param = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = DualAdam([param], state_bits=8, betas=(0.9, 0.99), switch_rate=1.0)
    v, generator = torch.zeros(16, 256), torch.Generator().manual_seed(0)
    drifts = []
    for step in range(steps):
        param.grad = torch.randn(16, 256, generator=generator) * sizes
        v.mul_(0.99).addcmul_(param.grad, param.grad, value=0.01)
        optimizer.step()
        if step >= steps - 50:
            drifts.append((optimizer.moments(param)[1] / v).log2().median())
    assert torch.stack(drifts).mean().abs() < 0.02


# ---- 8-bit moments in the optimizer ----


@pytest.mark.parametrize("cls", [DualAdam, InvAdam])
def test_a_state_takes_two_bytes_an_element_where_eight_bits_apply(cls):
    for shape in ((64, 64), (100, 65), (50, 3, 40), (33, 129), (16, 4096)):
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = torch.ones(shape)
        optimizer = cls([param], state_bits=8)
        optimizer.step()
        state = optimizer.state[param]
        assert {t.dtype for t in state.values()} == {torch.int8, torch.uint8, torch.float32}
        assert sum(t.nbytes for t in state.values()) <= 2.2 * param.numel() + 4
        assert all(t.shape == param.shape or t.dim() in (0, 2) for t in state.values())


@pytest.mark.parametrize("shape", [(4096,), (63, 64), (200, 63), (5, 5), ()])
def test_small_tensors_and_short_rows_keep_32_bits(shape):
    params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
    for p, bits in zip(params, (8, 32)):
        p.grad = torch.full(shape, 0.3)
        optimizer = DualAdam([p], state_bits=bits)
        optimizer.step()
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(*params)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cls", [DualAdam, InvAdam])
def test_paths_agree_up_to_a_code(cls, normalize):
    results = {}
    for name, options in CPU_PATHS.items():
        params, set_grads = _problem()
        optimizer = cls(params, 1e-2, state_bits=8, normalize_inverse=normalize, weight_decay=0.1, **options)
        _train(optimizer, set_grads, 1)
        state = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
        _train(optimizer, set_grads, 9, start=1)
        results[name] = params[0].detach().clone(), state
    weight, state = results.pop("single")
    for name, (other_weight, other) in results.items():
        for key in state:
            if key in ("exp_avg", "exp_avg_sq"):
                assert (state[key].int() - other[key].int()).abs().max() <= 1, (name, key)
            else:
                torch.testing.assert_close(other[key], state[key], rtol=1e-5, atol=0)
        assert (weight - other_weight).norm() <= 2e-3 * (weight - _problem()[0][0]).norm(), name


@every_path
def test_any_layout_trains_like_the_contiguous_one(options):
    results = []
    for permute in (False, True):
        values = torch.randn(16, 5, 4, 8, generator=torch.Generator().manual_seed(0))
        values = values.to(memory_format=torch.channels_last) if permute else values
        param = torch.nn.Parameter(values)
        optimizer = DualAdam([param], 0.1, state_bits=8, foreach=False, fused=False)
        for step in range(3):
            param.grad = torch.randn(16, 5, 4, 8, generator=torch.Generator().manual_seed(step)).mul(values.sign())
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def _loaded(optimizer, params, settings):
    new = copy.deepcopy(params)
    other = DualAdam(new, 1e-2, switch_rate=0.1, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, new


def _saved(optimizer, params, settings):
    new, file = copy.deepcopy(params), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = DualAdam(new, 1e-2, switch_rate=0.1, **settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other, new


def _pickled(optimizer, params, settings):
    return pickle.loads(pickle.dumps((optimizer, params)))


def _deepcopied(optimizer, params, settings):
    return copy.deepcopy((optimizer, params))


@every_path
@pytest.mark.parametrize("carry", [_loaded, _saved, _pickled, _deepcopied])
@pytest.mark.parametrize("master_weight_bits", [None, 24, 32])
def test_a_resumed_run_ends_with_the_same_bits(carry, master_weight_bits, options):
    dtype = torch.float32 if master_weight_bits is None else torch.bfloat16
    params, set_grads = _problem(dtype)
    settings = {"state_bits": 8, "master_weight_bits": master_weight_bits, **options}
    optimizer = DualAdam(params, 1e-2, switch_rate=0.1, **settings)
    _train(optimizer, set_grads, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=FutureWarning)  # torch before 2.6 warns about its own unpickling
        other, new = carry(optimizer, params, settings)
    for p, q in zip(params, new):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert value.dtype == other.state[q][key].dtype and torch.equal(value, other.state[q][key])
    for own, optim in ((params, optimizer), (new, other)):
        for step in range(5, 9):
            set_grads(step)
            for p, q in zip(params, own):
                q.grad = p.grad.clone()
            optim.step()
    assert all(torch.equal(p, q) for p, q in zip(params, new))


@pytest.mark.parametrize("source", ["AdamW", 32, 8])
@pytest.mark.parametrize("target", [32, 8])
def test_states_move_between_formats_with_one_warning(source, target):
    params, set_grads = _problem()
    old = torch.optim.AdamW(params) if source == "AdamW" else DualAdam(params, state_bits=source)
    _train(old, set_grads, 5)
    new = DualAdam(params, state_bits=target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert len(caught) == (source != target if source != "AdamW" else 1)
    assert source == target or source == "AdamW" or "rounded" in str(caught[0].message) or target == 32
    state = new.state[params[0]]
    assert state["exp_avg"].dtype == (torch.int8 if target == 8 else torch.float32)
    assert state.keys() == (old.state[params[0]].keys() if source == target else state.keys())
    assert ("exp_avg_scale" in state) == (target == 8)
    before = (
        [old.state[params[0]][name] for name in ("exp_avg", "exp_avg_sq")]
        if source == "AdamW"
        else old.moments(params[0])
    )
    for exact, decoded in zip(before, new.moments(params[0])):
        if target == 32 or source == target:
            assert torch.equal(exact, decoded)
        else:
            assert (exact - decoded).norm() < 0.05 * exact.norm()
    _train(new, set_grads, 2, start=5)
    assert params[0].isfinite().all() and state["step"] == 7


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_scales_that_do_not_fit_are_refused_before_anything_changes(damage):
    params, set_grads = _problem()
    optimizer = DualAdam(params, state_bits=8)
    _train(optimizer, set_grads, 1)
    state = copy.deepcopy(optimizer.state_dict())
    if damage == "missing":
        del state["state"][0]["exp_avg_sq_min"]
    else:
        state["state"][0]["exp_avg_sq_min"] = torch.zeros(40, 3)
    before = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    with pytest.raises(ValueError, match=r"exp_avg_sq_min of parameter 0 .* \(40, 2\)"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(before[k], optimizer.state[params[0]][k]) for k in before)


def test_bad_bits_are_refused():
    param = torch.nn.Parameter(torch.zeros(2))
    for value in (16, 4, "8", None, True, 8.5):
        with pytest.raises(ValueError, match="Invalid state_bits"):
            DualAdam([param], state_bits=value)
    for value in (8, 16, "24", True):
        with pytest.raises(ValueError, match="Invalid master_weight_bits"):
            DualAdam([param.bfloat16()], master_weight_bits=value)
    with pytest.raises(ValueError, match="float32 parameters are weights of 32 bits"):
        DualAdam([param], master_weight_bits=24)
    with pytest.raises(ValueError, match="float32 parameters are weights of 32 bits"):
        DualAdam([{"params": [param], "master_weight_bits": 24}, {"params": [param.detach().bfloat16()]}])
    assert DualAdam([param], state_bits=8.0).param_groups[0]["state_bits"] == 8


def test_a_step_without_rate_and_gradient_moves_nothing():
    params, set_grads = _problem(torch.bfloat16)
    optimizer = DualAdam(params, lr=0.0, state_bits=8, master_weight_bits=24)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(b, p) for b, p in zip(before, params))
    assert not any(t.any() for p in params for k, t in optimizer.state[p].items() if k != "step")


# ---- weights of 16 bits with a correction ----


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_corrected_weight_is_the_nearest_half_and_a_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator) * 10.0 ** torch.randint(-4, 3, (64, 1), generator=generator)
    weight[0, :3] = torch.tensor([0.0, -0.0, 1.0])
    param = torch.zeros(64, 64, dtype=dtype)
    correction = new_correction(param, 32)
    write_weight_(param, correction, weight, 1)
    away = param.double() - weight.double()
    nearest = weight.to(dtype).double() - weight.double()
    assert torch.equal(away.abs(), nearest.abs())  # ties may go either way
    back = read_weight(param, correction)
    if dtype == torch.bfloat16:
        assert torch.equal(back, weight)
    else:
        torch.testing.assert_close(back, weight, rtol=2**-24, atol=2.0**-41)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_24_bits_hold_a_weight_to_an_8_bit_part_of_its_unit_and_on_average_exactly(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    param = torch.zeros(64, 64, dtype=dtype)
    correction = new_correction(param, 24)
    total = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(1, 513):
        write_weight_(param, correction, weight, step)
        back = read_weight(param, correction)
        total += back
    exponent = torch.frexp(weight).exponent - 1
    unit = 2.0 ** (exponent - 15) if dtype == torch.bfloat16 else 2.0 ** (exponent.clamp_min(-14) - 10) / 254
    assert torch.all((back - weight).abs() <= 2 * unit)
    assert torch.all((total / 512 - weight).abs() <= 0.05 * unit)
    same = read_weight(param, correction)
    write_weight_(param, correction, same, 7)  # numbers that the format can represent do not change
    assert torch.equal(read_weight(param, correction), same)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bits", [24, 32])
def test_weights_that_are_not_finite_stay_so(dtype, bits):
    for value in (math.nan, math.inf, -math.inf):
        param = torch.zeros(2, 2, dtype=dtype)
        correction = new_correction(param, bits)
        write_weight_(param, correction, torch.full((2, 2), value), 3)
        assert not param.isfinite().any() and not read_weight(param, correction).isfinite().any()


@every_path
@pytest.mark.parametrize("state_bits", [32, 8])
def test_bfloat16_with_32_bits_trains_bit_for_bit_like_float32(state_bits, options):
    wide, set_grads = _problem()
    for p in wide:
        p.data = p.data.bfloat16().float()
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    common = {"lr": 1e-3, "weight_decay": 0.1, "switch_rate": 0.2, "state_bits": state_bits, **options}
    optimizers = [DualAdam(wide, **common), DualAdam(narrow, master_weight_bits=32, **common)]
    for step in range(12):
        set_grads(step)
        for p, q in zip(wide, narrow):
            q.grad = p.grad.bfloat16()
            p.grad = q.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(wide, narrow):
        assert torch.equal(optimizers[1].master_weights(q), p)
        rounded = p.detach().bfloat16()
        assert torch.equal((rounded.float() - p).abs(), (q.float() - p).abs())
        for a, b in zip(optimizers[0].moments(p), optimizers[1].moments(q)):
            assert torch.equal(a, b)


@every_path
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_update_is_lost_to_rounding(dtype, options):
    moved = {}
    for bits in (None, 24, 32):
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = DualAdam([param], 2.0**-20, switch_rate=1.0, master_weight_bits=bits, **options)
        for _ in range(300):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[bits] = (1 - optimizer.master_weights(param)).mean().item()
    assert moved[None] == 0
    assert moved[32] == pytest.approx(300 * 2.0**-20, rel=1e-3)
    assert moved[24] == pytest.approx(300 * 2.0**-20, abs=2.0**-16)  # the precision of the weights


def test_corrections_move_between_bits_with_a_note():
    params, set_grads = _problem(torch.bfloat16)
    old = DualAdam(params, 1e-3, master_weight_bits=32)
    _train(old, set_grads, 5)
    weight = old.master_weights(params[0])
    for bits, tolerance, text in ((24, 2.0**-14, "24 bits"), (32, 2.0**-14, "32 bits"), (None, 2.0**-8, "dropped")):
        new = DualAdam(params, 1e-3, master_weight_bits=bits)
        with pytest.warns(UserWarning, match=text):
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        torch.testing.assert_close(new.master_weights(params[0]), weight, rtol=tolerance, atol=0)
        old = new


# ---- accuracy with the optimizer's own codes on real gradients ----


def test_digits_stay_close_to_32_bits():
    model = DigitsViT()
    errors = track(model, digits_loss(model), steps=400, lr=1e-3, state_bits=8)
    assert share_in_eight_bits(model) > 0.9
    assert max(error.update for error in errors) <= 0.08


@pytest.mark.parametrize("source", ["docstrings", "sst2"])
def test_words_stay_close_to_32_bits(source):
    model, loss_at = words_model(source)
    errors = track(model, loss_at, steps=200, lr=2e-3, state_bits=8)
    assert share_in_eight_bits(model) > 0.9
    assert max(error.update for error in errors) <= 0.30
    assert max(error.largest for error in errors) <= 2.6


# ---- the seam ----


class _BFloat16Moments(ExactMoments):
    def fits(self, param):
        return param.dtype == torch.float32

    def recognizes(self, state, name):
        return state[name].dtype == torch.bfloat16

    def layout(self, param, name, dtype):
        return {name: (tuple(param.shape), torch.bfloat16)}


def test_a_new_format_is_one_class_and_one_entry(monkeypatch):
    monkeypatch.setitem(MOMENT_FORMATS, 16, _BFloat16Moments())
    params, set_grads = _problem()
    optimizer = DualAdam(params, 1e-2, state_bits=16)
    _train(optimizer, set_grads, 5)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    other, new = pickle.loads(pickle.dumps((optimizer, params)))
    loaded = DualAdam(params, 1e-2, state_bits=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded.state[params[0]][name], optimizer.state[params[0]][name])
        assert torch.equal(other.state[new[0]][name], optimizer.state[params[0]][name])
    exact = DualAdam(params, 1e-2)
    exact.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert exact.state[params[0]]["exp_avg"].dtype == torch.float32
    assert torch.equal(exact.moments(params[0])[1], optimizer.moments(params[0])[1])
    halves, set_half_grads = _problem(torch.bfloat16)
    half = DualAdam(halves, 1e-2)
    _train(half, set_half_grads, 2)
    assert half.state[halves[0]]["exp_avg"].dtype == torch.bfloat16
