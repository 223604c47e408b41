"""The CUDA kernel: a few Triton launches a step, over all tensors of one device and dtype."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import operator
from array import array
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..functional import inverse_weight
from .batches import Batches, Group, Item, select
from .layout import Operands, is_sharded, mark_as_written, operands, overlapping, same_layout

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REMEDY = "run `pip install 'triton>=3.2'` (torch 2.6 and newer bring it)"
_OLDEST_TRITON = (3, 2)  # 3.1 and older compute wrong numbers in the interpreter; compiled, they are untested
_is_here = operator.attrgetter("is_cuda")

# A captured graph copies from the same pinned memory and reads the same tables whenever it is replayed, and pinned
# memory may not be had while it is captured: one buffer of each size is kept ready, and what graphs use is kept.
_spare_buffers: dict[int, Tensor] = {}
_used_by_graphs: list[Tensor] = []


@functools.cache
def load() -> Any:
    """Import the Triton kernels; None where Triton is missing or too old, which is logged once."""
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
            raise ImportError(f"found {triton.__version__}")
        from . import dual_update_triton
    except ImportError as error:
        logger.warning(
            "The CUDA kernel of hf_dualadam needs Triton 3.2 (%s), so steps take longer: %s.", error, _REMEDY
        )
        return None
    return dual_update_triton


def unavailable_reason(param: Tensor, group: dict[str, Any]) -> str | None:
    """Say why the kernel cannot update ``param`` with the options of ``group``, or None if it can."""
    if load() is None:
        return f"the CUDA kernel needs Triton 3.2 or newer; {_REMEDY}."
    if param.dtype not in _DTYPES:
        return f"the CUDA kernel does not know {param.dtype}."
    if group["normalize_inverse"] and is_sharded(param):
        return "normalize_inverse=True needs norms of whole tensors, and a parameter is sharded (DTensor)."
    return None


def update(batches: Batches) -> Batches:
    """Count the step and update every tensor that the kernel can take, without waiting for the device.

    Args:
        batches: per parameter group its options and its (param, grad, state) items.

    Returns:
        The batches that the kernel cannot update, in the same form.
    """
    taken, left = select(batches, _is_here, _take)
    if not taken:
        return left
    if load() is None:
        return batches
    addresses, sizes = array("q"), array("q")
    for _, _, (param, *_) in taken:
        addresses.append(param.data_ptr())
        sizes.append(param.numel() * param.element_size())
    shared = overlapping(addresses, sizes)
    launches = defaultdict(list)
    for place, (index, item, tensors) in enumerate(taken):
        group = batches[index][0]
        if place in shared:
            left.append((group, [item]))
        else:
            param, _, exp_avg, *_ = tensors
            launches[param.device, param.dtype, exp_avg.dtype, group["capturable"]].append((index, tensors))
    options = [group for group, _ in batches]
    for (device, *_), part in launches.items():
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _launch(part, options)
    mark_as_written([item[0] for place, (_, item, _) in enumerate(taken) if place not in shared])
    return left


def _take(item: Item, group: Group) -> Operands | None:
    """The tensors that hold the numbers, if the kernel can update them."""
    found = operands(*item, group["normalize_inverse"])
    if found is None or "weight_correction" in item[2]:
        return None
    param, grad, exp_avg, exp_avg_sq, step = found
    state_dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
    fits = (
        param.dtype in _DTYPES
        and grad.dtype == param.dtype
        and exp_avg.dtype == exp_avg_sq.dtype == state_dtype
        and param.device == grad.device == exp_avg.device == exp_avg_sq.device
        and step.device == (param.device if group["capturable"] else torch.device("cpu"))
        and same_layout(param, grad, exp_avg, exp_avg_sq)
    )
    return found if fits else None


def _launch(part: list[tuple[int, Operands]], groups: list[dict[str, Any]]) -> None:
    """One step of tensors that share device, dtypes and ``capturable``; each with the place of its group."""
    kernels = load()
    param, _, exp_avg, *_ = part[0][1]
    device, capturable = param.device, groups[part[0][0]]["capturable"]
    chunks, first_chunks, norm_ratios = _chunks(tuple(tensors[0].numel() for _, tensors in part), device)

    rows, bits = array("q"), 0
    scalar_rows: dict[tuple[int, float], int] = {}
    for place, (index, tensors) in enumerate(part):
        addresses = [t.data_ptr() for t in tensors]
        bits |= addresses[0] | addresses[1] | addresses[2] | addresses[3]
        scalar_row = place if capturable else scalar_rows.setdefault((index, _count(tensors[4])), len(scalar_rows))
        rows.extend((*addresses, tensors[0].numel(), first_chunks[place], scalar_row, index))
    table = _table(rows.tobytes(), torch.int64, device)
    if capturable:
        options = _table(_pack(_options(group) for group in groups), torch.float64, device)
        _fill_in_lr(options, kernels.N_OPTIONS.value, enumerate(groups))
        scalars = torch.empty(len(part) * kernels.N_SCALARS.value, dtype=torch.float64, device=device)
        # Without fused operations, alpha falls to 0 at the same step as on the host.
        kernels.step_scalars_kernel[(len(part),)](table, options, scalars, enable_fp_fusion=False)
    else:
        scalars = _upload(_pack(_scalars(groups[index], t) for index, t in scalar_rows), torch.float64, device)
        _fill_in_lr(
            scalars, kernels.N_SCALARS.value, ((row, groups[index]) for (index, _), row in scalar_rows.items())
        )

    if len(chunks):
        grid = (len(chunks),)
        dtypes = [getattr(kernels.tl, str(t.dtype).removeprefix("torch.")) for t in (param, exp_avg)]
        variant = (*dtypes, kernels.tl.float64 if param.dtype == torch.float64 else kernels.tl.float32, bits % 16 == 0)
        if any(groups[index]["normalize_inverse"] for index, _ in part):
            sums = torch.empty(2 * len(chunks), dtype=torch.float64, device=device)
            norm_ratios = torch.empty_like(norm_ratios)
            kernels.norms_kernel[grid](table, chunks, scalars, sums, *variant, num_warps=8)
            kernels.norm_ratios_kernel[(len(part),)](table, scalars, sums, norm_ratios)
        kernels.update_kernel[grid](table, chunks, scalars, norm_ratios, *variant, num_warps=8)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _used_by_graphs.extend((table, chunks, norm_ratios, scalars, *([options] if capturable else [])))


def _count(step: Tensor) -> float:
    """Count a step on the host; through its address, as a call into torch for each would take longer than the step."""
    counter = ctypes.c_float.from_address(step.data_ptr())
    counter.value += 1
    return counter.value


def _options(group: dict[str, Any]) -> tuple[float, ...]:
    """A row of the table of options; an lr on a device is filled in there."""
    lr = 0.0 if _is_on_device(group["lr"]) else float(group["lr"])
    sign = -1.0 if group["maximize"] else 1.0
    rest = (group[name] for name in ("eps", "weight_decay", "switch_rate", "inverse_scale"))
    return lr, *group["betas"], *rest, sign, float(group["normalize_inverse"])


def _scalars(group: dict[str, Any], step: float) -> tuple[float, ...]:
    """A row of the table of scalars."""
    beta1, beta2 = group["betas"]
    alpha = inverse_weight(step, group["switch_rate"])
    return *_options(group), 1 - beta1**step, (1 - beta2**step) ** -0.5, alpha


def _fill_in_lr(table: Tensor, n_columns: int, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
    for row, group in rows:
        if _is_on_device(group["lr"]):
            table[row * n_columns].copy_(group["lr"].reshape(()))


def _is_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _pack(rows: Iterable[tuple[float, ...]]) -> bytes:
    return array("d", itertools.chain.from_iterable(rows)).tobytes()


@functools.lru_cache(maxsize=16)
def _chunks(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int], Tensor]:
    """The tensor of each chunk, the first chunk of each tensor, and a norm ratio of 1 for each tensor."""
    counts = [-(-numel // load().CHUNK.value) for numel in numels]
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    first = list(itertools.accumulate(counts, initial=0))
    return (
        _upload(owners.numpy().tobytes(), torch.int32, device),
        first,
        torch.ones(len(counts), dtype=torch.float64, device=device),
    )


@functools.lru_cache(maxsize=64)  # addresses seldom change: parameters and states stay, gradients come back to theirs
def _table(content: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _upload(content, dtype, device)


def _upload(content: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a table to the device without waiting for it."""
    host = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        pinned = _spare_buffers.pop(len(content), None) if capturing else _pinned(len(content))
        if pinned is None:
            raise RuntimeError("Take a step with the same parameters before capturing one in a CUDA graph.")
        if capturing:
            _used_by_graphs.append(pinned)
        elif len(content) not in _spare_buffers:
            _spare_buffers[len(content)] = _pinned(len(content))
        host = pinned.copy_(host)
    return host.to(device, non_blocking=True).view(dtype)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
