"""Random tensors, groups, options and order of calls: every path ends where the paper's formula does.

200 cases by default; ``HYPOTHESIS_PROFILE=nightly`` tries 2,500.
"""

import copy
import io
import os
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from paths import PATHS
from reference import dualadam, dualadam_normalized

from hf_dualadam import DualAdam, InvAdam

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

common = {"deadline": None, "print_blob": True, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("ci", max_examples=200, derandomize=True, database=None, **common)
hypothesis.settings.register_profile("nightly", max_examples=2500, **common)
SETTINGS = hypothesis.settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Rounding of one step, relative to the size of the weights; half precision rounds the moments too.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@dataclass
class Case:
    """Groups of tensors with their options, and what happens to them in order."""

    cls: type
    groups: list[dict]  # the options of each, "dtype", and "tensors": their shapes and layouts
    events: list[tuple] = field(default_factory=list)


shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (4, 1), (2, 0, 3), (2, 2, 3), (1, 2, 2, 2)])
layouts = st.sampled_from(["contiguous", "transposed", "every_other", "expanded"])
options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 0.01, 0.1]),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.9, 0.99, 0.999, 0.9999])),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
        "switch_rate": st.one_of(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.floats(0.01, 0.5)),
        "normalize_inverse": st.booleans(),
        "maximize": st.booleans(),
        "dtype": st.sampled_from(list(ROUNDING)),
    }
)


@st.composite
def cases(draw):
    groups = [
        {**draw(options), "tensors": draw(st.lists(st.tuples(shapes, layouts), min_size=1, max_size=3))}
        for _ in range(draw(st.integers(1, 3)))
    ]
    count = sum(len(group["tensors"]) for group in groups)
    scale = draw(st.sampled_from([1e-4, 0.01, 1.0, 8.0]))
    steps = st.tuples(
        st.just("step"),
        st.lists(st.booleans(), min_size=count, max_size=count),  # which have a gradient
        st.integers(0, 2**31),  # seed of the gradients
        st.just(scale),
        layouts,
    )
    others = st.sampled_from([("reload",), ("deepcopy",), ("change_path",), ("train_later",)])
    events = draw(st.lists(st.one_of(steps, steps, others), min_size=1, max_size=8))
    return Case(draw(st.sampled_from([DualAdam, DualAdam, InvAdam])), groups, events)


def _laid_out(values, layout):
    """A tensor of these values with a different memory layout."""
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every_other":
        return torch.stack([values, values + 1], -1)[..., 0]
    return values.clone()


def _gradient(shape, seed, scale, layout, dtype):
    generator = torch.Generator().manual_seed(seed)
    if layout == "expanded" and shape:
        return (torch.randn(1, generator=generator) * scale).to(dtype).expand(shape)
    return _laid_out((torch.randn(shape, generator=generator) * scale).to(dtype), layout)


def _arguments(case, group):
    """The options of a group that the class accepts."""
    left_out = {"tensors", "dtype"} | ({"switch_rate"} if case.cls is InvAdam else set())
    return {name: value for name, value in group.items() if name not in left_out}


def _build(case, params, path):
    """Groups with their own options, the last of which is added later."""
    groups = [{"params": own, **_arguments(case, group)} for own, group in zip(params, case.groups)]
    optimizer = case.cls(groups[0].pop("params"), **groups[0], **PATHS[path])
    for group in groups[1:]:
        optimizer.add_param_group(group)
    return optimizer


def _run(case, path):
    """Parameters at the start and at the end, and the gradients that each was given."""
    generator = torch.Generator().manual_seed(len(case.events))
    starts = [
        [
            _laid_out(torch.randn(shape, generator=generator).to(group["dtype"]), layout)
            for shape, layout in group["tensors"]
        ]
        for group in case.groups
    ]
    params = [[torch.nn.Parameter(tensor.clone()) for tensor in group] for group in starts]
    flat = [param for group in params for param in group]
    grads = [[] for _ in flat]
    optimizer = _build(case, params, path)
    for event, *details in case.events:
        if event == "step":
            mask, seed, scale, layout = details
            for index, (param, has_gradient) in enumerate(zip(flat, mask)):
                param.grad = None
                if has_gradient and param.requires_grad:
                    param.grad = _gradient(param.shape, seed + index, scale, layout, param.dtype)
                    grads[index].append(param.grad.double())
            given = [None if param.grad is None else param.grad.clone() for param in flat]
            optimizer.step()
            for before, param in zip(given, flat):
                assert before is None or torch.equal(before, param.grad)
        elif event == "train_later":
            flat[0].requires_grad_(not flat[0].requires_grad)
        else:
            if event == "change_path":
                path = list(PATHS)[(list(PATHS).index(path) + 1) % len(PATHS)]
            state = copy.deepcopy(optimizer.state_dict()) if event == "deepcopy" else _through_file(optimizer)
            optimizer = _build(case, params, path)
            optimizer.load_state_dict(state)
    return [tensor for group in starts for tensor in group], flat, grads, optimizer


def _through_file(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _reference(case, group, start, grads):
    """Where the tensor is after each step, by the paper's formula, in float64."""
    sign = -1 if group["maximize"] else 1
    beta1, beta2 = group["betas"]
    kwargs = {"eta": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"], "lam": group["weight_decay"]}
    kwargs["rate"] = 0.0 if case.cls is InvAdam else group["switch_rate"]
    theta = start.double().flatten().tolist()
    columns = [(sign * grad).flatten().tolist() for grad in grads]
    places = [start.double().flatten()]
    for count in range(1, len(grads) + 1):
        if group["normalize_inverse"] and theta:
            place = dualadam_normalized(theta, columns[:count], **kwargs)
        else:
            place = [dualadam(x, [c[i] for c in columns[:count]], **kwargs) for i, x in enumerate(theta)]
        places.append(torch.tensor(place, dtype=torch.float64))
    return torch.stack(places)


@SETTINGS
@hypothesis.given(cases())
def test_every_path_follows_the_paper(case):
    owners = [group for group in case.groups for _ in group["tensors"]]
    for path in PATHS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            starts, ends, grads, optimizer = _run(case, path)
        for group, start, end, seen in zip(owners, starts, ends, grads):
            places = _reference(case, group, start, seen)
            if places.numel():
                moved = places.diff(dim=0).abs().amax() if len(seen) else 0.0
                half = group["dtype"] in (torch.bfloat16, torch.float16)
                tolerance = (len(seen) + 1) * ROUNDING[group["dtype"]] * (places.abs().amax() + 8 * moved * half)
                distance = (end.detach().double().flatten() - places[-1]).abs().amax()
                assert distance <= tolerance, f"{path}: {distance} away, {tolerance} allowed"
            state = optimizer.state.get(end, {})
            assert (state["step"].item() if state else 0) == len(seen)
            assert end.stride() == torch.nn.Parameter(start.clone()).stride() and end.dtype == group["dtype"]
