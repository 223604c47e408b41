"""One-pass kernels of the update in :mod:`hf_dualadam.functional`: a C source for the CPU, Triton for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu
from .batches import Batches


def unavailable_reason(param: Tensor, group: dict[str, Any]) -> str | None:
    """Say why no kernel can update ``param`` with the options of ``group``, or None if one can."""
    if param.device.type == "cpu":
        return cpu.unavailable_reason(param, group)
    if param.device.type == "cuda":
        from . import cuda  # imports Triton

        return cuda.unavailable_reason(param, group)
    hint = " Materialize the parameters first, or leave fused=None." if param.device.type == "meta" else ""
    return f"there is no kernel for {param.device.type}.{hint}"


def update(batches: Batches) -> Batches:
    """Count the step and update every tensor that a kernel can take and whose group does not disable kernels.

    Args:
        batches: per parameter group its options and its (param, grad, state) items.

    Returns:
        The batches that no kernel can update, in the same form.
    """
    if torch.compiler.is_compiling():
        return batches
    left: Batches = []
    chosen: Batches = []
    for group, items in batches:
        allowed = group["fused"] or (group["fused"] is None and group["foreach"] is None)
        (chosen if allowed else left).append((group, items))
    if torch.cuda.is_initialized():
        from . import cuda

        chosen = cuda.update(chosen)
    return left + cpu.update(chosen)
