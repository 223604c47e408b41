"""What both kernels ask about tensors before they touch memory by address, and the memory of new states."""

from __future__ import annotations

import ctypes
import functools
import mmap
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

# (param, grad, exp_avg, exp_avg_sq, step) of one parameter, and per parameter group its options and these.
Item = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Batches = list[tuple[dict[str, Any], list[Item]]]

_PLAIN = (Tensor, torch.nn.Parameter)
_MAPPED_FOR_ITSELF = 2**22  # bytes


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the layout of ``param``, if on the CPU in large pages where Linux has them.

    A step goes through all of a state tensor, and on small pages looks up the address of each 4 KiB anew.
    """
    zeros = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if type(zeros) is Tensor and zeros.is_cpu and not torch.compiler.is_compiling():
        _advise_huge_pages(zeros.data_ptr(), zeros.nbytes)  # before anything touches it
    return zeros.zero_()


def _advise_huge_pages(address: int, size: int) -> None:
    """Ask for large pages in memory that is large enough to be mapped for itself."""
    if size < _MAPPED_FOR_ITSELF or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole_pages = (address + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    # Advice: where it is not taken, nothing is lost.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole_pages), mmap.MADV_HUGEPAGE)


def split(batches: Batches, is_here: Callable[[Tensor], bool], take: Callable[[Item, dict[str, Any]], Any]):
    """Sort out what a kernel can update.

    Args:
        batches: per parameter group its options and tensors.
        is_here: whether a parameter is on the kernel's kind of device.
        take: called with an item and its group's options; returns what the kernel wants to know of the item, or None
            if it cannot update it.

    Returns:
        A list of (index of the group, item, what ``take`` returned), and the batches that are left: tensors of other
        devices as they came, those of this one by one.
    """
    taken, left = [], []
    for index, (group, items) in enumerate(batches):
        others = []
        for item in items:
            if not is_here(item[0]):
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
    if grad.is_neg():  # the numbers in memory have the wrong sign
        return False
    numel = param.numel()
    if not numel == grad.numel() == exp_avg.numel() == exp_avg_sq.numel():
        return False
    if param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous():
        return True
    by_stride = sorted(range(param.dim()), key=param.stride, reverse=True)
    strides = {t.stride() for t in (param, grad, exp_avg, exp_avg_sq)}
    return len(strides) == 1 and param.permute(by_stride).is_contiguous()


def overlapping(addresses: array, sizes: array) -> frozenset[int]:
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
    except TypeError:  # torch < 2.6 takes them one by one
        for param in params:
            increment_version(param)
