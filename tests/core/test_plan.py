"""The plan of a step: every change is detected, no tensor is kept alive, and graphs own the tables they read."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from hf_dualadam import DualAdam, kernels
from hf_dualadam.kernels import cpu, layout

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="the CPU kernel is not built: no C compiler")


def _problem(count=4, **options):
    params = [torch.nn.Parameter(torch.ones(6, 6)) for _ in range(count)]
    optimizer = DualAdam(params, lr=0.1, **options)
    for _ in range(2):
        _step(optimizer, params)
    return params, optimizer


def _step(optimizer, params):
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


def _replace_moment(params, optimizer):
    optimizer.state[params[0]]["exp_avg"] = torch.full((6, 6), 3.0)


def _replace_moment_by_its_transpose(params, optimizer):
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].t()


def _move_moment(params, optimizer):
    optimizer.state[params[0]]["exp_avg"].data = torch.full((6, 6), 3.0)


def _replace_step(params, optimizer):
    optimizer.state[params[0]]["step"] = torch.tensor(7, dtype=torch.int64)


def _forget_state(params, optimizer):
    optimizer.state.pop(params[1])


def _move_param(params, optimizer):
    params[0].data = torch.full((6, 6), 2.0)


def _transpose_param(params, optimizer):
    params[0].data = torch.arange(36.0).reshape(6, 6).t()


def _maximize(params, optimizer):
    optimizer.param_groups[0]["maximize"] = True


def _normalize(params, optimizer):
    optimizer.param_groups[0]["normalize_inverse"] = True


def _choose_foreach(params, optimizer):
    optimizer.param_groups[0]["foreach"] = True


def _drop_param(params, optimizer):
    del optimizer.param_groups[0]["params"][0]


def _add_group(params, optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 1.0})


def _change_lr(params, optimizer):
    optimizer.param_groups[0].update(lr=0.7, betas=(0.5, 0.6), weight_decay=0.1, eps=1e-3, switch_rate=0.2)


CHANGES = [
    _replace_moment,
    _replace_moment_by_its_transpose,
    _move_moment,
    _replace_step,
    _forget_state,
    _move_param,
    _transpose_param,
    _maximize,
    _normalize,
    _choose_foreach,
    _drop_param,
    _add_group,
    _change_lr,
]


@pytest.fixture(params=["torch's", "own"])
def layout_check(request, monkeypatch):
    """The comparison of layouts that torch offers, and the one for a torch without it."""
    if request.param == "own":
        monkeypatch.setattr(layout, "_TensorGuards", layout._LayoutCheck)
    else:
        assert layout._TensorGuards is not layout._LayoutCheck


@pytest.mark.usefixtures("layout_check")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_noticed(change):
    results = []
    for options in ({}, {"fused": False, "foreach": False}):
        params, optimizer = _problem(**options)
        change(params, optimizer)
        for _ in range(2):
            _step(optimizer, params)
        results.append([*params, *(state[k].float() for state in optimizer.state.values() for k in sorted(state))])
    for planned, looped in zip(*results):
        torch.testing.assert_close(planned, looped, rtol=1e-5, atol=1e-6)


GRADIENTS = {
    "none": lambda p: None,
    "transposed": lambda p: torch.arange(36.0).reshape(6, 6).t(),
    "expanded": lambda p: torch.ones(1, 6).expand(6, 6),
    "negative": lambda p: torch._neg_view(torch.full((6, 6), 0.5)),
}


@pytest.mark.usefixtures("layout_check")
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_of_another_kind_is_noticed(kind):
    results = []
    for options in ({}, {"fused": False, "foreach": False}):
        params, optimizer = _problem(**options)
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            params[1].grad = GRADIENTS[kind](params[1])
            optimizer.step()
        _step(optimizer, params)
        results.append(params)
    for planned, looped in zip(*results):
        torch.testing.assert_close(planned, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("layout_check")
def test_a_sparse_gradient_is_refused_before_anything_is_counted():
    params, optimizer = _problem()
    params[1].grad = torch.full_like(params[1], 0.5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


def test_a_comparison_of_layouts_that_torch_has_changed_is_not_used():
    class WithAnotherSignature(layout._LayoutCheck):
        def __init__(self, tensors):
            super().__init__(*tensors)

    class ThatFindsNothing(layout._LayoutCheck):
        def check(self, *tensors):
            return True

    assert layout._compares(layout._LayoutCheck)
    assert not layout._compares(WithAnotherSignature) and not layout._compares(ThatFindsNothing)


def test_tensors_left_out_are_looked_at_again_once_they_have_moved():
    params = [torch.nn.Parameter(torch.ones(6))]
    optimizer = DualAdam(params)
    optimizer.step()  # without gradients
    (plan,) = optimizer._plans.values()
    assert plan.parts == []
    _step(optimizer, params)
    (after,) = optimizer._plans.values()
    assert after is not plan and len(after.parts) == 1
    plan._kernels = []  # as for a device whose kernel the plan does not know
    assert plan.look(optimizer.param_groups, optimizer.state, optimizer._collect) is None


@pytest.mark.parametrize("kind", ["strided", "plain", "replicated", "partial"])
def test_squares_are_summed_over_all_dimensions_that_divide_a_tensor(kind, monkeypatch):
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    first = {"strided": _StridedShard(0, split_factor=2), "plain": Shard(1), "replicated": Replicate()}

    class Sharded:
        placements = (first.get(kind, Partial()), Shard(0))
        device_mesh = type("Mesh", (), {"get_group": staticmethod(lambda dim: dim)})

    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: reduced.append(group))
    layout.sum_over_shards(torch.ones(1, 2), [Sharded()])
    assert reduced == ([0, 1] if kind in ("strided", "plain") else [1])
    assert layout.can_sum_over_shards(Sharded()) == (kind != "partial")


@pytest.mark.usefixtures("layout_check")
def test_a_plan_serves_until_something_changes(monkeypatch):
    params, optimizer = _problem()
    monkeypatch.setattr(kernels, "make_plan", lambda *args: pytest.fail("the plan was made anew"))
    for lr in (0.1, 0.2, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        _step(optimizer, params)


@pytest.mark.usefixtures("layout_check")
def test_a_plan_keeps_nothing_alive():
    params, optimizer = _problem()
    moments = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    gradients = [weakref.ref(p.grad) for p in params]
    gc.disable()
    try:
        for p in params:
            p.grad = None
        assert not any(ref() is not None for ref in gradients)
        for state in optimizer.state.values():  # as if moments were moved to the host between steps
            state["exp_avg"] = state["exp_avg"].clone()
        assert not any(ref() is not None for ref in moments)
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None, "a cycle keeps the optimizer until the garbage collector runs"
    finally:
        gc.enable()


def test_copies_have_plans_of_their_own():
    params, optimizer = _problem()
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = [p.detach().clone() for p in params]
        own = clone.param_groups[0]["params"]
        _step(clone, own)
        assert all(torch.equal(p, old) for p, old in zip(params, before))
        assert all(not torch.equal(p, old) for p, old in zip(own, before))


def test_a_loaded_state_is_used():
    params, optimizer = _problem()
    saved = copy.deepcopy(optimizer.state_dict())
    _step(optimizer, params)
    optimizer.load_state_dict(saved)
    _step(optimizer, params)
    assert optimizer.state[params[0]]["step"] == 3


def test_two_optimizers_in_two_threads():
    expected = [p.detach().clone() for p in _problem(300)[0]]
    results, errors = {}, []

    def work(name):
        try:
            params, optimizer = _problem(300)
            results[name] = params
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for params in results.values():
        assert all(torch.equal(p, want) for p, want in zip(params, expected))


# ---- tables of the CUDA path, with kernels that are not launched ----


@pytest.fixture
def launches(monkeypatch):
    """The arguments of each launch of the update; ``launches.capturing`` simulates the capture of a graph."""
    pytest.importorskip("triton", "3.2", reason="needs Triton 3.2")
    from hf_dualadam.kernels import cuda, dry_run

    class Launches(list):
        capturing = False
        stream = 0

    launches = Launches()
    run = cuda.load().update_kernel.run
    monkeypatch.setattr(
        cuda.load().update_kernel, "run", lambda *args, **rest: launches.append(args[:5]) or run(*args, **rest)
    )
    monkeypatch.setattr(cuda, "_is_capturing", lambda device: launches.capturing)
    monkeypatch.setattr(cuda, "_stream", lambda device: launches.stream)
    frombuffer = torch.frombuffer

    def from_the_host(*args, **rest):
        assert not launches.capturing, "a captured graph must not copy from memory of the host"
        return frombuffer(*args, **rest)

    monkeypatch.setattr(torch, "frombuffer", from_the_host)
    with dry_run.cuda_path_on_the_cpu():
        yield launches


def _cuda_problem(launches, dtypes=(torch.float32,), **options):
    params = [torch.nn.Parameter(torch.ones(6, dtype=dtype)) for dtype in dtypes for _ in range(3)]
    optimizer = DualAdam(params, lr=0.1, capturable=True, **options)
    for _ in range(2):
        _step(optimizer, params)
    launches.clear()
    return params, optimizer


def _capture(launches, optimizer, params):
    launches.capturing = True
    try:
        _step(optimizer, params)
    finally:
        launches.capturing = False


def test_graphs_and_eager_steps_read_tables_of_their_own(launches):
    params, optimizer = _cuda_problem(launches, (torch.float32, torch.bfloat16))
    for action in ("capture", "capture", "eager", "capture", "eager", "eager"):
        kept = [p.grad for p in params]  # so that the next gradients have other addresses
        launches.clear()
        if action == "capture":
            _capture(launches, optimizer, params)
        else:
            _step(optimizer, params)
        own = iter([p.grad.data_ptr() for p in params])
        for _, grads, *_ in launches:
            assert grads.tolist() == [next(own) for _ in range(3)], action
        if action == "capture":
            graph = [grads for _, grads, *_ in launches]
            before = [grads.clone() for grads in graph]
            del kept
    assert all(torch.equal(now, then) for now, then in zip(graph, before)), "an eager step wrote into a graph's table"


def test_tables_that_graphs_share_are_kept_and_do_not_multiply(launches):
    params, optimizer = _cuda_problem(launches)
    _capture(launches, optimizer, params)
    shared = launches[-1][0]
    for _ in range(5):
        optimizer._drop_plans()
        _step(optimizer, params)
        _capture(launches, optimizer, params)
        assert launches[-1][0] is shared
    assert len(optimizer._graph_tables) == 1


def test_a_first_step_may_be_captured_and_leaves_no_table_behind(launches):
    params, optimizer = _cuda_problem(launches)
    optimizer._drop_plans()
    _capture(launches, optimizer, params)
    captured = launches[-1][0]
    assert captured.view(3, -1)[:, 0].tolist() == [p.data_ptr() for p in params]
    _step(optimizer, params)
    assert launches[-1][0] is not captured


def test_a_capture_that_fails_spoils_nothing(launches, monkeypatch):
    from hf_dualadam.kernels import cuda

    params, optimizer = _cuda_problem(launches)
    run = cuda.load().step_scalars_kernel.run
    monkeypatch.setattr(cuda.load().step_scalars_kernel, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _capture(launches, optimizer, params)
    monkeypatch.setattr(cuda.load().step_scalars_kernel, "run", run)
    for act in (_step, lambda *args: _capture(launches, *args)):
        act(optimizer, params)
        assert launches[-1][1].tolist() == [p.grad.data_ptr() for p in params]


def test_another_stream_gets_tables_of_its_own(launches):
    params, optimizer = _cuda_problem(launches)
    optimizer.step()
    first = launches[-1]
    launches.stream = 1
    optimizer.step()
    assert all(new is not old for new, old in zip(launches[-1][:3], first[:3]))


def test_options_are_not_shared_with_another_optimizer(launches):
    """A learning rate on the device is written into the table."""
    tables = []
    for lr in (torch.tensor(0.5), 0.0):
        params, optimizer = _cuda_problem(launches)
        optimizer.param_groups[0]["lr"] = lr
        _step(optimizer, params)
        (plan,) = optimizer._plans.values()
        tables.append(plan.parts[0]._options[1])
    assert tables[0].data_ptr() != tables[1].data_ptr()


def test_tables_do_not_pile_up_as_gradients_come_and_go(launches):
    params, optimizer = _cuda_problem(launches)
    tables = []
    for step in range(30):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.5) if i == 0 or step % (i + 1) else None
        optimizer.step()
        tables += [weakref.ref(table) for table in launches[-1][:3]]
        launches.clear()
    assert sum(ref() is not None for ref in tables) <= 3


def test_one_misaligned_gradient_leaves_the_others_their_alignment(launches):
    """The kernel determines the alignment from each tensor's addresses; no argument of the launch depends on it."""
    params, optimizer = _cuda_problem(launches)
    for p in params:
        p.grad = torch.ones(6)
    params[1].grad = torch.ones(7)[1:]
    optimizer.step()
    assert len(launches) == 1
    assert [address % 16 != 0 for address in launches[0][1].tolist()] == [False, True, False]


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}], ids=["one part", "two parts"])
def test_looking_at_a_plan_calls_no_audit_hook(options):
    """Such as filelock's, which makes id() ten times as slow. A hook cannot be removed, hence the process."""
    program = f"""
import sys
import torch
from hf_dualadam import DualAdam

params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (3,)) for _ in range(50)]
for p in params:
    p.grad = torch.ones_like(p)
optimizer = DualAdam(params, **{options})
optimizer.step()
optimizer.step()
events = []
sys.addaudithook(lambda event, _: events.append(event) if event == "builtins.id" else None)
optimizer.step()
print(len(events))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10
