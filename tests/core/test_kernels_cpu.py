"""The CPU kernel, compared with the paper's formula in Python floats and with the loop over tensors."""

import ctypes
import multiprocessing
import tracemalloc
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import dualadam, dualadam_normalized

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.kernels import cpu
from hf_dualadam.kernels.layout import overlapping

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="the CPU kernel is not built: no C compiler")

SIZES = (0, 1, 7, 31, 32, 33, 2**15 - 1, 2**15, 2**15 + 1)
PERIOD = 61  # odd-sized tensors repeat this many numbers, so that the reference is fast and no vector width fits
RATE = 0.15  # inverse until step 5, Adam from step 6
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _numbers(count, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def _params(sizes, dtype, seed=0):
    base = _numbers(PERIOD, seed, dtype)
    return [torch.nn.Parameter(base[torch.arange(n) % PERIOD].clone()) for n in sizes]


def _train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        base = _numbers(PERIOD, 100 + t, torch.float64)
        for p in params:
            p.grad = base[torch.arange(p.numel()) % PERIOD].to(p.dtype).reshape(p.shape)
        optimizer.step()


@pytest.fixture
def kernel_only(monkeypatch):
    """Fail the test if a tensor takes another path."""
    monkeypatch.setattr(DualAdam, "_update", lambda *_: pytest.fail("a tensor was left to another path"))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_size_follows_the_paper_over_the_switch(dtype, weight_decay, maximize, kernel_only):
    params = _params(SIZES, dtype)
    theta = params[-1][:PERIOD].tolist()
    optimizer = DualAdam(params, lr=0.02, weight_decay=weight_decay, switch_rate=RATE, maximize=maximize)
    _train(optimizer, params, steps=9)
    sign = -1 if maximize else 1
    grads = [[sign * g for g in _numbers(PERIOD, 100 + t, torch.float64).to(dtype).tolist()] for t in range(9)]
    expected = torch.tensor(
        [dualadam(x, [g[i] for g in grads], eta=0.02, lam=weight_decay, rate=RATE) for i, x in enumerate(theta)],
        dtype=torch.float64,
    )
    for p in params:
        target = expected[torch.arange(p.numel()) % PERIOD]
        torch.testing.assert_close(p.detach().double(), target, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        state = optimizer.state[p]
        assert state["step"] == 9
        assert state["exp_avg"].dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_normalized_update_follows_the_reference(dtype, kernel_only):
    params = _params((1, 33, 2**15 + 1 if dtype == torch.float32 else 1000), dtype)
    start = [p.tolist() for p in params]
    _train(DualAdam(params, lr=0.02, weight_decay=0.1, switch_rate=RATE, normalize_inverse=True), params, steps=7)
    base = [_numbers(PERIOD, 100 + t, torch.float64).to(dtype).tolist() for t in range(7)]
    for p, theta in zip(params, start):
        grads = [[g[i % PERIOD] for i in range(p.numel())] for g in base]
        expected = dualadam_normalized(theta, grads, eta=0.02, lam=0.1, rate=RATE)
        torch.testing.assert_close(p.tolist(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, {"normalize_inverse": True}], ids=["plain", "normalized"])
def test_result_does_not_depend_on_the_number_of_threads(options, threads):
    results = []
    for count in (1, 2, 5):
        threads(count)
        params = _params((5, 300_001, 2**15, 100_000), torch.float32)
        _train(DualAdam(params, lr=0.02, switch_rate=RATE, **options), params, steps=3)
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_threads_follow_torch(monkeypatch, threads):
    seen = []
    library = SimpleNamespace(dual_update=lambda *arguments: seen.append(arguments[4]))
    monkeypatch.setattr(cpu, "load", lambda: (library, 1))
    params = _params((10,), torch.float32)
    optimizer = DualAdam(params)
    for count in (1, 3):
        threads(count)
        _train(optimizer, params, steps=1)
    assert seen == [1, 3]


def test_groups_and_step_counts_keep_their_own_scalars(kernel_only):
    params = _params((40, 50, 60), torch.float64)
    late = _params((50,), torch.float64)[0]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "switch_rate": 1.0, "betas": (0.4, 0.9)}]
    optimizer = DualAdam(groups, lr=0.02, weight_decay=0.1, switch_rate=RATE)
    _train(optimizer, params, steps=2)
    optimizer.add_param_group({"params": [late]})
    _train(optimizer, [*params, late], steps=3, start=2)
    grads = [_numbers(PERIOD, 100 + t, torch.float64).tolist() for t in range(5)]
    options = [
        {"eta": 0.1, "rate": RATE},
        *[{"eta": 0.02, "rate": 1.0, "beta1": 0.4, "beta2": 0.9}] * 2,
        {"eta": 0.02, "rate": RATE},
    ]
    for p, kwargs, first in zip([*params, late], options, (0, 0, 0, 2)):
        start = _numbers(PERIOD, 0, torch.float64).tolist()
        expected = [dualadam(start[i], [g[i] for g in grads[first:]], lam=0.1, **kwargs) for i in range(p.numel())]
        torch.testing.assert_close(p.tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.7, 0.01, -3.0])
def test_every_half_precision_number_is_rounded_as_torch_does(dtype, decay, kernel_only):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    param = torch.nn.Parameter(every.clone())
    param.grad = torch.zeros_like(param)
    DualAdam([param], lr=1.0, weight_decay=1 - decay).step()
    expected = (every.float() * decay).to(dtype)
    assert torch.equal(param.isnan(), expected.isnan())
    assert torch.equal(param[~expected.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))


def test_after_the_switch_an_overflowing_inverse_part_is_not_computed(kernel_only):
    param = torch.nn.Parameter(torch.ones(40))
    param.grad = torch.full_like(param, 1e30)
    DualAdam([param], switch_rate=1.0).step()
    assert param.isfinite().all()


def _storage(n=400):
    return _numbers(n, 7, torch.float32)


AWKWARD = {
    "transposed": lambda: [_storage().reshape(20, 20).t()],
    "every second": lambda: [_storage()[::2]],
    "channels last": lambda: [_storage().reshape(2, 4, 5, 10).contiguous(memory_format=torch.channels_last)],
    "overlapping": lambda: (lambda x: [x[:100], x[50:150], x[300:], x[320:330]])(_storage()),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("layout", ["as param", "contiguous", "expanded"])
def test_awkward_layouts_are_never_computed_wrongly(name, layout):
    results = []
    for options in ({"foreach": False, "fused": False}, {}):
        params = [torch.nn.Parameter(view) for view in AWKWARD[name]()]
        plain = torch.nn.Parameter(torch.ones(10))
        optimizer = DualAdam([plain, *params], lr=0.02, weight_decay=0.1, switch_rate=RATE, **options)
        for t in range(4):
            for p in (plain, *params):
                values = _numbers(p.numel(), 100 + t, torch.float32).reshape(p.shape)
                if layout == "as param":
                    p.grad = torch.empty_like(p).copy_(values)
                else:
                    p.grad = values if layout == "contiguous" else values[:1].expand(p.shape)
            optimizer.step()
        results.append([p.detach().clone() for p in (plain, *params)])
    for looped, fused in zip(*results):
        torch.testing.assert_close(fused, looped, rtol=1e-6, atol=1e-6)


def test_a_parameter_that_overlaps_itself_is_refused_as_by_torch():
    param = torch.nn.Parameter(_storage(20).expand(3, 20))
    param.grad = torch.ones(3, 20)
    with pytest.raises(RuntimeError, match="single memory location"):
        DualAdam([param]).step()


def test_overlapping_parameters_are_found():
    def found(*spans):
        return overlapping(*(array("q", column) for column in zip(*spans)))

    assert found((0, 40), (40, 40), (80, 0), (80, 4), (60, 0)) == set()
    assert found((100, 40), (0, 40), (136, 8)) == {0, 2}
    assert found((0, 400), (4, 4), (12, 4), (400, 4)) == {0, 1, 2}


def test_autograd_notices_the_update():
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    InvAdam([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "param, options, message",
    [
        (torch.ones(2, device="meta"), {}, "no kernel for meta"),
        (torch.ones(2), {"capturable": True}, "capturable"),
        (torch.ones(2).to(torch.float8_e5m2), {}, "float8_e5m2"),
    ],
)
def test_fused_that_cannot_be_honoured_is_refused(param, options, message):
    with pytest.raises(ValueError, match=f"Invalid fused: True.*{message}"):
        DualAdam([torch.nn.Parameter(param)], fused=True, **options)


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}, {"foreach": False}])
def test_other_paths_can_be_chosen(options, monkeypatch):
    params = _params((10,), torch.float32)
    optimizer = DualAdam(params, **options)
    monkeypatch.setattr(cpu, "_call", lambda *_: pytest.fail("the kernel was used"))
    _train(optimizer, params, steps=1)


def test_a_compiled_step_does_not_use_the_kernel(monkeypatch):
    params = _params((10,), torch.float32)
    optimizer = DualAdam(params)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu, "_call", lambda *_: pytest.fail("the kernel was used"))
    _train(optimizer, params, steps=1)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch's optimizers cannot step in a child forked from a GPU user"
)
def test_a_forked_child_steps_without_waiting_for_its_parents_threads(threads):
    threads(2)
    params = _params((200_000,), torch.float32)
    optimizer = DualAdam(params)
    _train(optimizer, params, steps=1)
    child = multiprocessing.get_context("fork").Process(target=optimizer.step)
    child.start()
    child.join(timeout=20)
    hung = child.is_alive()
    child.kill()
    assert not hung and child.exitcode == 0


def test_the_kernel_brings_no_openmp_runtime_of_its_own(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")

    def runtimes():
        paths = {line.split()[-1] for line in maps.read_text().splitlines()}
        return {path for path in paths if "omp" in Path(path).name}

    before = runtimes()
    copy = tmp_path / "copy.so"
    copy.write_bytes(Path(cpu.__file__).with_name("_dual_update.so").read_bytes())
    ctypes.CDLL(str(copy))
    assert before and runtimes() == before


def test_a_kernel_built_from_other_sources_is_not_used(monkeypatch, caplog):
    assert cpu.load() is not None
    monkeypatch.setattr(cpu.zlib, "crc32", lambda data: 1)
    cpu._library.cache_clear()
    cpu.load.cache_clear()
    try:
        param = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match="was not built for this version; install a C compiler"):
            DualAdam([param], fused=True)
        assert "was built from sources that have changed since" in caplog.text
        param.grad = torch.ones(3)
        DualAdam([param]).step()
        assert not torch.equal(param, torch.ones(3))
    finally:
        cpu._library.cache_clear()
        cpu.load.cache_clear()


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_states_ask_for_large_pages():
    param = torch.nn.Parameter(torch.ones(2**11, 2**12).t())
    param.grad = torch.ones_like(param)
    optimizer = DualAdam([param])
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[param][name]
        assert state.stride() == param.stride()
        assert "hg" in mapping_flags(state.data_ptr() + state.nbytes // 2)


def mapping_flags(address):
    """Linux's flags of the memory mapping that contains an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            here = begin <= address < end
        elif here and first == "VmFlags:":
            return rest.split()


def test_a_step_needs_less_than_a_mebibyte():
    params = [torch.nn.Parameter(torch.ones(10)) for _ in range(2000)]
    optimizer = DualAdam(params)
    _train(optimizer, params, steps=1)
    tracemalloc.start()
    optimizer.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.fixture
def distribute():
    """A function that shards a tensor over a mesh of one process."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(distributed, "distribute_tensor"):
        pytest.skip("needs torch 2.5: DTensor was private before")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    yield lambda x: distributed.distribute_tensor(x.detach().clone(), mesh, [distributed.Shard(0)])
    torch.distributed.destroy_process_group()


def test_shards_of_a_distributed_parameter_are_updated_in_place(kernel_only, distribute):
    whole = _params((1000,), torch.float32)[0]
    param = torch.nn.Parameter(distribute(whole))
    for p, to in ((whole, lambda x: x), (param, distribute)):
        p.grad = to(torch.full((1000,), 0.5))
        DualAdam([p], lr=0.02, weight_decay=0.1).step()
    assert torch.equal(param.to_local(), whole)


def test_shards_are_normalized_by_one_reduction_for_all_parameters(kernel_only, distribute, monkeypatch):
    whole = _params((1000, 33, 0, 70), torch.float32)
    shards = [torch.nn.Parameter(distribute(p)) for p in whole]
    reductions = []
    reduce = torch.distributed.all_reduce
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda x, **rest: reductions.append(x.shape) or reduce(x, **rest)
    )
    for params, to in ((whole, lambda x: x), (shards, distribute)):
        groups = [{"params": params[:3], "normalize_inverse": True}, {"params": params[3:]}]
        optimizer = DualAdam(groups, lr=0.02, switch_rate=0.3, fused=True)
        for t in range(3):  # the last step is Adam's
            for p in params:
                p.grad = to(_numbers(p.numel(), 100 + t, torch.float32))
            optimizer.step()
    assert reductions == [(4, 2)] * 2
    for p, own in zip(whole, shards):
        torch.testing.assert_close(own.to_local(), p.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_the_kernel_counts_on_from_a_step_count_of_any_dtype(dtype):
    results = []
    for converted in (False, True):
        params = _params((100,), torch.float32)
        optimizer = DualAdam(params, lr=0.02, switch_rate=RATE, fused=True)
        _train(optimizer, params, steps=2)
        if converted:
            state = optimizer.state[params[0]]
            state["step"] = state["step"].to(dtype).reshape(1)
        _train(optimizer, params, steps=2, start=2)
        assert optimizer.state[params[0]]["step"].item() == 4
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_moments_of_another_shape_are_refused_before_the_kernel_reads_them():
    params = _params((6,), torch.float32)
    param = torch.nn.Parameter(params[0].detach().reshape(3, 2))
    optimizer = DualAdam([param], fused=True)
    _train(optimizer, [param], steps=1)
    before = param.detach().clone()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][name] = optimizer.state[param][name].reshape(2, 3)
        with pytest.raises(RuntimeError, match=rf"{name} has shape \(2, 3\)"):
            optimizer.step()
        optimizer.state[param][name] = optimizer.state[param][name].reshape(3, 2)
    assert torch.equal(param, before)


@pytest.mark.parametrize("count", [1, 3])
def test_many_large_tensors_are_normalized_each_by_its_own_norms(count, threads):
    """Updates of one tensor and norms of the next run side by side, in tensors of several chunks and of one."""
    threads(count)
    sizes = (2**15 + 1, 5, 2**17, 1000, 2**16 + 77, 3, 2**15)
    params, alone = _params(sizes, torch.float32), _params(sizes, torch.float32)
    _train(DualAdam(params, lr=0.02, normalize_inverse=True, switch_rate=RATE), params, steps=2)
    for p in alone:
        _train(DualAdam([p], lr=0.02, normalize_inverse=True, switch_rate=RATE), [p], steps=2)
    assert all(torch.equal(a, b) for a, b in zip(params, alone))
