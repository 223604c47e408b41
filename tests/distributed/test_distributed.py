"""Two gloo processes compared with one; two_processes.py launches them."""

import importlib.util

import pytest
from two_processes import checks, outcomes


@pytest.mark.parametrize("check", checks("sharded_checks"))
def test_sharded_parameters(check):
    result = outcomes("sharded_checks")[check]
    assert result == "ok", result


@pytest.mark.parametrize("check", checks("state_checks"))
def test_states_in_fewer_bits(check):
    result = outcomes("state_checks")[check]
    assert result == "ok", result


@pytest.mark.parametrize("check", checks("trainer_checks"))
def test_trainer_and_accelerate(check):
    result = outcomes("trainer_checks", launcher="torchrun", ACCELERATE_USE_CPU="true")[check]
    assert result == "ok", result


@pytest.mark.parametrize("check", checks("finetuning_checks"))
def test_finetuning(check):
    result = outcomes("finetuning_checks", launcher="torchrun", ACCELERATE_USE_CPU="true")[check]
    assert result == "ok", result


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("check", checks("deepspeed_checks"))
def test_deepspeed(check):
    result = outcomes("deepspeed_checks", DS_ACCELERATOR="cpu")[check]
    assert result == "ok", result
