"""Gradient release: the same weights as with ordinary steps, no gradient left, and refusals in one line."""

import copy
import types

import pytest
import torch
from paths import PATHS

from hf_dualadam import DualAdam, InvAdam, release_gradients

CPU_PATHS = {name: options for name, options in PATHS.items() if name != "capturable"}
every_path = pytest.mark.parametrize("options", CPU_PATHS.values(), ids=CPU_PATHS)
SETTINGS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"normalize_inverse": True},
    {"inverse_scale": 3.0, "switch_rate": 0.3},
    {"state_bits": 8, "normalize_inverse": True},
]


class Tied(torch.nn.Module):
    """An embedding that is also the output layer, and one large enough for 8-bit moments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(64, 64)
        self.middle = torch.nn.Linear(64, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, tokens):
        return self.norm(torch.tanh(self.middle(self.embedding(tokens)))) @ self.embedding.weight.T


def _loss(model, step):
    tokens = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(step))
    return torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _groups(model):
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
    ]


def _train(model, optimizer, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        _loss(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


@every_path
@pytest.mark.parametrize("cls", [DualAdam, InvAdam])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_ordinary_steps_bit_for_bit(cls, settings, options):
    settings = {k: v for k, v in settings.items() if cls is DualAdam or k != "switch_rate"}
    results = []
    for released in (False, True):
        model = Tied()
        optimizer = cls(_groups(model), 0.01, **settings, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        if released:
            release_gradients(model, optimizer)
        _train(model, optimizer, 5, scheduler=scheduler)
        results.append((model, optimizer.state_dict()))
    for p, q in zip(results[0][0].parameters(), results[1][0].parameters()):
        assert torch.equal(p, q)
    ordinary, released = (state["state"] for _, state in results)
    assert ordinary.keys() == released.keys() and len(ordinary) == 5
    for index, a in ordinary.items():
        b = released[index]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("bits", [24, 32])
def test_equals_ordinary_steps_with_weights_of_16_bits(bits):
    results = []
    for released in (False, True):
        model = Tied().bfloat16()
        optimizer = DualAdam(_groups(model), 0.01, state_bits=8, master_weight_bits=bits)
        if released:
            release_gradients(model, optimizer)
        _train(model, optimizer, 4)
        results.append([optimizer.master_weights(p) for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results))


def test_no_gradient_is_left_and_no_two_are_there_at_once():
    model = Tied()
    optimizer = DualAdam(model.parameters())
    release_gradients(model, optimizer)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    _loss(model, 0).backward()
    assert len(alive) == 5 and max(alive) == 0
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}
    optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def test_removing_the_handle_goes_back_to_ordinary_steps():
    model = Tied()
    optimizer = DualAdam(model.parameters(), 0.01)
    handle = release_gradients(model, optimizer)
    _train(model, optimizer, 2)
    handle.remove()
    before = model.middle.weight.detach().clone()
    _loss(model, 2).backward()
    assert model.middle.weight.grad is not None and torch.equal(before, model.middle.weight)
    optimizer.step(lambda: _loss(model, 2))
    assert not torch.equal(before, model.middle.weight)


def test_frozen_and_added_parameters_and_loaded_states():
    model = Tied()
    model.middle.requires_grad_(False)
    optimizer = DualAdam(_groups(model)[:1], 0.01)
    release_gradients(model, optimizer)
    _train(model, optimizer, 1)
    optimizer.add_param_group({"params": list(model.norm.parameters()), "lr": 0.5})
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)  # it replaces the groups
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model)
    _train(model, optimizer, 1, start=1)
    assert torch.equal(before.embedding.weight, model.embedding.weight)
    assert torch.equal(before.middle.weight, model.middle.weight)
    assert not torch.equal(before.norm.weight, model.norm.weight)
    assert optimizer.state[model.embedding.weight]["step"] == 2 and optimizer.state[model.norm.weight]["step"] == 1


def test_step_hooks_run_once_a_step():
    model = Tied()
    optimizer = DualAdam(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    release_gradients(model, optimizer)
    _train(model, optimizer, 3)
    assert calls == ["pre", "post"] * 3


def test_a_second_gradient_is_refused():
    model = Tied()
    optimizer = DualAdam(model.parameters())
    release_gradients(model, optimizer)
    _loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="got a second gradient before optimizer.step"):
        _loss(model, 1).backward()


def test_closures_are_refused():
    model = Tied()
    optimizer = DualAdam(model.parameters())
    release_gradients(model, optimizer)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(RuntimeError, match="closure"):
            call()
    optimizer.step(None)
    optimizer.step(closure=None)


def test_a_sparse_gradient_is_refused_as_by_step():
    model = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = DualAdam(model.parameters())
    release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        model(torch.tensor([1])).sum().backward()


def test_what_excludes_it_is_refused():
    model = Tied()
    with pytest.raises(TypeError, match="AdamW - should be DualAdam or InvAdam"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="not in the model"):
        release_gradients(Tied(), DualAdam(model.parameters()))
    wrapped = types.SimpleNamespace(optimizer=DualAdam(model.parameters()), scaler=object())
    with pytest.raises(ValueError, match="loss scaling"):
        release_gradients(model, wrapped)
    handle = release_gradients(model, DualAdam(model.parameters()))
    with pytest.raises(ValueError, match="already released"):
        release_gradients(model, DualAdam(model.parameters()))
    handle.remove()
    model.norm.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="FSDP1"):
        release_gradients(model, DualAdam(model.parameters()))
    del model.norm.weight._fsdp_flattened
    model.norm.weight.ds_id = 1
    with pytest.raises(ValueError, match="DeepSpeed"):
        release_gradients(model, DualAdam(model.parameters()))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
