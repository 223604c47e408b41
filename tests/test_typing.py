"""A user's file that calls the optimizers passes `mypy --strict`; one with a wrong argument does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER_FILE = """
import torch
from hf_dualadam import DualAdam, InvAdam, register
from hf_dualadam.diagnostics import InverseStatistics, inverse_statistics

model = torch.nn.Linear(2, 2)
dual = DualAdam(
    model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, switch_rate=1e-3, foreach=True
)
groups: list[torch.optim.Optimizer] = [
    InvAdam([{"params": [model.weight], "lr": 1e-2}, {"params": [model.bias]}], fused=False),
    InvAdam(model.named_parameters(), lr=torch.tensor(1e-2), maximize=True),
]


def closure() -> torch.Tensor:
    return model(torch.ones(2)).sum()  # type: ignore[no-any-return]


dual.step()
loss: float | torch.Tensor | None = dual.step(closure)
scheduler = torch.optim.lr_scheduler.LinearLR(dual)
figures: InverseStatistics | None = inverse_statistics(dual)
dual.load_state_dict(dual.state_dict())
register()
"""
MISTAKES = """
DualAdam(model.parameters(), switch_rate="fast")
DualAdam(model.parameters(), switch_rat=0.1)
InvAdam(model.parameters(), betas=0.9)
loss = groups
"""


def test_a_users_file_is_strictly_typed(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER_FILE)
    (tmp_path / "mistaken.py").write_text(USER_FILE + MISTAKES)
    # Check the package as if installed: its types are used, but errors inside it are not reported to the user.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py", "mistaken.py"]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    wrong_lines = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error:" in line]
    first = USER_FILE.count("\n") + 2
    assert wrong_lines == [["mistaken.py", str(line)] for line in range(first, first + 4)], done.stdout
