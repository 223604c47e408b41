"""Allocate new state tensors, on a CPU in huge pages if Linux provides them."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_OWN_MAPPING = 2**22  # bytes; allocations of this size get their own memory mapping


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros with the layout of ``param``.

    A step reads whole state tensors; with small pages, it needs an address translation every 4 KiB.
    """
    zeros = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if type(zeros) is Tensor and zeros.is_cpu and not torch.compiler.is_compiling():
        _advise_huge_pages(zeros.data_ptr(), zeros.nbytes)  # before the first write
    return zeros.zero_()


def _advise_huge_pages(address: int, size: int) -> None:
    if size < _OWN_MAPPING or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole_pages = (address + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    # madvise is a hint; ignoring it is harmless.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole_pages), mmap.MADV_HUGEPAGE)
