"""One-pass kernels of the update in :mod:`hf_dualadam.functional`: a C source for the CPU, Triton for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu
from .plan import Batches as Batches
from .plan import Plan as Plan


def unavailable_reason(param: Tensor, group: dict[str, Any]) -> str | None:
    """Say why no kernel can update ``param`` with the options of ``group``, or None if one can."""
    if param.device.type == "cpu":
        return cpu.unavailable_reason(param, group)
    if param.device.type == "cuda":
        from . import cuda  # imports Triton

        return cuda.unavailable_reason(param, group)
    hint = " Materialize the parameters first, or leave fused=None." if param.device.type == "meta" else ""
    return f"there is no kernel for {param.device.type}.{hint}"


def make_plan(batches: Batches, graph_tables: dict[Any, Any]) -> Plan:
    """Plan the steps of an optimizer.

    Args:
        batches: the options of each parameter group and all its (param, grad, state) items.
        graph_tables: tables that captured graphs read, which outlive a plan.

    Returns:
        The plan; each step checks whether it still fits.
    """
    if not torch.cuda.is_initialized():
        return Plan(batches, [cpu], graph_tables)
    from . import cuda

    return Plan(batches, [cuda, cpu], graph_tables)
