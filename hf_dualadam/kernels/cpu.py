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

from .tensors import Batches, Item, is_sharded, overlapping, plain, same_layout, split

logger = logging.getLogger(__name__)

# dual_update.c's enum of dtypes, and bytes per element, by the dtypes of param, grad, exp_avg and exp_avg_sq.
_DTYPES = {
    (torch.float32, torch.float32, torch.float32, torch.float32): (0, 4),
    (torch.float64, torch.float64, torch.float64, torch.float64): (1, 8),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16): (2, 2),
    (torch.float16, torch.float16, torch.float32, torch.float32): (3, 2),
}
_BLANK = (0,) * 5  # the fields of struct Tensor that dual_update.c fills
_N_FIELDS = 13

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
    if group["normalize_inverse"] and is_sharded(param):
        return "normalize_inverse=True needs norms of whole tensors, and a parameter is sharded (DTensor)."
    return None


def update(batches: Batches) -> Batches:
    """Count the step and update, in one pass over memory, every tensor that the kernel can take.

    Args:
        batches: per parameter group its options and its (param, grad, exp_avg, exp_avg_sq, step) tuples.

    Returns:
        What is left, in the same form.
    """
    taken, left = split(batches, "cpu", _row)
    if not taken:
        return left
    if load() is None:
        return batches
    shared = overlapping(array("q", [value for *_, (row, size) in taken for value in (row[0], size)]))
    rows, params = array("q"), []
    for place, (index, item, (row, _)) in enumerate(taken):
        if place in shared:
            left.append((batches[index][0], [item]))
        else:
            rows.extend((*row, index, *_BLANK))
            params.append(item[0])
    _call(rows, array("d", [value for group, _ in batches for value in _options(group)]))
    for param in params:
        increment_version(param)  # autograd then notices where a saved tensor was overwritten
    return left


def _row(item: Item, group: dict[str, Any]) -> tuple[tuple[int, ...], int] | None:
    """The first fields of struct Tensor, up to ``dtype``, and the parameter's size in bytes."""
    item = None if group["capturable"] else plain(item, group["normalize_inverse"])
    if item is None:
        return None
    param, grad, exp_avg, exp_avg_sq, step = item
    dtype, size = _DTYPES.get((param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype), (None, 0))
    if dtype is None or not same_layout(*item[:4]) or not all(t.is_cpu for t in item[1:]):
        return None
    numel = param.numel()
    addresses = (param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), step.data_ptr())
    return (*addresses, numel, dtype), numel * size


def _options(group: dict[str, Any]) -> tuple[float, ...]:
    """The fields of struct Group."""
    names = ("eps", "weight_decay", "switch_rate", "maximize", "normalize_inverse")
    return float(group["lr"]), *group["betas"], *(group[name] for name in names)


def _call(rows: array, groups: array) -> None:
    function, parallel = load()
    n_tensors = len(rows) // _N_FIELDS
    rows.extend((0,) * _N_FIELDS)  # the empty last row
    threads = torch.get_num_threads() if parallel and os.getpid() == _PROCESS else 1
    if function(rows.buffer_info()[0], n_tensors, groups.buffer_info()[0], threads, parallel):
        raise MemoryError("The CPU kernel of hf_dualadam found no memory for the norms of normalize_inverse.")
