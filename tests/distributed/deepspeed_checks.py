"""DeepSpeed's ZeRO on two processes, compared with Trainer on one. See two_processes.py."""

import os
from unittest import mock

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from trainer_checks import RESULTS, assert_same, one_process, train

from hf_dualadam import DualAdam
from hf_dualadam.trainer.callback import _unwrap

ARGS = {"optim_args": "switch_fraction=0.8", "max_grad_norm": 5.0}
CPU = {"device": "cpu"}


def train_zero(folder, stage, zero=None, settings=None, **options):
    """A run of Trainer with ZeRO on gloo; by default, accelerate finds no backend for it without an accelerator."""
    gloo = mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage, **(zero or {})}, **dict.fromkeys(auto, "auto"), **(settings or {})}
    with gloo, mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"):
        trainer = train(folder, use_cpu=False, deepspeed=config, **options)
    assert type(_unwrap(trainer.optimizer)[1]).__module__.startswith("deepspeed.runtime.zero")
    assert type(_unwrap(trainer.optimizer)[-1]) is DualAdam
    return trainer


def alone(folder):
    with one_process():
        return train(folder, world=1, **ARGS)


def check_zero_1_2_and_3_equal_one_process(folder):
    one = alone(folder / "one")
    for stage in (1, 2, 3):
        two = train_zero(folder / str(stage), stage, **ARGS)
        assert_same(two, one)
        if stage < 3:  # between the steps of ZeRO-3, the optimizer holds no parameters to measure
            for mine, theirs in zip(two.state.log_history, one.state.log_history):
                for name in RESULTS:
                    torch.testing.assert_close(mine.get(name), theirs.get(name), rtol=1e-4, atol=1e-7)


def check_zero_resumes_bit_for_bit(folder):
    for stage in (1, 2, 3):
        straight = train_zero(folder / f"straight-{stage}", stage, **ARGS)
        cut = folder / f"cut-{stage}"
        train_zero(cut, stage, save_strategy="steps", save_steps=5, **ARGS)
        resumed = train_zero(cut, stage, resume=str(cut / "checkpoint-5"), **ARGS)
        assert_same(resumed, straight, rtol=0, atol=0)


def check_offloaded_states_equal_one_process(folder):
    one = alone(folder / "one")
    own = {"zero_force_ds_cpu_optimizer": False}
    for stage, zero in ((2, {}), (3, {"offload_param": CPU})):
        two = train_zero(folder / str(stage), stage, {"offload_optimizer": CPU, **zero}, own, **ARGS)
        assert_same(two, one)


def check_bfloat16_under_zero_stays_close(folder):
    one = alone(folder / "one")
    with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
        two = train_zero(folder / "two", 2, settings={"bf16": {"enabled": True}}, bf16=True, **ARGS)
    for a, b in zip(two.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.01, atol=0.01)


def check_whole_norms_are_refused(folder):
    for stage in (1, 2, 3):
        try:
            train_zero(folder, stage, optim_args="normalize_inverse=true")
        except RuntimeError as error:
            assert "normalize_inverse needs whole tensors" in str(error), error
        else:
            raise AssertionError("norms of ZeRO's flat parts were taken for norms of tensors")


def check_a_replaced_optimizer_stops_the_run(folder):
    """Accelerate replaces any optimizer by DeepSpeedCPUAdam when states are offloaded, unless that is disabled."""
    try:
        train_zero(folder, 2, {"offload_optimizer": CPU}, **ARGS)
    except RuntimeError as error:
        assert "has replaced DualAdam by DeepSpeedCPUAdam" in str(error), error
    else:
        raise AssertionError("trained with DeepSpeed's Adam in the place of DualAdam")
