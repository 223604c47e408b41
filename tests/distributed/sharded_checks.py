"""DTensor parameters: FSDP2, tensor parallelism, sharded state dicts, compared with one process (two_processes.py)."""

import copy
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_dualadam import DualAdam, InvAdam
from hf_dualadam.diagnostics import inverse_statistics
from hf_dualadam.kernels import cpu

PATHS = {"single": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "default": {}}
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "switch_rate": 0.15}
STEPS = 9  # alpha reaches 0 at step 6


class Net(torch.nn.Module):
    """Odd sizes, so that no tensor splits evenly, and one tensor with fewer rows than processes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.down = torch.nn.Linear(7, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x)))) * self.scale


def groups(model):
    """Groups like Trainer's: weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": matrices},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    return model


def train(model, optimizer, first=0, last=STEPS, world=1, rank=0):
    """Steps on this process's share of batches that are the same for every world size."""
    for step in range(first, last):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))[rank * 8 // world :][: 8 // world]
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).pow(2).mean().backward()
        optimizer.step()
    return model


def train_sharded(model, optimizer, first=0, last=STEPS):
    return train(model, optimizer, first, last, dist.get_world_size(), dist.get_rank())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model, reference, **tolerance):
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(a), whole(b), **tolerance)


def single(steps=STEPS, cls=DualAdam, **options):
    model = Net()
    optimizer = cls(groups(model), **{**OPTIONS, **PATHS["single"], **options})
    return train(model, optimizer, 0, steps), optimizer


def check_fsdp2_equals_one_process():
    for normalize in (False, True):
        reference, _ = single(normalize_inverse=normalize)
        for path in PATHS.values():
            model = shard(Net())
            optimizer = DualAdam(groups(model), normalize_inverse=normalize, **OPTIONS, **path)
            assert_same(train_sharded(model, optimizer), reference)


def check_fsdp2_invadam_equals_one_process():
    options = {"lr": 0.02, "weight_decay": 0.1, "normalize_inverse": True}
    reference = Net()
    train(reference, InvAdam(reference.parameters(), **options))
    model = shard(Net())
    assert_same(train_sharded(model, InvAdam(model.parameters(), **options)), reference)


def check_fused_kernel_updates_local_shards():
    if cpu.load() is None:
        return  # no compiler here: fused=True is refused at construction, which test_optimizer.py covers
    taken = []
    run = cpu.Part.run
    cpu.Part.run = lambda part, found, groups: taken.append(len(found.params)) or run(part, found, groups)
    try:
        for normalize in (False, True):
            model = shard(Net())
            optimizer = DualAdam(groups(model), fused=True, normalize_inverse=normalize, **OPTIONS)
            train_sharded(model, optimizer)
            # A tensor with fewer rows than processes leaves an empty shard on one of them.
            assert taken == [len(list(model.parameters()))] * STEPS, taken
            assert_same(model, single(normalize_inverse=normalize)[0])
            taken.clear()
    finally:
        cpu.Part.run = run


def check_the_inverse_part_is_scaled_by_the_whole_tensors_norm():
    # Process 0 holds large gradients, process 1 small ones: shard norms would give other factors.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    grad = torch.tensor([[100.0, 50.0], [0.01, 0.02]])
    for path in PATHS.values():
        plain = torch.nn.Parameter(torch.zeros(2, 2))
        sharded = torch.nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]))
        plain.grad, sharded.grad = grad.clone(), distribute_tensor(grad, mesh, [Shard(0)])
        for param in (plain, sharded):
            InvAdam([param], lr=1.0, eps=0.0, normalize_inverse=True, **path).step()
        torch.testing.assert_close(whole(sharded), plain)
        inverse = grad.abs() * grad  # the first step's m^*d, and Adam's m^/d is 1 everywhere
        torch.testing.assert_close(whole(sharded), -inverse * (4**0.5 / inverse.norm()))


def check_logged_figures_are_of_whole_tensors():
    for normalize in (False, True):
        _, plain = single(3, normalize_inverse=normalize)
        model = shard(Net())
        optimizer = DualAdam(groups(model), normalize_inverse=normalize, **OPTIONS)
        train_sharded(model, optimizer, 0, 3)
        expected, measured = (torch.tensor(inverse_statistics(o)) for o in (plain, optimizer))
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-6)


def check_plain_tensors_and_dtensors_of_several_meshes_in_one_list():
    line = init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    places = [
        ((5, 3), None),
        ((7, 4), (line, [Shard(0)])),
        ((3, 6), (line, [Shard(1)])),
        ((4,), (line, [Replicate()])),
        ((4, 4), (grid, [Shard(0), Shard(1)])),
        ((1,), (line, [Shard(0)])),
    ]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape, _ in places]
    grads = [[torch.randn(shape, generator=generator) for shape, _ in places] for _ in range(STEPS)]
    for dtype in (torch.float32, torch.bfloat16):
        for normalize in (False, True):
            for path in (*PATHS.values(), {"capturable": True}):
                plain = [torch.nn.Parameter(start.to(dtype)) for start in starts]
                placed = [torch.nn.Parameter(_place(s.to(dtype), place)) for s, (_, place) in zip(starts, places)]
                reference = DualAdam(plain, normalize_inverse=normalize, **OPTIONS, **PATHS["single"])
                optimizer = DualAdam(placed, normalize_inverse=normalize, **OPTIONS, **path)
                for step in grads:
                    for p, q, grad, (_, place) in zip(plain, placed, step, places):
                        p.grad, q.grad = grad.to(dtype), _place(grad.to(dtype), place)
                    reference.step()
                    optimizer.step()
                for p, q in zip(plain, placed):
                    torch.testing.assert_close(whole(q), p)


def _place(tensor, place):
    return distribute_tensor(tensor, *place) if place else tensor.clone()


def check_tensor_parallel_equals_one_process():
    mesh = init_device_mesh("cpu", (2,))
    for normalize in (False, True):
        reference, _ = single(normalize_inverse=normalize)
        for path in PATHS.values():
            model = Net()
            # The columns of `up` are split, but gathered again before the norm, which is a plain tensor like `scale`.
            parallelize_module(
                model,
                mesh,
                {
                    "up": ColwiseParallel(output_layouts=Replicate()),
                    "down": RowwiseParallel(input_layouts=Replicate()),
                },
            )
            assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
            optimizer = DualAdam(groups(model), normalize_inverse=normalize, **OPTIONS, **path)
            assert_same(train(model, optimizer), reference)


def check_gradients_missing_at_first():
    reference, sharded = Net(), shard(Net())
    optimizers = [DualAdam(groups(m), **OPTIONS, **PATHS["single"]) for m in (reference, sharded)]
    for first, last in ((0, 3), (3, STEPS)):
        for model, optimizer, run in zip((reference, sharded), optimizers, (train, train_sharded)):
            model.up.weight.requires_grad_(first > 0)
            run(model, optimizer, first, last)
    assert_same(sharded, reference)
    assert optimizers[1].state[sharded.up.weight]["step"].item() == STEPS - 3


def check_full_state_dict_goes_to_one_process_and_back():
    """A run continues from FSDP2's full state dict (the torch.save format) in one process, and vice versa in two."""
    straight, _ = single()
    model = shard(Net())
    optimizer = DualAdam(groups(model), **OPTIONS)
    train_sharded(model, optimizer, 0, 4)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = (
        get_model_state_dict(model, options=full),
        get_optimizer_state_dict(model, optimizer, options=full),
    )
    if dist.get_rank() == 0:
        alone = Net()
        alone.load_state_dict(weights)
        resumed = DualAdam(groups(alone), **OPTIONS)
        set_optimizer_state_dict(alone, resumed, copy.deepcopy(state), options=_local())
        assert_same(train(alone, resumed, 4), straight)
    middle, plain = single(4)
    again = shard(Net())
    resumed = DualAdam(groups(again), **OPTIONS)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    is_first = dist.get_rank() == 0
    set_model_state_dict(again, middle.state_dict() if is_first else {}, options=spread)
    state = copy.deepcopy(get_optimizer_state_dict(middle, plain, options=_local()))
    set_optimizer_state_dict(again, resumed, state if is_first else {}, options=spread)
    assert_same(train_sharded(again, resumed, 4), straight)


def _local():
    return StateDictOptions(full_state_dict=False)


def check_sharded_checkpoint_reshards_between_two_and_one_process(folder):
    for normalize in (False, True):
        options = {**OPTIONS, "normalize_inverse": normalize}
        straight, _ = single(normalize_inverse=normalize)
        model = shard(Net())
        optimizer = DualAdam(groups(model), **options)
        train_sharded(model, optimizer, 0, 4)
        two, one = folder / f"two-{normalize}", folder / f"one-{normalize}"
        dcp.save(_states(model, optimizer), checkpoint_id=two)

        again = shard(Net())  # 2 -> 2
        resumed = DualAdam(groups(again), **options)
        _load(again, resumed, two)
        assert_same(train_sharded(again, resumed, 4), train_sharded(model, optimizer, 4), rtol=0, atol=0)
        assert_same(again, straight)

        if dist.get_rank() == 0:  # 2 -> 1 -> file
            alone = Net()
            optimizer = DualAdam(groups(alone), **options)
            _load(alone, optimizer, two, no_dist=True)
            train(alone, optimizer, 4, 6)
            dcp.save(_states(alone, optimizer), checkpoint_id=one, no_dist=True)
            assert_same(train(alone, optimizer, 6), straight)
        dist.barrier()
        again = shard(Net())  # 1 -> 2
        resumed = DualAdam(groups(again), **options)
        _load(again, resumed, one)
        assert_same(train_sharded(again, resumed, 6), straight)
        state = resumed.state[again.up.weight]
        assert state["step"].item() == STEPS and isinstance(state["exp_avg"], DTensor)


def _states(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _load(model, optimizer, folder, **options):
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=folder, **options)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"])


def check_half_precision_state_keeps_its_dtype_through_a_sharded_checkpoint(folder):
    model = shard(Net(torch.float16))
    optimizer = DualAdam(model.parameters(), **OPTIONS)
    train_sharded(model, optimizer, 0, 4)
    dcp.save(_states(model, optimizer), checkpoint_id=folder)
    again = shard(Net(torch.float16))
    resumed = DualAdam(again.parameters(), **OPTIONS)
    _load(again, resumed, folder)
    assert all(resumed.state[p]["exp_avg_sq"].dtype == torch.float32 for p in again.parameters())
    assert_same(train_sharded(again, resumed, 4), train_sharded(model, optimizer, 4), rtol=0, atol=0)


def check_fsdp1_equals_one_process_and_resumes():
    plain = Net()
    train(plain, DualAdam(plain.parameters(), **OPTIONS))
    for use_orig_params in (True, False):
        model = _fsdp1(use_orig_params)
        optimizer = DualAdam(model.parameters(), **OPTIONS)
        train_sharded(model, optimizer, 0, 4)
        state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        again = _fsdp1(use_orig_params)
        again.load_state_dict(model.state_dict())
        resumed = DualAdam(again.parameters(), **OPTIONS)
        resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, resumed, state))
        train_sharded(again, resumed, 4)
        with FullyShardedDataParallel.state_dict_type(again, StateDictType.FULL_STATE_DICT):
            for name, tensor in again.state_dict().items():
                torch.testing.assert_close(tensor, plain.state_dict()[name])


def _fsdp1(use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates FSDP1
        model = FullyShardedDataParallel(Net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        # Not the full state dict: torch 2.13 mixes up the moments when it loads that with use_orig_params on a CPU,
        # AdamW's too.
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
        return model


def check_whole_norms_are_refused_where_fsdp1_has_flattened():
    for use_orig_params in (True, False):
        model = _fsdp1(use_orig_params)
        optimizer = DualAdam(model.parameters(), normalize_inverse=True, **OPTIONS)
        before = [p.detach().clone() for p in model.parameters()]
        try:
            train_sharded(model, optimizer, 0, 1)
        except RuntimeError as error:
            assert "normalize_inverse needs whole tensors" in str(error)
        else:
            raise AssertionError("norms of FSDP1's shards were taken for norms of tensors")
        assert all(map(torch.equal, before, model.parameters()))
