"""DualAdam on a GPU: the kernel in graphs, in DDP and FSDP2, with a GradScaler, with gradient release."""

import contextlib
import copy
import gc

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", "3.2", reason="needs Triton 3.2")

from triton_checks import DEVICE, RATE, _params, _train  # noqa: E402

from hf_dualadam import DualAdam, release_gradients  # noqa: E402
from hf_dualadam.kernels import cuda  # noqa: E402


def _takes_the_kernel(optimizer):
    """Whether the last step left no tensor to another path."""
    (plan,) = optimizer._plans.values()
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return sum(len(part.groups) for part in plan.parts if isinstance(part, cuda.Part)) == count


def test_a_step_does_not_wait_for_the_device():
    params = _params((1000, 5000))
    lr = torch.tensor(0.01, device=DEVICE)
    optimizers = [DualAdam(params, weight_decay=0.1), DualAdam(params, lr=lr, normalize_inverse=True, capturable=True)]
    for optimizer in optimizers:
        _train(optimizer, params, steps=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], torch.Tensor):
                    group["lr"] *= 0.5
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_compiled_as_lr_alpha_and_step_change():
    params = _params((1000,))
    optimizer = DualAdam(params, switch_rate=RATE)
    _train(optimizer, params, steps=1)
    compiled = len(_binaries("update_kernel"))
    for t in range(1, 6):
        optimizer.param_groups[0]["lr"] = (1, 0.5, 1e-3, 0.0, 7)[t - 1]
        _train(optimizer, params, steps=1, start=t)
    assert len(_binaries("update_kernel")) == compiled


def _binaries(name):
    kernel = getattr(cuda.load(), name)
    device = torch.cuda.current_device()
    return kernel.device_caches[device][0] if hasattr(kernel, "device_caches") else kernel.cache[device]  # Triton 3.2


def test_a_captured_step_goes_on_counting():
    results = []
    for captured in (False, True):
        params = _params((1000, 2049))
        optimizer = DualAdam(params, lr=0.02, switch_rate=RATE, capturable=True)
        _train(optimizer, params, steps=1)
        graph = _capture(optimizer, params, 0.1) if captured else None
        for _ in range(4):
            graph.replay() if captured else _eager(optimizer, params, 0.1)
        results.append([p.detach().clone() for p in params])
        assert optimizer.state[params[0]]["step"] == 5
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_grad_scaler_skips_steps_that_overflow():
    param = _params((100,))[0]
    optimizer = DualAdam([param], lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    before = param.detach().clone()
    for value, moves in ((float("inf"), False), (1.0, True)):
        param.grad = torch.full_like(param, value)
        scaler.scale(torch.ones((), device=DEVICE))
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, param) != moves


@contextlib.contextmanager
def _one_process(folder):
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(DEVICE)


def _compare(model, wrapped, steps=4, **options):
    """Train a wrapped model with the kernel and a copy of it with foreach; their weights have to agree."""
    options = {"lr": 0.02, "weight_decay": 0.1, "switch_rate": RATE, **options}
    other = _net()
    ours = DualAdam(wrapped.parameters(), **options)
    theirs = DualAdam(other.parameters(), foreach=True, **options)
    for step in range(steps):
        x = torch.randn(8, 17, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for own, optimizer in ((wrapped, ours), (other, theirs)):
            own(x).square().sum().backward()
            optimizer.step()
            if step < steps - 1:
                optimizer.zero_grad()
    assert _takes_the_kernel(ours)
    for p, q in zip(model.parameters(), other.parameters()):
        found = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(found.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"normalize_inverse": True}, {"capturable": True}], ids=str)
def test_bucket_views_of_ddp(options, tmp_path):
    """Most of these gradients do not start at a multiple of 16 bytes."""
    model = _net()
    with _one_process(tmp_path):
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        _compare(model, wrapped, **options)
        assert any(p.grad.data_ptr() % 16 for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"normalize_inverse": True}], ids=str)
def test_shards_of_fsdp2(options, tmp_path):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    model = _net()
    with _one_process(tmp_path):
        mesh = dist.device_mesh.init_device_mesh(DEVICE, (1,))
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
        _compare(model, model, **options)


def _capture(optimizer, params, value):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in params:
            p.grad = torch.full_like(p, value)
        optimizer.step()
    return graph


def _eager(optimizer, params, value):
    for p in params:
        p.grad = torch.full_like(p, value)
    optimizer.step()


@pytest.mark.parametrize("normalize", [False, True])
def test_graphs_and_eager_steps_in_any_order(normalize):
    results = []
    for captured in (False, True):
        params = [*_params((1000, 2049)), *_params((33,), torch.bfloat16), *_params((5,), torch.float64)]
        optimizer = DualAdam(params, lr=0.02, switch_rate=0.1, normalize_inverse=normalize, capturable=True)
        _eager(optimizer, params, 0.5)
        values = {"a": 0.1, "b": -0.2}
        graphs = {name: _capture(optimizer, params, value) for name, value in values.items() if captured}
        for action in "abea" + "ebba":
            if action == "e":
                _eager(optimizer, params, 0.3)
            elif captured:
                graphs[action].replay()
            else:
                _eager(optimizer, params, values[action])
        results.append([p.detach().clone() for p in params])
        assert all(optimizer.state[p]["step"] == 9 for p in params)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_error_during_a_capture_spoils_nothing():
    results = []
    for fails in (False, True):
        params = _params((1000, 2049))
        optimizer = DualAdam(params, lr=0.02, switch_rate=RATE, capturable=True)
        _eager(optimizer, params, 0.5)
        if fails:
            with pytest.raises(ArithmeticError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                _eager(optimizer, params, 0.1)
                raise ArithmeticError
        _eager(optimizer, params, 0.1)
        _capture(optimizer, params, 0.1).replay()
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_captures_do_not_pile_up_in_memory():
    params = _params((1000, 2049))
    optimizer = DualAdam(params, lr=0.02, capturable=True)
    _eager(optimizer, params, 0.5)
    used = []
    for _ in range(12):
        graph = _capture(optimizer, params, 0.1)
        graph.replay()
        optimizer.zero_grad()
        del graph
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[2]


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.float32, {"state_bits": 8}),
        (torch.bfloat16, {"state_bits": 8, "master_weight_bits": 24}),
    ],
    ids=str,
)
def test_gradient_release_needs_no_second_copy_of_the_gradients(dtype, options):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(8)]
    peaks, results = [], []
    for released in (False, True):
        model = copy.deepcopy(torch.nn.Sequential(*layers)).to(DEVICE, dtype)
        optimizer = DualAdam(model.parameters(), lr=0.01, **options)
        if released:
            release_gradients(model, optimizer)
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            model(torch.ones(1, 512, device=DEVICE, dtype=dtype)).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_tensor_is_updated_to_its_end(dtype):
    """More than 2^31 elements, whose indices do not fit into 32 bits."""
    n = 2**31 + 2**12 + 3
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip(f"needs {20 * n / 2**30:.0f} GiB of GPU memory")
    param = torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=DEVICE))
    param.grad = torch.ones_like(param)
    DualAdam([param], lr=0.5, switch_rate=1.0).step()
    assert bool((param == param[0]).all()) and param[0] < 0
