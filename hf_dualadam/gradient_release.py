"""Gradient release: update each parameter as soon as its gradient is complete, and free the gradient (ours).

The gradients of a model are then never in memory all at once, which saves 4 bytes per float32 parameter and 2 bytes
per bfloat16 parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .base import MomentOptimizer


class GradientRelease:
    """Hooks that update parameters during the backward pass; created by :func:`release_gradients`.

    Attributes:
        optimizer: the optimizer that updates them.
    """

    def __init__(self, names: dict[Tensor, str], optimizer: MomentOptimizer) -> None:
        self.optimizer = optimizer
        self._names = names
        self._updated: set[Tensor] = set()
        self._handles: list[Any] = [optimizer.register_step_pre_hook(self._begin_step)]
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad:
                    hook = functools.partial(self._update, index)
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Remove the hooks; gradients are kept again until ``optimizer.step()``."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _update(self, group_index: int, param: Tensor) -> None:
        if param in self._updated:
            raise RuntimeError(
                f"{self._names[param]} got a second gradient before optimizer.step(): released gradients "
                "cannot be accumulated. Call optimizer.step() after each backward pass."
            )
        # Look up the group each time: load_state_dict replaces the groups.
        self.optimizer.step_params([param], self.optimizer.param_groups[group_index])
        param.grad = None
        self._updated.add(param)

    def _begin_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise RuntimeError("Gradient release does not support closures: each call would make a step.")
        self._updated.clear()


def releases(model: Module) -> set[GradientRelease]:
    """The active gradient releases of a model's parameters."""
    hooks = (hook for param in model.parameters() for hook in (param._post_accumulate_grad_hooks or {}).values())
    owners = (getattr(getattr(hook, "func", None), "__self__", None) for hook in hooks)
    return {owner for owner in owners if isinstance(owner, GradientRelease)}


def release_gradients(model: Module, optimizer: Optimizer) -> GradientRelease:
    """Update each parameter within the backward pass, once its gradient is complete, and free that gradient.

    The training loop does not change. ``optimizer.step()`` ends the step, runs its hooks and updates the remaining
    parameters, such as those added to the optimizer later. The resulting weights are the same, bit for bit. A
    parameter used in several places is updated once, when its gradient is complete. The exception is one used in
    several blocks with reentrant activation checkpointing: its gradient comes in parts, the second of which raises an
    error.

    Not supported, because they need all gradients at once or change them after the backward pass:

    - gradient accumulation: the second backward pass before ``optimizer.step()`` raises an error;
    - clipping by a global norm, which would find no gradients and silently do nothing;
    - loss scaling (``GradScaler``), which would divide by the scale too late;
    - DDP and plain tensors on several processes, FSDP1 and DeepSpeed; FSDP2 works;
    - ``normalize_inverse`` with FSDP2, whose norms need other processes in the middle of the backward pass;
    - closures.

    Args:
        model: the model, with its wrappers.
        optimizer: a DualAdam or InvAdam of its parameters, with or without Accelerate's wrapper.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        TypeError: the optimizer is of another class.
        ValueError: a feature that is not supported is detected before training.
    """
    scaler = getattr(optimizer, "scaler", None)
    while not isinstance(optimizer, MomentOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, MomentOptimizer):
        raise TypeError(f"Invalid optimizer: {type(optimizer).__name__} - should be DualAdam or InvAdam.")
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    problem = _problem(model, optimizer, names)
    if scaler is not None:
        problem = "loss scaling (GradScaler, fp16) divides by the scale after the backward pass; use bf16"
    if problem:
        raise ValueError(f"Gradients cannot be released here: {problem}.")
    return GradientRelease(names, optimizer)


def _problem(model: Module, optimizer: MomentOptimizer, names: dict[Tensor, str]) -> str | None:
    """The reason why gradients cannot be released, or None if none is detected."""
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    sharded = [hasattr(param, "placements") for param, _ in params]
    home = type(model).__module__
    if releases(model):
        return "they are already released; call remove() of that handle first"
    if home.startswith("deepspeed") or any(hasattr(param, "ds_id") for param, _ in params):
        return "DeepSpeed does not expose gradients"
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "DDP averages gradients in its own buckets and copies them back later; use FSDP2"
    if any(getattr(param, "_fsdp_flattened", False) for param, _ in params):
        return "FSDP1 flattens parameters and averages their gradients later; use FSDP2"
    if any(param not in names for param, _ in params):
        return "the optimizer has parameters that are not in the model"
    if _processes() > 1 and not all(sharded):
        return "several processes train plain tensors, whose gradients are averaged later; use FSDP2"
    if any(group.get("normalize_inverse") and is_sharded for (_, group), is_sharded in zip(params, sharded)):
        return "normalize_inverse needs norms over shards that are on other processes"
    return None


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
