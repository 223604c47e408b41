"""The CPU kernel: one call into ``dual_update.c`` a step, over all tensors of all groups."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

logger = logging.getLogger(__name__)

# The values of dual_update.c's enum, by the dtypes of param, grad, exp_avg and exp_avg_sq.
_DTYPES = {
    (torch.float32, torch.float32, torch.float32, torch.float32): 0,
    (torch.float64, torch.float64, torch.float64, torch.float64): 1,
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16): 2,
    (torch.float16, torch.float16, torch.float32, torch.float32): 3,
}
_ROW = 13  # 8-byte fields of struct Tensor in dual_update.c
_PARAM, _NUMEL, _DTYPE = 0, 5, 6  # the places of three of them
_BLANK = (0,) * 5  # the fields that C fills
_PLAIN = (Tensor, torch.nn.Parameter)

_REMEDY = (
    "install a C compiler (gcc or clang) and run `pip install --force-reinstall --no-deps` on hf_dualadam again, or, "
    "in a checkout, `python setup.py build_ext --inplace`"
)

# OpenMP's threads do not survive a fork, and waiting for them would never end: a forked child steps on one thread.
_PROCESS = os.getpid()


@functools.cache
def load():
    """Load the compiled kernel.

    Returns:
        The C function and the address of the OpenMP entry point for it (None: there is none, and steps run on one
        thread). None alone where the kernel is missing, which is logged once.
    """
    path = Path(__file__).with_name("_dual_update.so")
    try:
        function = ctypes.CDLL(str(path)).dual_update
    except OSError as error:
        reason = f"cannot be loaded ({error})" if path.exists() else "was not built"
        logger.warning("The CPU kernel of hf_dualadam %s, so steps take about 7 times longer: %s.", reason, _REMEDY)
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    # torch has loaded its OpenMP runtime for all to see: asking for the name shares it, whichever it is.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return function, parallel and ctypes.cast(parallel, ctypes.c_void_p)


def unavailable_reason(param: Tensor, group: dict[str, Any]) -> str | None:
    """Say why the kernel cannot update ``param`` with the options of ``group``, or None if it can."""
    if load() is None:
        return f"the CPU kernel was not built; {_REMEDY}."
    if not any(param.dtype == dtypes[0] for dtypes in _DTYPES):
        return f"the CPU kernel does not know {param.dtype}."
    if group["capturable"]:
        return "capturable=True is for accelerators, and a parameter is on the CPU."
    if group["normalize_inverse"] and _is_sharded(param):
        return "normalize_inverse=True needs norms of whole tensors, and a parameter is sharded (DTensor)."
    return None


def update(batches: list[tuple[dict[str, Any], list[tuple[Tensor, ...]]]]):
    """Count the step and update, in one pass over memory, every tensor that the kernel can take.

    Args:
        batches: per parameter group its options and its (param, grad, exp_avg, exp_avg_sq, step) tuples.

    Returns:
        What is left, in the same form: tensors of other devices as they came, those of the CPU one by one.
    """
    rows, taken, left = array("q"), [], []
    for index, (group, tensors) in enumerate(batches):
        others = []
        for item in tensors:
            if not item[0].is_cpu:
                others.append(item)
                continue
            row = None if group["capturable"] else _row(item, group["normalize_inverse"])
            if row is None:
                left.append((group, [item]))
            else:
                rows.extend((*row, index, *_BLANK))
                taken.append((group, item))
        if others:
            left.append((group, others))
    if not taken:
        return left
    if load() is None:
        return batches
    shared = _overlapping(rows[_PARAM::_ROW].tobytes(), rows[_NUMEL::_ROW].tobytes(), rows[_DTYPE::_ROW].tobytes())
    left.extend((group, [item]) for row, (group, item) in enumerate(taken) if row in shared)
    taken = [item for row, (_, item) in enumerate(taken) if row not in shared]
    for row in sorted(shared, reverse=True):
        del rows[row * _ROW : (row + 1) * _ROW]
    _call(rows, array("d", [value for group, _ in batches for value in _options(group)]))
    for param, *_ in taken:
        increment_version(param)  # autograd then notices where a saved tensor was overwritten
    return left


def _call(rows: array, groups: array) -> None:
    function, parallel = load()
    n_tensors = len(rows) // _ROW
    rows.extend((0,) * _ROW)
    threads = torch.get_num_threads() if parallel and os.getpid() == _PROCESS else 1
    if function(rows.buffer_info()[0], n_tensors, groups.buffer_info()[0], threads, parallel):
        raise MemoryError("The CPU kernel of hf_dualadam found no memory for the norms of normalize_inverse.")


def _row(item: tuple[Tensor, ...], normalize_inverse: bool) -> tuple[int, ...] | None:
    """The first fields of struct Tensor, up to ``dtype``; None if the kernel cannot take these tensors."""
    if type(item[0]) not in _PLAIN:
        item = None if normalize_inverse else _shards(item)
        if item is None:
            return None
    param, grad, exp_avg, exp_avg_sq, step = item
    dtype = _DTYPES.get((param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype))
    if dtype is None or not _same_layout(item[:4]) or not all(t.is_cpu for t in item) or grad.is_neg():
        return None
    pointers = (param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), step.data_ptr())
    return *pointers, param.numel(), dtype


def _same_layout(tensors: tuple[Tensor, ...]) -> bool:
    """Whether element i in memory is the same element of all, and every element has a place of its own."""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    by_stride = sorted(range(first.dim()), key=first.stride, reverse=True)
    return first.permute(by_stride).is_contiguous() and all(t.stride() == first.stride() for t in tensors)


def _is_sharded(param: Tensor) -> bool:
    return hasattr(type(param), "to_local")  # DTensor, whose module is slow to import


def _shards(item: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """This process's parts of a DTensor with its gradient and moments; None for other subclasses of Tensor."""
    *tensors, step = item
    if not all(map(_is_sharded, tensors)) or any(t.placements != tensors[0].placements for t in tensors):
        return None
    shards = [t.to_local() for t in tensors]
    return (*shards, step) if all(type(shard) in _PLAIN for shard in shards) else None


@functools.lru_cache(maxsize=16)
def _overlapping(pointers: bytes, numels: bytes, dtypes: bytes) -> frozenset[int]:
    """The rows whose parameters share memory with another row's: threads must not update them at once."""
    sizes = (4, 8, 2, 2)
    columns = (array("q", column) for column in (pointers, numels, dtypes))
    spans = sorted((start, start + n * sizes[dtype], row) for row, (start, n, dtype) in enumerate(zip(*columns)) if n)
    found, reach, last = set(), 0, -1
    for start, end, row in spans:
        if start < reach:
            found |= {row, last}
        if end > reach:
            reach, last = end, row
    return frozenset(found)


def _options(group: dict[str, Any]) -> tuple[float, ...]:
    """The fields of struct Group."""
    names = ("eps", "weight_decay", "switch_rate", "maximize", "normalize_inverse")
    return float(group["lr"]), *group["betas"], *(group[name] for name in names)
