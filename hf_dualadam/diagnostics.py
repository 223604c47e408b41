"""Measure the inverse part of the last step from the optimizer's state, without changing it (ours)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .base import MAX_COUNT
from .functional import StepScalars, component_norms, norm_ratio, step_scalars
from .kernels.cpu import SCALE, SUM_FACTORS
from .kernels.layout import is_sharded, sum_over_shards
from .optimizers import DualAdam
from .states import HALF_DTYPES, format_of, local_tensor

_OPTIONS = ("betas", "eps", "weight_decay", "switch_rate", "inverse_scale", "normalize_inverse", "maximize")
# Elements per block without the kernel; on a CPU, few enough to stay in a core's cache.
_CPU_BLOCK, _DEVICE_BLOCK = 2**14, 2**24
# Sums of float32 squares, of m/d / SCALE and m*d * SCALE, are accurate for root mean squares between these bounds;
# others are summed in float64.
_SMALLEST_RMS, _LARGEST_RMS = 1e-16, 1e16
_plans: weakref.WeakKeyDictionary[DualAdam, dict[Any, kernels.Plan]] = weakref.WeakKeyDictionary()


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

    On a CPU, it reads the state once and takes at most about as long as an optimizer step. On a GPU, it reads the
    moments twice and waits for the device, once for each dtype and format.
    Sharded tensors (DTensor) are measured whole, so every process has to call it.

    Args:
        optimizer: a DualAdam or InvAdam.
        partitioned: whether its parameters are plain tensors that hold this process's part of the model (DeepSpeed's
            ZeRO), so that the sums of all processes are added. Default False.

    Returns:
        The statistics, or None before the first step.
    """
    measured = _measure(optimizer)
    if not measured.params:
        return None
    sums = measured.parts().sum(1)
    if partitioned:
        sums = _added_up(sums)
    adam, inverse, weighted, whole, moved, size = sums.sqrt().tolist()
    return InverseStatistics(
        alpha=max((step, scalars.alpha) for step, scalars in zip(measured.steps, measured.scalars))[1],
        inverse_share=weighted / whole if whole else 0.0,
        inverse_rms_ratio=inverse / adam if adam else 0.0,
        relative_step=moved / size if size else 0.0,
    )


class _Measured(NamedTuple):
    """Parameters and their measurements.

    Attributes:
        params: those that have been updated.
        rows: the index of each in the next two lists, which have each combination of group and step once.
        steps: step counts.
        scalars: the scalars of those steps.
        squares: for each parameter, the squared norms of m/d, m*d, m and the parameter, in float64.
    """

    params: list[Tensor]
    rows: Tensor
    steps: list[float]
    scalars: list[StepScalars]
    squares: Tensor

    def parts(self) -> Tensor:
        """Squared norms of the components of the update.

        Returns:
            For each parameter, those of m^/d, m^*d, the weighted inverse part, the sum of both weighted parts, the
            step, and the parameter; shape (6, parameters).
        """
        table = [
            (s.adam_weight, s.inverse_weight, s.normalize_inverse, s.lr, 1 - s.beta1**step)
            for s, step in zip(self.scalars, self.steps)
        ]
        columns = torch.tensor(table, dtype=torch.float64)[self.rows].unbind(1)
        adam_weight, inverse_weight, normalized, lr, bias1 = columns
        adam, inverse, first, size = self.squares.unbind(1)
        ratio = torch.where(normalized != 0, norm_ratio(adam.sqrt(), inverse.sqrt()), 1.0)
        # m/d times m*d is m^2. A component with weight 0 counts as 0, even if it is infinite.
        weight = torch.where(inverse_weight == 0, 0.0, inverse_weight * ratio)
        weighted = torch.where(weight == 0, 0.0, weight**2 * inverse)
        whole = weighted + torch.where(adam_weight == 0, 0.0, adam_weight**2 * adam)
        whole += torch.where((weight == 0) | (adam_weight == 0), 0.0, 2 * weight * adam_weight * first)
        return torch.stack([*(x / bias1**2 for x in (adam, inverse, weighted, whole, lr**2 * whole)), size])


def _measure(optimizer: DualAdam) -> _Measured:
    """Measure every parameter that has been updated, with the kernel if possible, otherwise in blocks."""
    groups, state = optimizer.param_groups, optimizer.state

    def collect(_: Any, params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        return [(p, p, state[p]) for p in params if p.numel() and "step" in state.get(p, ())]

    plans = _plans.setdefault(optimizer, {})
    plan, step = kernels.planned(plans, None, groups, state, collect, kernels.make_measuring_plan)
    params: list[Tensor] = []
    indices: list[int] = []  # of groups
    counts: list[Tensor] = []
    tables: list[Tensor] = []
    for part, found in zip(plan.parts, step.found):
        params += found.owners
        indices += part.groups
        counts.append(torch.tensor(part.counts()))
        tables.append(part.last_norms(found, groups))
    left = [item for _, items in step.left for item in items]
    if left:
        numbers = {id(group): index for index, group in enumerate(groups)}
        params += [param for param, *_ in left]
        indices += [numbers[id(group)] for group, items in step.left for _ in items]
        counts.append(_counts(left))
    if not params:
        return _Measured([], torch.zeros(0), [], [], torch.zeros(0, 4))
    # Group and step as one number, which float64 holds exactly.
    keys = torch.tensor(indices, dtype=torch.float64) * (2 * MAX_COUNT) + torch.cat(counts)
    unique, rows = keys.unique(return_inverse=True)
    steps = (unique % (2 * MAX_COUNT)).clamp(min=1).tolist()  # with a count of 0, m is 0 too
    scalars = [_scalars(groups[int(key // (2 * MAX_COUNT))], count) for key, count in zip(unique.tolist(), steps)]
    if left:
        tables.append(_squares_in_blocks(left, [scalars[row] for row in rows[-len(left) :].tolist()]))
    squares = torch.cat(tables)
    if any(map(is_sharded, dict(zip(map(type, params), params)).values())):
        # Every process adds up the same parameters in the same order, whichever of them its kernel could read.
        places = {id(param): place for place, param in enumerate(params)}
        order = [places[id(param)] for group in groups for param in group["params"] if id(param) in places]
        params, rows, squares = [params[i] for i in order], rows[order], squares[order]
        _add_shards(squares, params)
    measured = _Measured(params, rows, steps, scalars, squares)
    _measure_exactly(measured, state)
    return measured


def _counts(items: list[Any]) -> Tensor:
    """The step counts of parameters, read in one transfer."""
    steps = [torch.as_tensor(state["step"], dtype=torch.float32) for *_, state in items]
    return torch.stack([step.to(steps[0].device) for step in steps]).cpu()


def _scalars(group: dict[str, Any], step: float) -> StepScalars:
    return step_scalars(step, lr=float(group["lr"]), **{name: group[name] for name in _OPTIONS})


def _tensors(param: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """This process's shards of the parameter and both moments, as they are stored or decoded."""
    exp_avg, exp_avg_sq = (format_of(state, name).decode(state, name) for name in ("exp_avg", "exp_avg_sq"))
    return local_tensor(param), local_tensor(exp_avg), local_tensor(exp_avg_sq)


def _squares_in_blocks(items: list[Any], scalars: list[StepScalars]) -> Tensor:
    """The ``last_norms`` of some items without the kernel."""
    places, norms, sizes = [], [], []
    for place, ((param, _, state), own_scalars) in enumerate(zip(items, scalars)):
        local, exp_avg, exp_avg_sq = _tensors(param, state)
        sizes.append(torch.linalg.vector_norm(local, dtype=torch.promote_types(local.dtype, torch.float32)))
        size = _CPU_BLOCK if exp_avg.device.type == "cpu" else _DEVICE_BLOCK
        for block in zip(exp_avg.reshape(-1).split(size), exp_avg_sq.reshape(-1).split(size)):
            norms.append(_block_norms(*block, own_scalars))
            places.append(place)
    home = sizes[0].device
    columns = torch.stack([norm.to(home) for norm in norms]).cpu().double()
    table = torch.zeros(len(items), 4, dtype=torch.float64)
    table[:, :3].index_add_(0, torch.tensor(places), columns.square())
    table[:, 3] = torch.stack([size.to(home) for size in sizes]).cpu().double().square()
    return table.mul_(SUM_FACTORS)


def _block_norms(exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars) -> Tensor:
    """Norms of m/d / SCALE, m*d * SCALE and m; shape (3,)."""
    if exp_avg.dtype in HALF_DTYPES:
        exp_avg, exp_avg_sq = exp_avg.float(), exp_avg_sq.float()
    denom = exp_avg_sq.sqrt().mul_(SCALE * s.bias2_rsqrt).add_(SCALE * s.eps)
    adam = exp_avg / denom
    return torch.stack(torch._foreach_norm([adam, denom.mul_(exp_avg), exp_avg]))


def _measure_exactly(measured: _Measured, state: dict[Tensor, Any]) -> None:
    """Measure in float64 those parameters whose sums of squares do not fit float32."""
    numels = torch.tensor([*map(Tensor.numel, measured.params)], dtype=torch.float64)
    means = (measured.squares / SUM_FACTORS) / numels.unsqueeze(1)
    fit = (means < _LARGEST_RMS**2).all(1) & (means[:, :3] > _SMALLEST_RMS**2).all(1)  # the parameter may be 0
    for row in (~fit).nonzero().flatten().tolist():
        param, scalars = measured.params[row], measured.scalars[measured.rows[row]]
        measured.squares[row] = _exact_squares(param, state[param], scalars)


def _exact_squares(param: Tensor, state: dict[str, Any], scalars: StepScalars) -> Tensor:
    local, exp_avg, exp_avg_sq = _tensors(param, state)
    dtype = torch.float32 if exp_avg.device.type == "mps" else torch.float64  # MPS has no float64
    exp_avg, exp_avg_sq = exp_avg.to(dtype), exp_avg_sq.to(dtype)
    unnormalized = scalars._replace(normalize_inverse=False)
    norms = [*component_norms(exp_avg, exp_avg_sq, unnormalized)[:2]]
    norms += [torch.linalg.vector_norm(x, dtype=dtype) for x in (exp_avg, local)]
    squares = torch.stack(norms).cpu().double().square().unsqueeze(0)
    _add_shards(squares, [param])
    return squares[0]


def _add_shards(squares: Tensor, params: list[Tensor]) -> None:
    """Sum the rows of DTensors over the processes that share them, on their device, in place."""
    for device in dict.fromkeys(param.device for param in params if is_sharded(param)):
        rows = [row for row, param in enumerate(params) if is_sharded(param) and param.device == device]
        sums = squares[rows].to(device)
        sum_over_shards(sums, [params[row] for row in rows])
        squares[rows] = sums.to(squares.device)


def _added_up(sums: Tensor) -> Tensor:
    """Sum over all processes, as objects, since the backend may not support offloaded tensors."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    return torch.stack(gathered).sum(0)
