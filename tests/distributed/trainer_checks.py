"""Trainer and accelerate on two processes, compared with Trainer on one. See two_processes.py."""

import contextlib
import os
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_dualadam import DualAdam

RESULTS = ("alpha", "inverse_share", "inverse_rms_ratio")


class Net(torch.nn.Module):
    """A regression that Trainer can run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(4, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.down = torch.nn.Linear(7, 1)

    def forward(self, x, labels=None):
        logits = self.down(torch.tanh(self.norm(self.up(x)))).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


def data(rows=48):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": a, "labels": b} for a, b in zip(x, (x**2).sum(1))]


@contextlib.contextmanager
def one_process():
    """Trainer as in a single process; both processes do the same work."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    _forget()
    with mock.patch.dict(os.environ, alone, clear=True):
        yield
    _forget()


def _forget():
    """Make the next Accelerator read its environment again."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(folder, world=2, resume=None, **options):
    """A run with a global batch of 8 examples."""
    defaults = {
        "output_dir": str(folder),
        "optim": "dualadam",
        "per_device_train_batch_size": 8 // world // options.get("gradient_accumulation_steps", 1),
        "max_steps": 12,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }
    _forget()
    trainer = Trainer(Net(), TrainingArguments(**{**defaults, **options}), train_dataset=data())
    assert trainer.args.world_size == world
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(trainer, reference, **tolerance):
    for a, b in zip(trainer.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def check_ddp_equals_one_process(folder):
    for options in (
        {"optim_args": "switch_fraction=0.5"},
        {"optim_args": "switch_rate=0.1,normalize_inverse=true", "max_grad_norm": 0.5},
        {"optim": "invadam", "optim_args": "normalize_inverse=true", "gradient_accumulation_steps": 2},
        {"optim_args": "switch_rate=0.1,foreach=true", "max_grad_norm": 0.0},
    ):
        two = train(folder, **options)
        assert type(two.optimizer.optimizer).__name__ in ("DualAdam", "InvAdam")
        with one_process():
            one = train(folder, world=1, **options)
        assert_same(two, one)
        groups = [trainer.optimizer.optimizer.param_groups[0] for trainer in (two, one)]
        assert groups[0]["switch_rate"] == groups[1]["switch_rate"]
        for mine, theirs in zip(two.state.log_history, one.state.log_history):
            assert mine.keys() == theirs.keys()
            for name in RESULTS:
                torch.testing.assert_close(mine.get(name), theirs.get(name), rtol=1e-4, atol=1e-7)


def check_processes_hold_the_same_weights(folder):
    trainer = train(folder, optim_args="switch_rate=0.1,normalize_inverse=true")
    for param in trainer.model.parameters():
        copies = [torch.empty_like(param) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, param.detach())
        assert torch.equal(*copies)


def check_ddp_resumes_in_two_and_in_one_process(folder):
    options = {"optim_args": "switch_fraction=0.8,normalize_inverse=true"}
    straight = train(folder / "straight", **options)
    train(folder / "cut", save_strategy="steps", save_steps=5, **options)
    checkpoint = str(folder / "cut" / "checkpoint-5")
    assert_same(train(folder / "cut", resume=checkpoint, **options), straight, rtol=0, atol=0)
    with one_process():
        assert_same(train(folder / "alone", world=1, resume=checkpoint, **options), straight)


def check_accelerate_loop_saves_and_resumes(folder):
    straight = _loop(_ddp_accelerator())
    _loop(_ddp_accelerator(), last=5, save=folder)
    resumed = _loop(_ddp_accelerator(), first=5, load=folder)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def _ddp_accelerator():
    _forget()
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    return accelerator


def _loop(accelerator, first=0, last=10, save=None, load=None):
    """Train in a loop with accelerate; return the model."""
    model = Net()
    optimizer = DualAdam(model.parameters(), lr=1e-2, switch_rate=0.1, normalize_inverse=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if load:
        accelerator.load_state(load)
    for step in range(first, last):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(2 * step + accelerator.process_index))
        accelerator.backward(model(x, x.sum(1))["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if save:
        accelerator.save_state(save)
    return model


def check_accelerates_fsdp2_equals_ddp_and_resumes(folder):
    ddp = [p.detach().clone() for p in _loop(_ddp_accelerator()).parameters()]
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        straight = _loop(_fsdp2_accelerator(kind))
        assert all(isinstance(p, DTensor) for p in straight.parameters())
        for a, b in zip(straight.parameters(), ddp, strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
        _loop(_fsdp2_accelerator(kind), last=5, save=folder / kind)
        resumed = _loop(_fsdp2_accelerator(kind), first=5, load=folder / kind)
        for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=0, atol=0)
    _forget()


def _fsdp2_accelerator(kind):
    _ddp_accelerator()
    _force_fsdp2(kind)
    accelerator = Accelerator(cpu=True)
    assert accelerator.is_fsdp2
    return accelerator


def _force_fsdp2(kind):
    """Make accelerate use FSDP2 with gloo; by default, it does so only on accelerators and uses DDP on CPUs."""
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=kind,
        auto_wrap_policy="size_based_wrap",
        min_num_params=20,
        cpu_ram_efficient_loading=False,
    )
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP


def check_trainer_with_fsdp2_equals_one_process_and_resumes(folder):
    for normalize in ("true", "false"):
        options = {"optim_args": f"switch_fraction=0.8,normalize_inverse={normalize}"}
        with one_process():
            one = train(folder / "one", world=1, **options)
        straight = _train_fsdp2(folder / "straight", **options)
        for a, b in zip(straight.model.parameters(), one.model.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
        for mine, theirs in zip(straight.state.log_history, one.state.log_history):
            for name in RESULTS:
                torch.testing.assert_close(mine.get(name), theirs.get(name), rtol=1e-4, atol=1e-7)
        _train_fsdp2(folder / "cut", save_strategy="steps", save_steps=5, **options)
        resumed = _train_fsdp2(folder / "cut", resume=str(folder / "cut" / "checkpoint-5"), **options)
        for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=0, atol=0)


def _train_fsdp2(folder, **options):
    with mock.patch.object(Accelerator, "__init__", _as_fsdp2(Accelerator.__init__)):
        return train(folder, **options)


def _as_fsdp2(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        _force_fsdp2("FULL_STATE_DICT")
        original(self, *args, **kwargs)

    return __init__
