"""Checks shared by both kernels before using raw pointers."""

from __future__ import annotations

import functools
from array import array
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

# (param, grad, exp_avg, exp_avg_sq, step): what a kernel reads and writes of one parameter.
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_PLAIN = (Tensor, torch.nn.Parameter)


def operands(param: Tensor, grad: Tensor, state: dict[str, Any], normalize_inverse: bool) -> Operands | None:
    """The tensors that hold the numbers: of DTensors, this process's shards; None for other subclasses of Tensor.

    Also None for a DTensor with ``normalize_inverse``, which needs the norms of whole tensors.
    """
    exp_avg, exp_avg_sq, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    if type(param) in _PLAIN and type(grad) in _PLAIN:
        return param, grad, exp_avg, exp_avg_sq, step
    tensors = (param, grad, exp_avg, exp_avg_sq)
    if normalize_inverse or not all(map(is_sharded, tensors)):
        return None
    placements = [getattr(tensor, "placements") for tensor in tensors]
    if any(placement != placements[0] for placement in placements):
        return None
    shards = [getattr(tensor, "to_local")() for tensor in tensors]
    if not all(type(shard) in _PLAIN for shard in shards):
        return None
    return shards[0], shards[1], shards[2], shards[3], step


def is_sharded(param: Tensor) -> bool:
    """Whether this is a DTensor, told by its method, since its module is slow to import."""
    return hasattr(type(param), "to_local")


def same_layout(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, in_logical_order: bool = False
) -> bool:
    """Whether place i in memory is the same element of all four, and each element has a place of its own.

    Args:
        param: a parameter.
        grad: its gradient.
        exp_avg: its first moment, or the codes of it.
        exp_avg_sq: its second moment, or the codes of it.
        in_logical_order: whether element i has to lie at place i, as where blocks of elements share a scale.
            Default False.

    Returns:
        Whether all of this holds.
    """
    if grad.is_neg():  # the numbers in memory have the wrong sign
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


def overlapping(addresses: array[int], sizes: array[int]) -> frozenset[int]:
    """Find the tensors that share memory with another one, which no two threads may update at once.

    Args:
        addresses: where each tensor begins, 64-bit integers.
        sizes: the number of bytes of each.

    Returns:
        Their places in the list.
    """
    return _overlapping(addresses.tobytes(), sizes.tobytes())


@functools.lru_cache(maxsize=16)  # parameters seldom move
def _overlapping(addresses: bytes, sizes: bytes) -> frozenset[int]:
    spans = enumerate(zip(array("q", addresses), array("q", sizes)))
    found, reach, last = set(), 0, -1
    for start, end, place in sorted((start, start + size, place) for place, (start, size) in spans):
        if start < min(reach, end):
            found |= {place, last}
        if end > reach:
            reach, last = end, place
    return frozenset(found)


def mark_as_written(params: list[Tensor]) -> None:
    """Let autograd notice where a tensor that it saved was overwritten."""
    try:
        increment_version(params)
    except (RuntimeError, TypeError):  # older releases (2.4) take one tensor at a time
        for param in params:
            increment_version(param)
