"""Checks shared by both kernels before using raw pointers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..states import local_tensor

# (param, grad, exp_avg, exp_avg_sq, step): what a kernel reads and writes for one parameter.
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_PLAIN = (Tensor, torch.nn.Parameter)


def operands(param: Tensor, grad: Tensor, state: dict[str, Any]) -> Operands | None:
    """The plain tensors to work on: for DTensors, this process's shards; None for other subclasses of Tensor.

    None too for a step count that is a plain number, before the next step makes it a tensor.
    """
    exp_avg, exp_avg_sq, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    if not isinstance(step, Tensor):
        return None
    if type(param) in _PLAIN and type(grad) in _PLAIN:
        return param, grad, exp_avg, exp_avg_sq, step
    tensors = (param, grad, exp_avg, exp_avg_sq)
    if not all(map(is_sharded, tensors)):
        return None
    placements = [getattr(tensor, "placements") for tensor in tensors]
    if any(placement != placements[0] for placement in placements):
        return None
    shards = [*map(local_tensor, tensors)]
    if not all(type(shard) in _PLAIN for shard in shards):
        return None
    return shards[0], shards[1], shards[2], shards[3], step


def is_sharded(param: Tensor) -> bool:
    """Whether this is a DTensor. Checks for the method, since its module is slow to import."""
    return hasattr(type(param), "to_local")


def addresses_of(tensors: Iterable[Tensor]) -> list[int]:
    """The memory addresses of tensors."""
    return [*map(Tensor.data_ptr, tensors)]


class _LayoutCheck:
    """The comparison of :func:`layout_check`, where torch does not offer it."""

    def __init__(self, *tensors: Tensor, **_: Any) -> None:
        self._seen = self._look_at(tensors)

    @staticmethod
    def _look_at(tensors: Iterable[Tensor]) -> list[Any]:
        return [(type(x), x.dtype, x.device, x.shape, x.stride(), x.is_neg(), x.requires_grad) for x in tensors]

    def check(self, *tensors: Tensor) -> bool:
        return self._look_at(tensors) == self._seen


# torch.compile's own comparison, in C++; no public interface, so another release may have it elsewhere or not at all.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_TensorGuards: Any = getattr(_guards, "TensorGuards", _LayoutCheck)
_DYNAMIC = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}


def _compares(cls: Any) -> bool:
    """Whether this torch's comparison works as expected."""
    short, long = torch.empty(1), torch.empty(2)
    try:
        check = cls(short, **_DYNAMIC).check
        return check(torch.empty(1)) is True and check(long) is False
    except Exception:  # another signature
        return False


if not _compares(_TensorGuards):
    _TensorGuards = _LayoutCheck


def layout_check(tensors: list[Tensor]) -> Callable[..., bool]:
    """Remember the layouts of tensors without keeping them alive.

    Args:
        tensors: plain tensors.

    Returns:
        A function that tells whether its arguments, equally many, have the types, dtypes, devices, shapes, strides and
        signs (``is_neg``) of these tensors.
    """
    check: Callable[..., bool] = _TensorGuards(*tensors, **_DYNAMIC).check
    return check


def can_sum_over_shards(param: Tensor) -> bool:
    """Whether :func:`sum_over_shards` supports the placements of a parameter; it always supports plain tensors."""
    placements = getattr(param, "placements", ())
    return all(_divides(placement) or placement.is_replicate() for placement in placements)


def _divides(placement: Any) -> bool:
    """Whether the processes hold parts. Not ``is_shard()``, which is False where FSDP2 divides what is divided."""
    return hasattr(placement, "dim")


def sum_over_shards(sums: Tensor, params: list[Tensor]) -> None:
    """Add up numbers over the processes that hold shards of a parameter: one reduction for all parameters.

    Every process must call this with the same parameters in the same order, even if its shards are empty.

    Args:
        sums: one row per parameter, changed in place.
        params: the parameters; the rows of plain and of replicated ones do not change.
    """
    rows: dict[Any, list[int]] = {}
    for row, param in enumerate(params):
        for dim, placement in enumerate(getattr(param, "placements", ())):
            if _divides(placement):
                rows.setdefault(getattr(param, "device_mesh").get_group(dim), []).append(row)
    for group, own in rows.items():
        part = sums if len(own) == len(sums) else sums[own]
        torch.distributed.all_reduce(part, group=group)
        if part is not sums:
            sums[own] = part


def same_layout(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, in_logical_order: bool = False
) -> bool:
    """Whether all four have the same element at offset i in memory, and no two elements share memory.

    Args:
        param: a parameter.
        grad: its gradient.
        exp_avg: its first moment, or the codes of that.
        exp_avg_sq: its second moment, or the codes of that.
        in_logical_order: whether element i has to be at offset i, as required if blocks of elements share a scale.
            Default False.

    Returns:
        Whether all of this is true.
    """
    if grad.is_neg():  # the numbers in memory have the opposite sign
        return False
    if not param.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape:
        return False
    if param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous():
        return True
    if in_logical_order:
        return False
    by_stride = sorted(range(param.dim()), key=param.stride, reverse=True)
    strides = {t.stride() for t in (param, grad, exp_avg, exp_avg_sq)}
    return len(strides) == 1 and param.permute(by_stride).is_contiguous()


def overlapping(addresses: Iterable[int], sizes: Iterable[int]) -> frozenset[int]:
    """Find the tensors that share memory with another one: no two threads may update them at once.

    Args:
        addresses: the address of each tensor.
        sizes: the size of each tensor, in bytes.

    Returns:
        Their indices.
    """
    spans = enumerate(zip(addresses, sizes))
    found, reach, last = set(), 0, -1
    for start, end, place in sorted((start, start + size, place) for place, (start, size) in spans):
        if start < min(reach, end):
            found |= {place, last}
        if end > reach:
            reach, last = end, place
    return frozenset(found)


def mark_as_written(params: list[Tensor]) -> None:
    """Count the write in the tensors' versions, so that autograd detects if it had saved one of them."""
    try:
        increment_version(params)
    except (RuntimeError, TypeError):  # older releases (2.4) take one tensor at a time
        for param in params:
            increment_version(param)
