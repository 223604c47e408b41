"""Measure the inverse part of the last step from the optimizer's state, without changing it (ours)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import StepScalars, component_norms, step_scalars
from .kernels import part_norms
from .optimizers import DualAdam
from .states import HALF_DTYPES, format_of, local_tensor

_OPTIONS = ("betas", "eps", "weight_decay", "switch_rate", "inverse_scale", "normalize_inverse", "maximize")
# Elements per block without the kernel; on a CPU, few enough to stay in a core's cache.
_CPU_BLOCK, _DEVICE_BLOCK = 2**14, 2**24
# Sums of float32 squares are accurate for root mean squares between these bounds. d is scaled by _SCALE, so that both
# m/d (about 1) and m*d (down to 1e-25, for gradients of 3e-13) are within them; others are summed in float64.
_SMALLEST_RMS, _LARGEST_RMS, _SCALE = 1e-16, 1e16, 2.0**30


class InverseStatistics(NamedTuple):
    """Statistics of the last optimizer step.

    Attributes:
        alpha: weight of the inverse update of the parameter with the most steps.
        inverse_share: norm of the inverse part, with its weight, over the norm of the whole update, over all
            parameters; 0 to about 1.
        inverse_rms_ratio: root mean square of m^*d over that of m^/d, both without weights and before
            ``normalize_inverse`` makes them equal.
        relative_step: norm of the step, learning rate included, over the norm of the parameters.
    """

    alpha: float
    inverse_share: float
    inverse_rms_ratio: float
    relative_step: float


@torch.no_grad()
def inverse_statistics(optimizer: DualAdam, partitioned: bool = False) -> InverseStatistics | None:
    """Measure the last step of ``optimizer`` from its moments.

    Reads the state once, in blocks, and waits for the device once; it takes about as long as an optimizer step.
    Sharded tensors (DTensor) are measured whole, so every process has to call it.

    Args:
        optimizer: a DualAdam or InvAdam.
        partitioned: whether its parameters are plain tensors that hold this process's part of the model (DeepSpeed's
            ZeRO), so that the sums of all processes are added. Default False.

    Returns:
        The statistics, or None before the first step.
    """
    measured = [_Parameter(param, group, optimizer.state[param]) for param, group in _updated(optimizer)]
    if not measured:
        return None
    sums = torch.zeros(6, dtype=torch.float64)
    for parameter, squares in zip(measured, _squares(measured)):
        sums += parameter.parts(*squares)
    if partitioned:
        sums = _added_up(sums)
    adam, inverse, weighted, whole, moved, size = sums.sqrt().tolist()
    return InverseStatistics(
        alpha=max((parameter.step, parameter.scalars.alpha) for parameter in measured)[1],
        inverse_share=weighted / whole if whole else 0.0,
        inverse_rms_ratio=inverse / adam if adam else 0.0,
        relative_step=moved / size if size else 0.0,
    )


def _updated(optimizer: DualAdam) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.numel() and "step" in optimizer.state.get(param, {}):
                yield param, group


class _Parameter:
    """A parameter with the moments and scalars of its last step; of a DTensor, this process's shard."""

    def __init__(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        self.param = param
        self.step = float(state["step"])
        self.lr = float(group["lr"])
        options = {name: group[name] for name in _OPTIONS}
        self.scalars: StepScalars = step_scalars(self.step, lr=self.lr, **options)
        self._state = state

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameter and both moments, as they are stored or decoded."""
        names = ("exp_avg", "exp_avg_sq")
        exp_avg, exp_avg_sq = (local_tensor(format_of(self._state, n).decode(self._state, n)) for n in names)
        return local_tensor(self.param), exp_avg, exp_avg_sq

    def parts(self, adam: float, inverse: float, first: float, size: float) -> Tensor:
        """Squared norms of this parameter's parts of the update, from those of m/d, m*d, m and the parameter.

        Returns:
            Those of m^/d, m^*d, the weighted inverse part, both weighted parts together, the step, and the parameter.
        """
        s = self.scalars
        bias1 = 1 - s.beta1**self.step
        weight = s.inverse_weight
        if s.normalize_inverse:
            weight *= math.sqrt(adam / inverse) if inverse else 0.0
        # The product of both parts is m^2. A part with weight 0 counts as 0, even if it is infinite.
        weighted = weight**2 * inverse if weight else 0.0
        whole = weighted + (s.adam_weight**2 * adam if s.adam_weight else 0.0)
        whole += 2 * weight * s.adam_weight * first if weight and s.adam_weight else 0.0
        parts = torch.tensor([adam, inverse, weighted, whole, self.lr**2 * whole, size], dtype=torch.float64)
        parts[:5] /= bias1**2
        return parts


def _squares(parameters: list[_Parameter]) -> list[list[float]]:
    """Squared norms of m/d, m*d, m and the parameter, for each of them."""
    rows, places, others = [], [], []
    for place, parameter in enumerate(parameters):
        tensors, s = parameter.tensors(), parameter.scalars
        if part_norms.is_supported(*tensors):
            rows.append((*tensors, s.bias2_rsqrt, s.eps))
            places.append(place)
        else:
            others.append(place)
    table = torch.zeros(len(parameters), 4, dtype=torch.float64)
    if rows:
        table[places] = torch.tensor(part_norms.squares(rows), dtype=torch.float64)
    if others:
        table[others] = _squares_in_blocks([parameters[place] for place in others])
    _add_shards(table, parameters)
    squares: list[list[float]] = table.tolist()
    for row, parameter in zip(squares, parameters):
        means = [square / scale / parameter.param.numel() for square, scale in zip(row, (_SCALE**2, _SCALE**-2, 1))]
        if not all(_SMALLEST_RMS**2 < mean < _LARGEST_RMS**2 for mean in means):
            row[:3] = _exact_squares(parameter)
    return squares


def _squares_in_blocks(parameters: list[_Parameter]) -> Tensor:
    """The same without the kernel, as a table in float64 on the CPU: of this process's shards."""
    places, norms, sizes = [], [], []
    for place, parameter in enumerate(parameters):
        param, exp_avg, exp_avg_sq = parameter.tensors()
        sizes.append(torch.linalg.vector_norm(param, dtype=torch.promote_types(param.dtype, torch.float32)))
        size = _CPU_BLOCK if exp_avg.device.type == "cpu" else _DEVICE_BLOCK
        for block in zip(exp_avg.reshape(-1).split(size), exp_avg_sq.reshape(-1).split(size)):
            norms.append(_block_norms(*block, parameter.scalars))
            places.append(place)
    home = sizes[0].device
    columns = torch.stack([norm.to(home) for norm in norms]).cpu().double()
    columns[:, 0] *= _SCALE
    columns[:, 1] /= _SCALE
    table = torch.zeros(len(parameters), 4, dtype=torch.float64)
    table[:, :3].index_add_(0, torch.tensor(places), columns.square())
    table[:, 3] = torch.stack([size.to(home) for size in sizes]).cpu().double().square()
    return table


def _block_norms(exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars) -> Tensor:
    """Norms of m/d / _SCALE, m*d * _SCALE and m; shape (3,)."""
    if exp_avg.dtype in HALF_DTYPES:
        exp_avg, exp_avg_sq = exp_avg.float(), exp_avg_sq.float()
    denom = exp_avg_sq.sqrt().mul_(_SCALE * s.bias2_rsqrt).add_(_SCALE * s.eps)
    adam = exp_avg / denom
    return torch.stack(torch._foreach_norm([adam, denom.mul_(exp_avg), exp_avg]))


def _exact_squares(parameter: _Parameter) -> list[float]:
    """Squared norms of m/d, m*d and m where their sums do not fit float32."""
    _, exp_avg, exp_avg_sq = parameter.tensors()
    dtype = torch.float32 if exp_avg.device.type == "mps" else torch.float64  # MPS has no float64
    exp_avg, exp_avg_sq = exp_avg.to(dtype), exp_avg_sq.to(dtype)
    unnormalized = parameter.scalars._replace(normalize_inverse=False)
    norms = [*component_norms(exp_avg, exp_avg_sq, unnormalized)[:2], torch.linalg.vector_norm(exp_avg)]
    table = torch.stack(norms).cpu().double().square().unsqueeze(0)
    _add_shards(table, [parameter])
    return table[0].tolist()


def _add_shards(table: Tensor, parameters: list[_Parameter]) -> None:
    """Sum the rows of DTensors over the processes that share them; one reduction per kind of placement."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, parameter in enumerate(parameters):
        param: Any = parameter.param
        if hasattr(param, "to_local"):
            alike[param.device_mesh, tuple(param.placements)].append(place)
    for (mesh, placements), rows in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        sharing = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
        index = torch.tensor(rows, device=table.device)
        shards = DTensor.from_local(table[index].to(parameters[rows[0]].param.device), mesh, sharing)
        table[index] = shards.full_tensor().to(table.device)


def _added_up(sums: Tensor) -> Tensor:
    """Sum over all processes, as objects, since the backend may not support offloaded tensors."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    return torch.stack(gathered).sum(0)
