"""What the inverse part did in the last step, read off the optimizer's state without touching it (ours)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import component_norms, step_scalars
from .optimizers import DualAdam


class InverseStatistics(NamedTuple):
    """The last optimizer step in figures.

    Attributes:
        alpha: weight of the inverse update, of the parameter that has made the most steps.
        inverse_share: norm of alpha * m^*d over the norm of the whole update, over all parameters; 0 to about 1.
        inverse_rms_ratio: root mean square of m^*d over that of m^/d, both unweighted; 1 where normalised.
        relative_step: norm of the step, learning rate included, over the norm of the parameters.
    """

    alpha: float
    inverse_share: float
    inverse_rms_ratio: float
    relative_step: float


@torch.no_grad()
def inverse_statistics(optimizer: DualAdam, partitioned: bool = False) -> InverseStatistics | None:
    """Measure the last step of ``optimizer`` from its moments.

    Reads the state once and the host once, about the cost of an optimizer step: meant for logging steps. Sharded
    tensors (DTensor) are measured whole, so every process has to call it.

    Args:
        optimizer: a DualAdam or InvAdam.
        partitioned: its parameters are plain tensors that hold this process's part of the model (DeepSpeed's ZeRO);
            what all processes have measured is then added up. Default False.

    Returns:
        The figures, or None before the first step.
    """
    squares, alphas = [], []
    for group in optimizer.param_groups:
        names = ("betas", "eps", "weight_decay", "switch_rate", "inverse_scale", "normalize_inverse", "maximize")
        options = {name: group[name] for name in names}
        lr = float(group["lr"])
        for param in group["params"]:
            state = optimizer.state.get(param)
            if not state:
                continue
            step = float(state["step"])
            scalars = step_scalars(step, lr=lr, **options)
            exp_avg, exp_avg_sq = optimizer.moments(param)
            norms = component_norms(exp_avg, exp_avg_sq, scalars) / (1 - scalars.beta1**step)
            size = torch.linalg.vector_norm(param.float())
            squares.append(torch.stack([*_whole(norms), lr * _whole(norms)[3], _whole(size)]).square())
            alphas.append((step, scalars.alpha))
    if not alphas:
        return None
    home = squares[0].device
    sums = torch.stack([s.to(home) for s in squares]).sum(0).tolist()
    if partitioned:
        sums = _added_up(sums)
    adam, inverse, weighted, whole, moved, size = (math.sqrt(total) for total in sums)
    return InverseStatistics(
        alpha=max(alphas)[1],
        inverse_share=weighted / whole if whole else 0.0,
        inverse_rms_ratio=inverse / adam if adam else 0.0,
        relative_step=moved / size if size else 0.0,
    )


def _whole(x: Tensor) -> Tensor:
    """The full value of a sharded tensor."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _added_up(sums: list[float]) -> list[float]:
    """Sum over all processes, element by element; as objects, since offloaded tensors may not suit the backend."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    return [sum(column) for column in zip(*gathered)]
