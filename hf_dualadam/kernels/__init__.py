"""One-pass kernels of the update in :mod:`hf_dualadam.functional`: a C source for the CPU, Triton for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu


def unavailable_reason(param: Tensor, group: dict[str, Any]) -> str | None:
    """Say why no kernel can update ``param`` with the options of ``group``, or None if one can."""
    if param.device.type == "cpu":
        return cpu.unavailable_reason(param, group)
    if param.device.type == "cuda":
        from . import cuda  # imports Triton

        return cuda.unavailable_reason(param, group)
    return f"there is no kernel for {param.device.type}."


def update(batches: list[tuple[dict[str, Any], list[tuple[Tensor, ...]]]]):
    """Count the step and update every tensor that a kernel can take and whose group does not forbid it.

    Args:
        batches: per parameter group its options and its (param, grad, exp_avg, exp_avg_sq, step) tuples.

    Returns:
        What is left, in the same form.
    """
    if torch.compiler.is_compiling():
        return batches
    left, chosen = [], []
    for group, tensors in batches:
        (chosen if group["fused"] or group["fused"] is group["foreach"] is None else left).append((group, tensors))
    if torch.cuda.is_initialized():
        from . import cuda

        chosen = cuda.update(chosen)
    return left + cpu.update(chosen)
