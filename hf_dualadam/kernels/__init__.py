"""One-pass kernels of the update in :mod:`hf_dualadam.functional`: a C source for the CPU, Triton for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .plan import Batches as Batches
from .plan import Group, Item, Step
from .plan import Plan as Plan
from .plan import identity as identity

MAX_PLANS = 1024  # per optimizer: one for step(), and one for each call of step_params() in gradient release
Collect = Callable[[Group, list[Tensor]], list[Item]]


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
    return Plan(batches, _kernels(), graph_tables)


def _kernels() -> list[Any]:
    if not torch.cuda.is_initialized():
        return [cpu]
    from . import cuda  # imports Triton

    return [cuda, cpu]


def planned(
    plans: dict[Hashable, Plan],
    key: Hashable,
    groups: list[Group],
    state: dict[Tensor, Any],
    collect: Collect,
    make: Callable[[Batches], Plan],
) -> tuple[Plan, Step]:
    """Find a plan that fits the current state, or make one.

    Args:
        plans: the plans made so far.
        key: the key of the plan.
        groups: an optimizer's parameter groups.
        state: its state.
        collect: ``collect(group, params)`` returns (param, grad, state) of those params that take part.
        make: makes a plan from what has been collected.

    Returns:
        The plan, and what its look has found.
    """
    plan = plans.get(key)
    step = plan.look(groups, state, collect) if plan else None
    if plan is None or step is None:
        batches = collect_all(groups, collect)
        if len(plans) > MAX_PLANS:
            plans.clear()
        plans[key] = plan = make(batches)
        step = plan.look(groups, state, collect) or Step([], batches)
    return plan, step


def collect_all(groups: list[Group], collect: Collect) -> Batches:
    """Collect from all groups; see :func:`planned`."""
    return [(group, collect(group, group["params"])) for group in groups]


def make_measuring_plan(batches: Batches) -> Plan:
    """Plan measurements of the last step.

    Args:
        batches: the options of each parameter group and the (param, param, state) items of its updated parameters.

    Returns:
        The plan, whose parts have a method ``last_norms``.
    """
    return Plan(batches, _kernels(), {}, reads_grads=False)
