"""Tests never use the network, and each worker uses one core unless a test asks for more."""

import logging
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def logging_as_before():
    """Restore the package's logging, which programs that run within the test process change."""
    ours = logging.getLogger("hf_dualadam")
    before = ours.level, ours.propagate, list(ours.handlers)
    yield
    ours.setLevel(before[0])
    ours.propagate, ours.handlers[:] = before[1:]
