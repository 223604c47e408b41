"""The CPU kernel: one call of ``dual_update.c`` per step, for all tensors of all groups."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import zlib
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional import inverse_weight, norm_ratio
from ..states import BLOCK, HALF_DTYPES, local_tensor
from . import plan
from .layout import Operands, can_sum_over_shards, mark_as_written, same_layout, sum_over_shards
from .plan import SCALES

logger = logging.getLogger(__name__)

# dual_update.c's enum of dtypes, and bytes per element.
_DTYPES = {torch.float32: (0, 4), torch.float64: (1, 8), torch.bfloat16: (2, 2), torch.float16: (3, 2)}
# By dtype of the parameter, the dtypes of moments in that enum, without 8-bit codes.
_MOMENTS = {
    torch.float32: {torch.float32: 0},
    torch.float64: {torch.float64: 1},
    torch.bfloat16: {torch.bfloat16: 2, torch.float32: 0},
    torch.float16: {torch.float32: 0},
}
_CODES = 4
_CORRECTION_BITS = {torch.int8: 8, torch.int16: 16}
_GRAD, _N_FIELDS = 1, 15  # index of a field of struct Tensor, and the number of fields
_N_SUMS = 4  # sums of squares per tensor
# The C function last_norms scales d, so that float32 holds the squares of both m/d (about 1) and m*d (down to 1e-25,
# for gradients of 3e-13).
SCALE = 2.0**30
SUM_FACTORS = torch.tensor([SCALE**2, SCALE**-2, 1, 1], dtype=torch.float64)

_REMEDY = (
    "install a C compiler (gcc or clang) and run `pip install --force-reinstall --no-deps` on hf_dualadam again, or, "
    "in a checkout, `python setup.py build_ext --inplace`"
)

# OpenMP's threads do not survive a fork, and waiting for them would hang: a forked child uses one thread.
_PROCESS = os.getpid()


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled C source, or the reason why there is none."""
    path = Path(__file__).with_name("_dual_update.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"cannot be loaded ({error})" if path.exists() else "was not built"
    if not _is_current(library):
        return "was built from sources that have changed since"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for function in (library.dual_update, library.dual_norms, library.last_norms):
        function.argtypes = (pointer, number, pointer, pointer, ctypes.c_int, pointer)
    library.read_steps.argtypes, library.read_steps.restype = (pointer, number, pointer), None
    library.count_steps.argtypes, library.count_steps.restype = (pointer, pointer, number, pointer), number
    return library


@functools.cache
def load() -> Any:
    """Load the compiled kernel.

    Returns:
        The library and the address of the OpenMP entry point for it, or None for the latter if torch has none; then
        steps run on one thread. Just None if the kernel is missing, which is logged once.
    """
    library = _library()
    if isinstance(library, str):
        logger.warning("The CPU kernel of hf_dualadam %s, so steps take about 7 times longer: %s.", library, _REMEDY)
        return None
    # The symbols of torch's OpenMP runtime are global: looking up the name finds that runtime, whichever it is.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return library, parallel and ctypes.cast(parallel, ctypes.c_void_p)


def count_steps(steps: array[int], rows: array[int], expected: array[float]) -> bool:
    """Increment the step count of each tensor, in memory.

    Args:
        steps: addresses of the float32 step counts.
        rows: the index in ``expected`` of each tensor.
        expected: float32, the counts that should result.

    Returns:
        Whether they are the counts that result.
    """
    library = _library()
    if not isinstance(library, str):
        tables = (steps.buffer_info()[0], rows.buffer_info()[0], len(steps), expected.buffer_info()[0])
        return not library.count_steps(*tables)
    counters = [*map(ctypes.c_float.from_address, steps)]
    for counter in counters:
        counter.value += 1
    return all(counter.value == expected[row] for counter, row in zip(counters, rows))


def read_steps(steps: array[int]) -> array[float]:
    """The float32 step counts at some addresses."""
    library = _library()
    if isinstance(library, str):
        return array("f", [ctypes.c_float.from_address(address).value for address in steps])
    counts = array("f", [0]) * len(steps)
    library.read_steps(steps.buffer_info()[0], len(steps), counts.buffer_info()[0])
    return counts


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether a kernel was built from the sources next to it.

    In a checkout, it may be older and misread the arguments.
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
        return f"the CPU kernel does not support {param.dtype}."
    if group["capturable"]:
        return "capturable=True is for accelerators, and a parameter is on the CPU."
    if group["normalize_inverse"] and not can_sum_over_shards(param):
        return (
            "normalize_inverse=True needs norms of whole tensors, and a parameter is neither sharded nor replicated."
        )
    return None


class Part(plan.Part):
    """The tensors on the CPU, as the table that the C functions read."""

    def __init__(self, members: list[plan.Member], *args: Any) -> None:
        """Fill in the table; from step to step, only the addresses of gradients change."""
        members = members[::-1]  # gradient clipping goes from first to last: the last gradients are still in the cache
        super().__init__(members, *args)
        self._rows = array("q")
        self._grads: list[int] = []  # the addresses in the table
        for member in members:
            self._rows.extend((*member.row, member.group))

    def run(self, found: plan.Found, groups: list[plan.Group]) -> None:
        """Count the step and update, in one pass over memory."""
        if found.grad_addresses is not self._grads:
            self._grads = found.grad_addresses
            self._rows[_GRAD::_N_FIELDS] = array("q", self._grads)
        options = _table_of_options(groups)
        ratios = self._norm_ratios(found, groups, options) if self.sharded else None
        _call("dual_update", self._rows, options, ratios)
        mark_as_written(found.owners)

    def _norm_ratios(self, found: plan.Found, groups: list[plan.Group], options: array[float]) -> Tensor | None:
        """The scale of each tensor's inverse update, from the norms of all its shards; None if none is normalized."""
        normalized = torch.tensor([groups[index]["normalize_inverse"] for index in self.groups])
        counts = self.counts()
        weights = (inverse_weight(t + 1, groups[index]["switch_rate"]) for index, t in {*zip(self.groups, counts)})
        if not normalized.any() or not any(weights):
            return None
        sums = torch.empty(len(counts), _N_SUMS, dtype=torch.float64)
        _call("dual_norms", self._rows, options, sums)
        sums = sums[:, :2].contiguous()
        sum_over_shards(sums, found.owners)
        return torch.where(normalized, norm_ratio(*sums.sqrt_().unbind(1)), 1.0)

    def counts(self) -> array[float]:
        """The step counts of all tensors."""
        return read_steps(self.addresses[3])

    def last_norms(self, found: plan.Found, groups: list[plan.Group]) -> Tensor:
        """Measure the last step in one pass."""
        sums = torch.empty(len(self.groups), _N_SUMS, dtype=torch.float64)
        _call("last_norms", self._rows, _table_of_options(groups), sums)
        return sums.mul_(SUM_FACTORS)


def is_here(param: Tensor) -> bool:
    """Whether the parameter is on the CPU and the kernel is available."""
    return param.is_cpu and load() is not None


def prepare(item: plan.Item, tensors: Operands, group: plan.Group) -> tuple[str, tuple[int, ...]] | None:
    """The fields of struct Tensor except the last; one part holds all tensors that the kernel can update."""
    param, grad, exp_avg, exp_avg_sq, step = tensors
    if group["capturable"] or group["normalize_inverse"] and not can_sum_over_shards(item[0]):
        return None
    state = item[2]
    dtype, itemsize = _DTYPES.get(param.dtype, (None, 0))
    if dtype is None or grad.dtype != param.dtype or step.dtype != torch.float32:
        return None
    if not all(tensor.is_cpu for tensor in tensors):
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
    return "cpu", (*addresses, step.data_ptr(), param.numel() * itemsize, row, dtype, moments, correction_bits)


_NO_SCALES: tuple[int, ...] | None = (0, 0, 0)


def _correction(param: Tensor, state: dict[str, Any]) -> tuple[int | None, int]:
    """The address of a weight's correction (0 if there is none, None if it does not fit) and its bits."""
    correction = state.get("weight_correction")
    if correction is None:
        return 0, 0
    correction = local_tensor(correction)
    bits = _CORRECTION_BITS.get(correction.dtype, 0)
    fits = correction.is_cpu and correction.shape == param.shape and correction.stride() == param.stride()
    return (correction.data_ptr() if fits and bits and param.dtype in HALF_DTYPES else None), bits


def _scales(param: Tensor, state: dict[str, Any]) -> tuple[int, ...] | None:
    """The addresses of the scales of 8-bit moments; None if they do not fit the parameter."""
    scales = [local_tensor(state[name]) for name in SCALES]
    shape = (param.shape[0], -(-param.shape[1:].numel() // BLOCK))
    if all(x.is_cpu and x.dtype == torch.float32 and x.shape == shape and x.is_contiguous() for x in scales):
        return tuple(x.data_ptr() for x in scales)
    return None


def _options(group: dict[str, Any]) -> tuple[float, ...]:
    """The fields of struct Group."""
    names = ("eps", "weight_decay", "switch_rate", "inverse_scale", "normalize_inverse", "maximize")
    lr = group["lr"]
    return float(lr.detach() if isinstance(lr, Tensor) else lr), *group["betas"], *(group[name] for name in names)


def _table_of_options(groups: list[dict[str, Any]]) -> array[float]:
    return array("d", [value for group in groups for value in _options(group)])


def _call(name: str, rows: array[int], groups: array[float], numbers: Tensor | None) -> None:
    """Call a C function; ``numbers`` holds the norm ratios it reads or the sums of squares it writes."""
    library, parallel = load()
    threads = torch.get_num_threads() if parallel and os.getpid() == _PROCESS else 1
    address = None if numbers is None else numbers.data_ptr()
    tables = (rows.buffer_info()[0], len(rows) // _N_FIELDS, groups.buffer_info()[0])
    if getattr(library, name)(*tables, address, threads, parallel):
        raise MemoryError("The CPU kernel of hf_dualadam ran out of memory for its table of tensors.")
