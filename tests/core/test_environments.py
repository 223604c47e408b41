"""The optimizers inside hooks, threads, inference mode and wrappers, and what stays in memory."""

import gc
import threading
import weakref

import pytest
import torch
from paths import PATHS

from hf_dualadam import DualAdam, InvAdam

CPU_PATHS = {name: options for name, options in PATHS.items() if name != "capturable"}
every_path = pytest.mark.parametrize("options", CPU_PATHS.values(), ids=CPU_PATHS)


def _model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def _loss(model, step=0):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return model(x).pow(2).mean()


def _train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()


def _equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@every_path
def test_one_optimizer_per_parameter_in_gradient_hooks(options):
    ordinary, hooked = _model(), _model()
    together = DualAdam(ordinary.parameters(), 0.01, switch_rate=0.2, **options)
    apart = {p: DualAdam([p], 0.01, switch_rate=0.2, **options) for p in hooked.parameters()}

    def step(param):
        apart[param].step()
        apart[param].zero_grad()

    for param in hooked.parameters():
        param.register_post_accumulate_grad_hook(step)
    for number in range(6):
        together.zero_grad()
        _loss(ordinary, number).backward()
        together.step()
        _loss(hooked, number).backward()
    assert _equal(ordinary, hooked)


@every_path
def test_optimizers_in_two_threads_do_not_meet(options):
    expected = [_model(seed) for seed in range(2)]
    for model in expected:
        _train(model, DualAdam(model.parameters(), 0.01, switch_rate=0.1, **options), 40)
    models = [_model(seed) for seed in range(2)]
    optimizers = [DualAdam(model.parameters(), 0.01, switch_rate=0.1, **options) for model in models]
    threads = [threading.Thread(target=_train, args=(*pair, 40)) for pair in zip(models, optimizers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(_equal, models, expected))


@every_path
def test_a_first_step_in_inference_mode_leaves_ordinary_states(options):
    model, plain = _model(), _model()
    optimizer, reference = (DualAdam(m.parameters(), 0.01, **options) for m in (model, plain))
    for m in (model, plain):
        _loss(m).backward()
    with torch.inference_mode():
        optimizer.step()
    reference.step()
    _train(model, optimizer, 2)
    _train(plain, reference, 2)
    assert _equal(model, plain)


@every_path
def test_a_learning_rate_that_requires_grad(options):
    model, plain = _model(), _model()
    lr = torch.tensor(0.01, requires_grad=True)
    _train(model, DualAdam(model.parameters(), lr, **options), 3)
    _train(plain, DualAdam(plain.parameters(), 0.01, **options), 3)
    torch.testing.assert_close(model[0].weight, plain[0].weight)
    assert lr.grad is None


@every_path
@pytest.mark.parametrize("optimizer_cls", [DualAdam, InvAdam])
def test_an_optimizer_is_freed_without_the_garbage_collector(optimizer_cls, options):
    model = _model()
    optimizer = optimizer_cls(model.parameters(), **options)
    _train(model, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    gone, state = weakref.ref(optimizer), weakref.ref(optimizer.state[model[0].weight]["exp_avg"])
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert gone() is None and state() is None
    finally:
        gc.enable()


@every_path
def test_objects_do_not_accumulate_over_steps(options):
    model = _model()
    optimizer = DualAdam(model.parameters(), **options)
    _train(model, optimizer, 5)
    gc.collect()
    before = len(gc.get_objects())
    _train(model, optimizer, 50)
    gc.collect()
    assert len(gc.get_objects()) < before + 50


@pytest.mark.parametrize("wrapper", ["SAM", "Lookahead", "PCGrad", "ScheduleFreeWrapper"])
def test_wrappers_of_another_library(wrapper):
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    results = []
    for base in (DualAdam, torch.optim.AdamW):
        model = _model()
        options = {"lr": 0.01, "weight_decay": 0.0, **({"switch_rate": 1.0} if base is DualAdam else {})}
        if wrapper == "SAM":
            optimizer = library.SAM(model.parameters(), base, **options)
        else:
            optimizer = getattr(library, wrapper)(base(model.parameters(), **options))
        if hasattr(optimizer, "train"):
            optimizer.train()
        for step in range(4):
            if wrapper == "PCGrad":
                optimizer.zero_grad()
                optimizer.pc_backward([_loss(model, step), _loss(model, step + 100)])
                optimizer.step()
                continue

            def closure(step=step):
                optimizer.zero_grad()
                loss = _loss(model, step)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure) if wrapper == "SAM" else optimizer.step()
        results.append(model)
    for ours, adamw in zip(*(model.parameters() for model in results)):
        torch.testing.assert_close(ours, adamw, rtol=1e-5, atol=1e-6)  # it is AdamW from the first step on
