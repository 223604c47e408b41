"""The CUDA kernel's numbers, in Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", "3.2", reason="needs Triton 3.2")

CHECKS = [str(Path(__file__).with_name(name)) for name in ("triton_checks.py", "triton_state_checks.py")]


def _run_checks(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_checks_pass_in_the_interpreter():
    assert "passed" in _run_checks(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_checks_pass_on_a_gpu():
    assert "passed" in _run_checks(TRITON_INTERPRET="0")
