"""Norms of the components of the last update: one call of ``part_norms.c`` for all tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .layout import same_layout

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # the field dtype of struct Row
_ROW = struct.Struct("5q2d")
_PROCESS = os.getpid()  # OpenMP's threads do not survive a fork


def is_supported(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether the kernel can read a parameter and its moments.

    Args:
        param: the parameter, or this process's shard of it.
        exp_avg: m, like ``param``.
        exp_avg_sq: v, like ``param``.
    """
    return (
        param.dtype in _DTYPES
        and all(tensor.is_cpu and tensor.dtype == param.dtype for tensor in (param, exp_avg, exp_avg_sq))
        and same_layout(param, param, exp_avg, exp_avg_sq)
        and _function() is not None
    )


def squares(rows: Sequence[tuple[Tensor, Tensor, Tensor, float, float]]) -> list[list[float]]:
    """Squared norms of m/d, m*d, m and the parameter, for each row.

    Args:
        rows: (param, exp_avg, exp_avg_sq, 1 / sqrt(1 - beta2^t), eps) of tensors that are supported.
    """
    function = _function()
    loaded = cpu.load()
    if function is None or loaded is None:
        raise RuntimeError("The CPU kernel of hf_dualadam is not available.")
    fields = b"".join(
        _ROW.pack(p.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel(), _DTYPES[p.dtype], *scalars)
        for p, m, v, *scalars in rows
    )
    results = (ctypes.c_double * (4 * len(rows)))()
    parallel = loaded[1]
    threads = torch.get_num_threads() if parallel and os.getpid() == _PROCESS else 1
    if function(fields, len(rows), results, threads, parallel):
        raise MemoryError("The CPU kernel of hf_dualadam ran out of memory for its table of tensors.")
    return [results[4 * i : 4 * i + 4] for i in range(len(rows))]


@functools.cache
def _function() -> Callable[..., int] | None:
    """The C function; None if the kernel is missing or older than it."""
    if cpu.load() is None:
        return None
    library: Any = ctypes.CDLL(str(Path(__file__).with_name("_dual_update.so")))
    function = getattr(library, "part_norms_1", None)
    if function is not None:
        function.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    return function
