"""8-bit moments, corrected weights and gradient release on two processes, bit for bit. See two_processes.py.

Both processes and one alone get the same gradients, so that nothing but the optimizer can differ.
"""

import copy
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_checks import _load, _states, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_dualadam import DualAdam, release_gradients
from hf_dualadam.precision import master_state_dict

PATHS = {"single": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "default": {}}
EIGHT = {"lr": 0.01, "weight_decay": 0.1, "switch_rate": 0.2, "state_bits": 8}
LEAN = {**EIGHT, "master_weight_bits": 24}
STEPS = 6


class Net(torch.nn.Module):
    """Rows of odd number and odd length, and a vector that keeps 32 bits."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(130, 67)
        self.down = torch.nn.Linear(67, 81)
        self.to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    return model


def train(model, optimizer, first=0, last=STEPS):
    """Take steps with gradients that are the same on every process."""
    for step in range(first, last):
        for index, p in enumerate(model.parameters()):
            noise = torch.Generator().manual_seed(100 * step + index)
            grad = (torch.randn(p.shape, generator=noise) * torch.logspace(-4, 1, p.shape[-1])).to(p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
    return optimizer


def assert_same_bits(model, optimizer, reference, reference_optimizer):
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(whole(p), q)
        state, expected = optimizer.state[p], reference_optimizer.state[q]
        assert state.keys() == expected.keys()
        for key in state:
            assert state[key].dtype == expected[key].dtype, key
            assert torch.equal(_gathered(state[key]), expected[key]), key


def _gathered(tensor):
    """The whole tensor; gloo and NCCL do not support 16-bit integers."""
    return whole(tensor.int()).short() if tensor.dtype == torch.int16 else whole(tensor)


def alone(steps=STEPS, options=LEAN, **paths):
    model = Net(torch.bfloat16 if "master_weight_bits" in options else torch.float32)
    return model, train(model, DualAdam(model.parameters(), **options, **paths), 0, steps)


def check_shards_hold_what_one_process_holds():
    for options in (EIGHT, LEAN, {**LEAN, "master_weight_bits": 32}, {**LEAN, "state_bits": 32}):
        for path in PATHS.values():
            reference = alone(options=options, **path)
            model = shard(Net(reference[0].up.weight.dtype))
            optimizer = train(model, DualAdam(model.parameters(), **options, **path))
            assert_same_bits(model, optimizer, *reference)
            moments = zip(optimizer.moments(model.up.weight), reference[1].moments(reference[0].up.weight))
            assert all(torch.equal(whole(a), b) for a, b in moments)
            weight = reference[1].master_weights(reference[0].up.weight)
            assert torch.equal(whole(optimizer.master_weights(model.up.weight)), weight)
            assert torch.equal(whole(master_state_dict(model, optimizer)["up.weight"]), weight)
    assert optimizer.state[model.up.weight].keys() >= {"weight_correction"}


def check_whole_norms_with_coded_shards():
    reference, plain = alone(options={**LEAN, "normalize_inverse": True}, **PATHS["single"])
    for path in PATHS.values():
        model = shard(Net())
        optimizer = train(model, DualAdam(model.parameters(), normalize_inverse=True, **LEAN, **path))
        for p, q in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(
                whole(optimizer.master_weights(p)), plain.master_weights(q), rtol=1e-2, atol=1e-3
            )


def check_sharded_checkpoint_reshards_between_two_and_one_process(folder):
    for bits in (24, 32):
        _reshard(folder / str(bits), {**LEAN, "master_weight_bits": bits})


def _reshard(folder, options):
    straight = alone(options=options)
    model = shard(Net())
    optimizer = train(model, DualAdam(model.parameters(), **options), 0, 2)
    dcp.save(_states(model, optimizer), checkpoint_id=folder / "two")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The loaded state|While loading")
        again = shard(Net())  # 2 -> 2
        resumed = DualAdam(again.parameters(), **options)
        _load(again, resumed, folder / "two")
        assert_same_bits(again, train(again, resumed, 2), *straight)
        if dist.get_rank() == 0:  # 2 -> 1 -> file
            one = Net()
            optimizer = DualAdam(one.parameters(), **options)
            _load(one, optimizer, folder / "two", no_dist=True)
            train(one, optimizer, 2, 4)
            dcp.save(_states(one, optimizer), checkpoint_id=folder / "one", no_dist=True)
            assert_same_bits(one, train(one, optimizer, 4), *straight)
        dist.barrier()
        again = shard(Net())  # 1 -> 2
        resumed = DualAdam(again.parameters(), **options)
        _load(again, resumed, folder / "one")
        assert_same_bits(again, train(again, resumed, 4), *straight)


def check_full_state_dict_goes_to_one_process_and_back():
    straight = alone()
    model = shard(Net())
    optimizer = train(model, DualAdam(model.parameters(), **LEAN), 0, 3)
    whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=whole_state)
    weights = {name: whole(p) for name, p in model.state_dict().items()}
    if dist.get_rank() == 0:
        one = Net()
        one.load_state_dict(weights)
        resumed = DualAdam(one.parameters(), **LEAN)
        set_optimizer_state_dict(one, resumed, copy.deepcopy(state), options=StateDictOptions())
        assert_same_bits(one, train(one, resumed, 3), *straight)
    middle, plain = alone(3)
    again = shard(Net())
    resumed = DualAdam(again.parameters(), **LEAN)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    is_first = dist.get_rank() == 0
    set_model_state_dict(again, middle.state_dict() if is_first else {}, options=spread)
    state = copy.deepcopy(get_optimizer_state_dict(middle, plain, options=StateDictOptions()))
    set_optimizer_state_dict(again, resumed, state if is_first else {}, options=spread)
    assert_same_bits(again, train(again, resumed, 3), *straight)


def check_states_change_format_from_a_sharded_checkpoint(folder):
    model = shard(Net(torch.float32))
    optimizer = train(model, DualAdam(model.parameters(), **{**EIGHT, "state_bits": 32}), 0, 2)
    moments = [whole(m) for m in optimizer.moments(model.up.weight)]
    again = DualAdam(model.parameters(), **EIGHT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(caught) == 1 and "rounded" in str(caught[0].message)
    assert again.state[model.up.weight]["exp_avg"].dtype == torch.int8
    for exact, coded in zip(moments, again.moments(model.up.weight)):
        assert (whole(coded) - exact).norm() < 0.05 * exact.norm()


def check_parameters_that_are_split_elsewhere_keep_32_bits():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.randn(80, 200, generator=torch.Generator().manual_seed(0))
    for dim, dtype in ((0, torch.int8), (1, torch.float32)):
        param = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(dim)]))
        param.grad = distribute_tensor(values, mesh, [Shard(dim)])
        optimizer = DualAdam([param], **EIGHT)
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].dtype == dtype


def check_ddp_holds_the_same_bits_on_all_processes():
    model = Net()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = DualAdam(model.parameters(), **LEAN)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        parallel(torch.randn(8, 130, generator=generator).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p in model.parameters():
        for tensor in (p.detach(), *optimizer.state[p].values()):
            others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(others, tensor.contiguous())
            assert all(torch.equal(tensor, other) for other in others)


def check_released_gradients_equal_ordinary_steps_under_fsdp2():
    for options in ({**LEAN, "normalize_inverse": False}, {"lr": 0.01, "switch_rate": 0.3}):
        runs = []
        for released in (False, True):
            model = shard(Net())
            optimizer = DualAdam(model.parameters(), **options)
            if released:
                release_gradients(model, optimizer)
            for step in range(4):
                generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
                model(torch.randn(8, 130, generator=generator).bfloat16()).float().square().mean().backward()
                assert all((p.grad is None) == released for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
            runs.append([whole(optimizer.master_weights(p)) for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*runs))


def check_release_is_refused_where_gradients_come_from_other_processes():
    model = Net()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    sharded = shard(Net())
    for module, options, reason in (
        (parallel, {}, "DDP"),
        (model, {}, "several processes train plain tensors"),
        (sharded, {"normalize_inverse": True}, "normalize_inverse"),
    ):
        try:
            release_gradients(module, DualAdam(module.parameters(), **options))
        except ValueError as error:
            assert reason in str(error) and "\n" not in str(error)
        else:
            raise AssertionError(f"{reason} was accepted")
