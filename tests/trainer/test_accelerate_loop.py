"""scripts/accelerate_loop.py: mixed precision and gradient accumulation with DualAdam in a plain loop."""

import pytest
from accelerate.state import AcceleratorState, GradientState
from tiny import load_script

from hf_dualadam import DualAdam

BATCHES = 23  # 1,437 images in batches of 64


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the precision of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(("precision", "accumulation", "steps"), [("no", 1, 3 * BATCHES), ("bf16", 2, 3 * 12)])
def test_loop_learns_and_steps_once_per_group_of_batches(precision, accumulation, steps, capsys):
    accuracy, optimizer = load_script("accelerate_loop").main(
        ["--mixed_precision", precision, "--gradient_accumulation_steps", str(accumulation), "--epochs", "3", "--cpu"]
    )
    assert type(optimizer.optimizer) is DualAdam
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
    assert optimizer.param_groups[0]["switch_rate"] == pytest.approx(1 / (0.16 * steps))
    assert accuracy > 0.8  # guessing one digit gives 0.1
    assert f"held-out accuracy {accuracy:.4f}" in capsys.readouterr().out
