"""DualAdam and InvAdam as ``torch.optim`` optimizers: arguments, state and the loop over parameters.

The update itself stands in :mod:`hf_dualadam.functional`.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .functional import StepScalars, dual_update_, foreach_dual_update_, step_scalars
from .kernels.tensors import zeros_like

# These only choose how the update is computed, so they stay with the running process when a state is loaded.
_PATH_OPTIONS = ("foreach", "fused", "capturable")
_OWN_OPTIONS = ("switch_rate", "switch_fraction", "planned_steps", "normalize_inverse", "maximize", "optimizer")
_STATE_TENSORS = ("exp_avg", "exp_avg_sq")


class DualAdam(Optimizer):
    """DualAdam: starts on InvAdam's update and hands over linearly to AdamW's.

    At step t of a parameter::

        theta <- theta * (1 - lr * weight_decay)
        m^, v^ = Adam's bias-corrected moments,  d = sqrt(v^) + eps
        alpha  = max(0, 1 - t * switch_rate), and 0 as soon as it is smaller than switch_rate
        theta <- theta - lr * [(1 - alpha) * m^ / d + alpha * m^ * d]

    With alpha = 1 for ever it is :class:`InvAdam`; from alpha = 0 on it is ``torch.optim.AdamW``, to rounding.
    Source: Shi, Chen, Jin and Zhou, arXiv 2603.07122, and the authors' public code, followed where they differ (the
    weight decay is decoupled, and the blend ends one step early). Unlike the authors' code, the step count is part
    of the state, so a resumed run goes on where it stopped. ``normalize_inverse`` is ours.

    State per parameter: ``step`` (0-dim float32, on the CPU unless ``capturable``), ``exp_avg`` and ``exp_avg_sq``
    (like the parameter; float32 for float16 parameters, whose squares would underflow). Arithmetic on half-precision
    tensors is done in float32.

    Args:
        params: tensors or parameter groups; floating point, dense.
        lr: learning rate eta, a number >= 0 or a one-element tensor. Default 1e-3.
        betas: decay rates of the two moments, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root of the second moment, >= 0. Default 1e-8.
        weight_decay: decoupled weight decay lambda, >= 0. Default 0.
        switch_rate: drop of alpha per step, in [0, 1]; the inverse phase lasts 1/switch_rate steps. Default 0.01.
        normalize_inverse: rescale, per tensor, the inverse update to the root mean square of the Adam update.
            Default False.
        foreach: True for the multi-tensor path, False for the others. Default None: what is fastest here.
        fused: True for the one-pass kernel, False for the others. Default None: what is fastest here.
        maximize: ascend instead of descend. Default False.
        capturable: never read a device value on the host, for CUDA graphs. Default False.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; a parameter is sparse or complex; a
            path that was asked for cannot be had.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        switch_rate: float = 0.01,
        normalize_inverse: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "switch_rate": switch_rate,
            "normalize_inverse": normalize_inverse,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
            "optimizer": type(self).__name__,  # tells our state from other optimizers'
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; its own options are checked like the constructor's.

        Args:
            param_group: ``params`` and any options that differ from the constructor's.

        Raises:
            ValueError, TypeError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for param in group["params"]:
                _check_param(param, group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or a state dict; options that an older state lacks get their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of an Adam-like optimizer, and keep the dtypes it was saved with.

        Moments, step counts and hyper-parameters come from the state, as in ``torch.optim``; ``foreach``, ``fused``
        and ``capturable`` stay as constructed. A state of another optimizer (AdamW, say) is taken over with one
        warning: its moments and step counts are kept, so steps already done count towards the switch, and the
        options it does not know stay as constructed.

        Args:
            state_dict: as returned by ``state_dict()``.

        Raises:
            ValueError: the state does not fit the parameters, or has no Adam moments.
        """
        saved_by = [group.get("optimizer", "another optimizer") for group in state_dict["param_groups"]]
        foreign = sorted(set(saved_by) - {type(self).__name__})
        _check_moments(state_dict)
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        self._restore_dtypes(state_dict)
        for group, old, name in zip(self.param_groups, before, saved_by):
            kept = _PATH_OPTIONS + (_OWN_OPTIONS if name in foreign else ())
            group.update({option: old[option] for option in kept if option in old})
            _place_steps(group, self.state)
        notes = []
        if foreign:
            notes.append(
                f"The loaded state was saved by {', '.join(foreign)}, not by {type(self).__name__}: its moments and "
                "step counts are taken over, so the steps already done count towards the switch to AdamW."
            )
        replaced = _replaced_options(before, self.param_groups)
        if replaced:
            notes.append(f"The loaded state replaces options that were given: {', '.join(replaced)}.")
        if notes:
            warnings.warn(" ".join(notes), stacklevel=2)

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undo torch's cast of the moments to the parameter's dtype (pytorch issue 43706)."""
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params):
            saved = state_dict["state"].get(saved_id, {})
            for name in _STATE_TENSORS:
                if name in saved and saved[name].dtype != self.state[param][name].dtype:
                    self.state[param][name] = saved[name].to(param.device, copy=True)

    @torch.no_grad()
    def step(self, closure=None):
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled. Default None.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or normalize_inverse meets parameters that FSDP1 has flattened.
        """
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [(group, self._collect(group)) for group in self.param_groups]
        for group, tensors in kernels.update(batches):
            self._update(group, tensors)
        return loss

    def _collect(self, group: dict[str, Any]) -> list[tuple[Tensor, ...]]:
        """(param, grad, exp_avg, exp_avg_sq, step) of each parameter with a gradient; makes missing state."""
        tensors = []
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use a dense embedding.")
            if group["normalize_inverse"] and getattr(param, "_fsdp_flattened", False):
                raise RuntimeError("normalize_inverse needs whole tensors, and FSDP1 flattens them: use FSDP2.")
            state = self.state[param]
            if not state:
                device = param.device if group["capturable"] else "cpu"
                dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for name in _STATE_TENSORS:
                    state[name] = zeros_like(param, dtype)
            tensors.append((param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        return tensors

    def _update(self, group: dict[str, Any], tensors: list[tuple[Tensor, ...]]) -> None:
        """Count the step and update, on the fastest path that the group allows."""
        if not tensors:
            return
        torch._foreach_add_([step for *_, step in tensors], 1)
        foreach = group["foreach"] or group["foreach"] is None
        for batch, scalars in _batches(group, tensors, foreach):
            update = _foreach_update if foreach else _single_update
            update(batch, scalars, group)


class InvAdam(DualAdam):
    """InvAdam: multiplies the bias-corrected first moment by the root of the second, where Adam divides.

    :class:`DualAdam` with alpha = 1 for ever: ``theta <- theta - lr * m^ * (sqrt(v^) + eps)``. Its step is of the
    order of lr * g^2, so it wants a far larger lr than Adam, or ``normalize_inverse=True``, which makes Adam's
    learning rates fit. Source: arXiv 2603.07122; ``normalize_inverse`` is ours.

    Args:
        params: as in :class:`DualAdam`, like all that follow.
        lr: learning rate. Default 1e-3.
        betas: decay rates of the two moments. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decoupled weight decay. Default 0.
        normalize_inverse: rescale the update to the root mean square of Adam's. Default False.
        foreach: choose or forbid the multi-tensor path. Default None.
        fused: choose or forbid the one-pass kernel. Default None.
        maximize: ascend instead of descend. Default False.
        capturable: for CUDA graphs. Default False.

    Raises:
        ValueError, TypeError: as :class:`DualAdam`.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        normalize_inverse: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            switch_rate=0.0,
            normalize_inverse=normalize_inverse,
            foreach=foreach,
            fused=fused,
            maximize=maximize,
            capturable=capturable,
        )


# torch 2.13 renamed its check that a captured step is capturable.
_check_graph_capture = getattr(
    Optimizer, "_accelerator_graph_capture_health_check", Optimizer._cuda_graph_capture_health_check
)


def _batches(group: dict[str, Any], tensors: list[tuple[Tensor, ...]], foreach: bool):
    """Split a group's tensors into (tensors, scalars) that one call can update.

    Reads the step counts on the host, except where that is forbidden (``capturable``) or would break a compiled
    graph; there the scalars are tensors, one per parameter.
    """
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "switch_rate")}
    on_host = not (group["capturable"] or torch.compiler.is_compiling())
    if on_host:
        options["lr"] = float(options["lr"])
    batches = defaultdict(list)
    for item in tensors:
        mesh = getattr(item[0], "device_mesh", None)  # one call takes plain tensors or DTensors of one mesh
        key = (item[-1].item() if on_host else None, mesh, *((t.device, t.dtype) for t in item[:4]))
        batches[key].append(item)
    for (step, *_), batch in batches.items():
        if on_host:
            yield batch, step_scalars(step, **options)
        elif foreach:
            yield batch, _transpose([step_scalars(item[-1], **options) for item in batch])
        else:
            for item in batch:
                yield [item], step_scalars(item[-1], **options)


def _transpose(scalars: list[StepScalars]) -> StepScalars:
    """One StepScalars of lists from a list of StepScalars; what is one value for all stays one value."""
    columns = [list(column) for column in zip(*scalars)]
    return StepScalars(*(column if isinstance(column[0], Tensor) else column[0] for column in columns))


def _single_update(batch: list[tuple[Tensor, ...]], s: StepScalars, group: dict[str, Any]) -> None:
    for item in batch:
        tensors = [_widen(t) for t in item[:4]]
        tensors[1] = -tensors[1] if group["maximize"] else tensors[1]
        dual_update_(*tensors, s, group["normalize_inverse"])
        _write_back(item, tensors)


def _foreach_update(batch: list[tuple[Tensor, ...]], s: StepScalars, group: dict[str, Any]) -> None:
    widened = [[_widen(t) for t in item[:4]] for item in batch]
    params, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*widened))
    grads = list(torch._foreach_neg(grads)) if group["maximize"] else grads
    foreach_dual_update_(params, grads, exp_avgs, exp_avg_sqs, s, group["normalize_inverse"])
    for item, tensors in zip(batch, zip(params, grads, exp_avgs, exp_avg_sqs)):
        _write_back(item, tensors)


def _widen(tensor: Tensor) -> Tensor:
    """A float32 copy of a half-precision tensor; any other tensor itself."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _write_back(item: tuple[Tensor, ...], tensors) -> None:
    """Round what was computed on widened copies back into the parameter and its moments."""
    for target, value in zip((item[0], *item[2:4]), (tensors[0], *tensors[2:4])):
        if target is not value:
            target.copy_(value)


def _check_moments(state_dict: dict[str, Any]) -> None:
    """Refuse the state of an optimizer without Adam's moments, before anything is overwritten."""
    for index, state in state_dict["state"].items():
        missing = [name for name in ("step", *_STATE_TENSORS) if name not in state]
        if state and missing:
            raise ValueError(
                f"Invalid state_dict: the state of parameter {index!r} has {sorted(state)} and lacks "
                f"{', '.join(missing)} - should come from DualAdam, InvAdam, Adam or AdamW."
            )


def _place_steps(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """Step counts as this process wants them: 0-dim float32 tensors, on the device only if capturable."""
    for param in group["params"]:
        if param in state and state[param]:
            device = param.device if group["capturable"] else "cpu"
            step = torch.as_tensor(state[param]["step"], dtype=torch.float32, device=device)
            state[param]["step"] = step.reshape(())


def _replaced_options(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """The options given to this optimizer that a loaded state has replaced."""
    changes = []
    for index, (old, new) in enumerate(zip(before, after)):
        # switch_fraction stands for the rate that it resolves to, and lr itself moves with every schedule.
        switch = "switch_fraction" if "switch_fraction" in {**old, **new} else "switch_rate"
        for name in (switch, "normalize_inverse", "maximize", "betas", "eps", "weight_decay", "initial_lr"):
            if name == "initial_lr" and not (name in old and name in new):
                continue
            if _differs(old.get(name), new.get(name)):
                changes.append(f"{name}: {new.get(name)} instead of {old.get(name)} (group {index})")
    return changes


def _differs(old, new) -> bool:
    if isinstance(old, (tuple, list)):
        return tuple(old) != tuple(new)
    return bool(old != new)


def _check_options(options: dict[str, Any]) -> None:
    """Check the options of one group; the messages name the argument, its value and what is allowed."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"Invalid lr: tensor of shape {tuple(lr.shape)}, {lr.dtype} - should be one float.")
        if lr.device.type == "cpu":
            _check_number("lr", float(lr), 0.0)
    else:
        _check_number("lr", lr, 0.0)
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"Invalid betas: {betas!r} - should be two numbers in [0.0, 1.0).")
    for index, beta in enumerate(betas):
        _check_number(f"betas[{index}]", beta, 0.0, 1.0, open_end=True)
    _check_number("eps", options["eps"], 0.0)
    _check_number("weight_decay", options["weight_decay"], 0.0)
    _check_number("switch_rate", options["switch_rate"], 0.0, 1.0)
    for name in ("normalize_inverse", "maximize", "capturable", "foreach", "fused"):
        allowed = (True, False, None) if name in ("foreach", "fused") else (True, False)
        if not any(options[name] is value for value in allowed):
            raise TypeError(f"Invalid {name}: {options[name]!r} - should be {' or '.join(map(str, allowed))}.")
    if options["foreach"] and options["fused"]:
        raise ValueError("Invalid foreach: True with fused=True - should be at most one of the two.")


def _check_number(name: str, value, low: float, high: float = math.inf, open_end: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Invalid {name}: {value!r} - should be a number, not {type(value).__name__}.")
    inside = low <= value < high if open_end or high == math.inf else low <= value <= high
    if not inside:  # NaN is in no range
        bracket = ")" if open_end or high == math.inf else "]"
        raise ValueError(f"Invalid {name}: {value} - should be in [{low}, {high}{bracket}.")


def _check_param(param: Tensor, group: dict[str, Any]) -> None:
    """Refuse parameters that no path can update, and a fused path that cannot be had."""
    if not param.is_floating_point():  # complex numbers are not floating point to torch
        raise ValueError(f"Invalid params: a tensor of {param.dtype} - should be real floating point.")
    if param.layout != torch.strided:
        raise ValueError(f"Invalid params: a tensor of layout {param.layout} - should be dense (torch.strided).")
    if group["capturable"] and param.device.type == "mps":
        raise ValueError("Invalid capturable: True with a parameter on mps - should be False there.")
    if group["fused"]:
        reason = kernels.unavailable_reason(param, group)
        if reason:
            raise ValueError(f"Invalid fused: True - should be None or False here: {reason}")


# The names by which Trainer, accelerate's launcher and other registries know the optimizers.
OPTIMIZERS: dict[str, type[DualAdam]] = {"dualadam": DualAdam, "invadam": InvAdam}
