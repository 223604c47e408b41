"""What both kernels ask about tensors before they touch memory by address."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (param, grad, exp_avg, exp_avg_sq, step) of one parameter, and per parameter group its options and these.
Item = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Batches = list[tuple[dict[str, Any], list[Item]]]

_PLAIN = (Tensor, torch.nn.Parameter)


def split(batches: Batches, device_type: str, take: Callable[[Item, dict[str, Any]], Any]):
    """Sort out what a kernel can update.

    Args:
        batches: per parameter group its options and tensors.
        device_type: the kernel's.
        take: called with an item and its group's options; returns what the kernel wants to know of the item, or None
            if it cannot update it.

    Returns:
        A list of (index of the group, item, what ``take`` returned), and the batches that are left: tensors of other
        devices as they came, those of ``device_type`` one by one.
    """
    taken, left = [], []
    for index, (group, items) in enumerate(batches):
        others = []
        for item in items:
            if item[0].device.type != device_type:
                others.append(item)
            elif (known := take(item, group)) is None:
                left.append((group, [item]))
            else:
                taken.append((index, item, known))
        if others:
            left.append((group, others))
    return taken, left


def plain(item: Item, normalize_inverse: bool) -> Item | None:
    """The tensors that hold the numbers: of DTensors, this process's shards; None for other subclasses of Tensor.

    Also None for a DTensor with ``normalize_inverse``, which needs the norms of whole tensors.
    """
    if type(item[0]) in _PLAIN and type(item[1]) in _PLAIN:
        return item
    *tensors, step = item
    if normalize_inverse or not all(map(is_sharded, tensors)):
        return None
    if any(t.placements != tensors[0].placements for t in tensors):
        return None
    shards = [t.to_local() for t in tensors]
    return (*shards, step) if all(type(shard) in _PLAIN for shard in shards) else None


def is_sharded(param: Tensor) -> bool:
    """Whether this is a DTensor, told by its method, since its module is slow to import."""
    return hasattr(type(param), "to_local")


def same_layout(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether place i in memory is the same element of all four, and each element has a place of its own."""
    tensors = (param, grad, exp_avg, exp_avg_sq)
    if grad.is_neg():  # the numbers in memory have the wrong sign
        return False
    if all(t.is_contiguous() for t in tensors):
        return param.shape == grad.shape
    by_stride = sorted(range(param.dim()), key=param.stride, reverse=True)
    return param.permute(by_stride).is_contiguous() and all(
        t.shape == param.shape and t.stride() == param.stride() for t in tensors
    )


def overlapping(spans: array) -> frozenset[int]:
    """Find the tensors that share memory with another one, which no two threads may update at once.

    Args:
        spans: address and number of bytes of each tensor in turn, 64-bit integers.

    Returns:
        Their places in the list.
    """
    return _overlapping(spans.tobytes())


@functools.lru_cache(maxsize=16)  # parameters seldom move
def _overlapping(spans: bytes) -> frozenset[int]:
    numbers = array("q", spans)
    ordered = sorted((start, start + size, i) for i, (start, size) in enumerate(zip(numbers[::2], numbers[1::2])))
    found, reach, last = set(), 0, -1
    for start, end, i in ordered:
        if start < min(reach, end):
            found |= {i, last}
        if end > reach:
            reach, last = end, i
    return frozenset(found)
