"""The CPU kernel: one call into ``dual_update.c`` a step, over all tensors of all groups."""

from __future__ import annotations

import ctypes
import functools
import logging
import operator
import os
import zlib
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..states import BLOCK, HALF_DTYPES, local_tensor
from .batches import Batches, Group, Item, select
from .layout import is_sharded, mark_as_written, operands, overlapping, same_layout

logger = logging.getLogger(__name__)

# dual_update.c's enum of dtypes, and bytes per element.
_DTYPES = {torch.float32: (0, 4), torch.float64: (1, 8), torch.bfloat16: (2, 2), torch.float16: (3, 2)}
# The same for moments: those that occur with a dtype of parameters, beside 8-bit codes.
_MOMENTS = {
    torch.float32: {torch.float32: 0},
    torch.float64: {torch.float64: 1},
    torch.bfloat16: {torch.bfloat16: 2, torch.float32: 0},
    torch.float16: {torch.float32: 0},
}
_CODES = 4
_SCALES = ("exp_avg_scale", "exp_avg_sq_min", "exp_avg_sq_max")
_CORRECTION_BITS = {torch.int8: 8, torch.int16: 16}
_ADDRESS, _SIZE, _N_FIELDS = 0, 9, 15  # places of fields in struct Tensor, and their number

_REMEDY = (
    "install a C compiler (gcc or clang) and run `pip install --force-reinstall --no-deps` on hf_dualadam again, or, "
    "in a checkout, `python setup.py build_ext --inplace`"
)

# OpenMP's threads do not survive a fork, and waiting for them would never end: a forked child steps on one thread.
_PROCESS = os.getpid()


@functools.cache
def load() -> Any:
    """Load the compiled kernel.

    Returns:
        The C function and the address of the OpenMP entry point for it (None: there is none, and steps run on one
        thread). None alone where the kernel is missing, which is logged once.
    """
    path = Path(__file__).with_name("_dual_update.so")
    try:
        library = ctypes.CDLL(str(path))
        reason = None if _is_current(library) else "was built from other sources than those beside it"
    except OSError as error:
        reason = f"cannot be loaded ({error})" if path.exists() else "was not built"
    if reason is not None:
        logger.warning("The CPU kernel of hf_dualadam %s, so steps take about 7 times longer: %s.", reason, _REMEDY)
        return None
    function, pointer = library.dual_update, ctypes.c_void_p
    function.argtypes = (pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int, pointer)
    # torch has loaded its OpenMP runtime for all to see: asking for the name shares it, whichever it is.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return function, parallel and ctypes.cast(parallel, ctypes.c_void_p)


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether a kernel was built from the sources beside it.

    In a checkout it may be older, and would take the arguments for others.
    """
    names = ("dual_update.c", "formula.h", "formats.h")
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in names)
    try:
        return ctypes.c_uint32.in_dll(library, "dual_update_sources").value == zlib.crc32(sources)
    except ValueError:  # a kernel from before the checksum
        return False


def unavailable_reason(param: Tensor, group: dict[str, Any]) -> str | None:
    """Say why the kernel cannot update ``param`` with the options of ``group``, or None if it can."""
    if load() is None:
        return f"the CPU kernel was not built for this version; {_REMEDY}."
    if param.dtype not in _DTYPES:
        return f"the CPU kernel does not know {param.dtype}."
    if group["capturable"]:
        return "capturable=True is for accelerators, and a parameter is on the CPU."
    if group["normalize_inverse"] and is_sharded(param):
        return "normalize_inverse=True needs norms of whole tensors, and a parameter is sharded (DTensor)."
    return None


def update(batches: Batches) -> Batches:
    """Count the step and update, in one pass over memory, every tensor that the kernel can take.

    Args:
        batches: per parameter group its options and its (param, grad, state) items.

    Returns:
        The batches that the kernel cannot update, in the same form.
    """
    taken, left = select(batches, operator.attrgetter("is_cpu"), _row)
    if not taken:
        return left
    if load() is None:
        return batches
    taken.reverse()  # gradient clipping went from first to last: the last gradients are still in the cache
    rows, params = array("q"), []
    for index, item, row in taken:
        rows.extend((*row, index))
        params.append(item[0])
    shared = sorted(overlapping(rows[_ADDRESS::_N_FIELDS], rows[_SIZE::_N_FIELDS]), reverse=True)
    left.extend((batches[taken[place][0]][0], [taken[place][1]]) for place in shared)
    for place in shared:
        del rows[place * _N_FIELDS : (place + 1) * _N_FIELDS], params[place]
    _call(rows, array("d", [value for group, _ in batches for value in _options(group)]))
    mark_as_written(params)
    return left


def _row(item: Item, group: Group) -> tuple[int, ...] | None:
    """The fields of struct Tensor, but for the last."""
    found = None if group["capturable"] else operands(*item, group["normalize_inverse"])
    if found is None:
        return None
    param, grad, exp_avg, exp_avg_sq, step = found
    state = item[2]
    dtype, itemsize = _DTYPES.get(param.dtype, (None, 0))
    if dtype is None or grad.dtype != param.dtype or not all(tensor.is_cpu for tensor in found):
        return None
    correction, correction_bits = _correction(param, state)
    scales: tuple[int, ...] | None = _NO_SCALES
    moments, row = None, param.numel()
    if exp_avg.dtype == exp_avg_sq.dtype:
        moments = _MOMENTS[param.dtype].get(exp_avg.dtype)
    elif exp_avg.dtype == torch.int8 and exp_avg_sq.dtype == torch.uint8 and dtype != _DTYPES[torch.float64][0]:
        scales, moments, row = _scales(param, state), _CODES, param.numel() // max(1, param.shape[0])
    if moments is None or scales is None or correction is None:
        return None
    if not same_layout(param, grad, exp_avg, exp_avg_sq, in_logical_order=moments == _CODES):
        return None
    addresses = (param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), correction, *scales)
    return *addresses, step.data_ptr(), param.numel() * itemsize, row, dtype, moments, correction_bits


_NO_SCALES: tuple[int, ...] = (0, 0, 0)


def _correction(param: Tensor, state: dict[str, Any]) -> tuple[int | None, int]:
    """The address of a weight's correction (0: there is none) and its bits; None where it does not fit."""
    correction = state.get("weight_correction")
    if correction is None:
        return 0, 0
    correction = local_tensor(correction)
    bits = _CORRECTION_BITS.get(correction.dtype, 0)
    fits = correction.is_cpu and correction.shape == param.shape and correction.stride() == param.stride()
    return (correction.data_ptr() if fits and bits and param.dtype in HALF_DTYPES else None), bits


def _scales(param: Tensor, state: dict[str, Any]) -> tuple[int, ...] | None:
    """The addresses of the scales of 8-bit moments; None where they do not fit the parameter."""
    scales = [local_tensor(state[name]) for name in _SCALES]
    shape = (param.shape[0], -(-param.shape[1:].numel() // BLOCK))
    if all(x.is_cpu and x.dtype == torch.float32 and x.shape == shape and x.is_contiguous() for x in scales):
        return tuple(x.data_ptr() for x in scales)
    return None


def _options(group: dict[str, Any]) -> tuple[float, ...]:
    """The fields of struct Group."""
    names = ("eps", "weight_decay", "switch_rate", "inverse_scale", "normalize_inverse", "maximize")
    lr = group["lr"]
    return float(lr.detach() if isinstance(lr, Tensor) else lr), *group["betas"], *(group[name] for name in names)


def _call(rows: array[int], groups: array[float]) -> None:
    function, parallel = load()
    threads = torch.get_num_threads() if parallel and os.getpid() == _PROCESS else 1
    if function(rows.buffer_info()[0], len(rows) // _N_FIELDS, groups.buffer_info()[0], None, threads, parallel):
        raise MemoryError("The CPU kernel of hf_dualadam found no memory for its table of tensors.")
