"""Storage of an optimizer's state: formats of the moments, and 16-bit weights with a correction.

A format defines how a moment tensor is stored between steps; :data:`MOMENT_FORMATS` maps ``state_bits`` to it. The
formula sees only decoded moments. The kernels read and write the same formats in one pass, and are tested against this
module.

8-bit moments (ours). Each row (all dimensions but the first, flattened) is divided into blocks of 128 elements, so
that a split along the first dimension splits parameter, codes and scales alike.

- ``exp_avg`` (signed): code q in -127..127 represents sign(q) * (q / 127)^2 * scale; ``exp_avg_scale`` is the block's
  largest magnitude. Magnitudes below code 1 become 0, and those from code 16 on are rounded to nearest. Between the
  two, 0.9 * m is less than half a code away from m, so rounding to nearest would keep m from decaying.
- ``exp_avg_sq`` (>= 0): code 0 is exactly 0; codes 1..255 are equal steps of the float32 bit pattern, a piecewise
  linear logarithm, between ``exp_avg_sq_min`` and ``exp_avg_sq_max``, the block's smallest positive and largest value.
  A minimum more than 40 octaves below the maximum is raised to that. So v has the same relative error at both ends of
  its range, as the formula requires, which both divides and multiplies by the root of v. 0.999 * v is less than a code
  away from v, so rounding to nearest would drift.

An infinite or NaN moment spreads to its block: in ``exp_avg`` all elements become NaN, in ``exp_avg_sq`` all nonzero
ones.

Weights (ours). With ``master_weight_bits``, the trained weight is the half-precision parameter plus
``weight_correction``, an integer of 8 or 16 bits per element. For bfloat16 it holds the next 8 or all 16 bits of the
float32 weight's bit pattern; for float16, it counts 1/254 or 1/65534 of the parameter's unit in the last place, so
that half a unit is a whole number and a parameter and its correction can represent every weight.

Where rounding to nearest would be biased, :func:`dither` of the step is added before rounding down. Over the steps it
takes all values in [0, 1) equally often, so the rounding is unbiased, like stochastic rounding but with less noise,
and it is the same on every process, on every path and after resuming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import zeros_like

BLOCK = 128  # elements that share a scale
MIN_NUMEL, MIN_ROW = 4096, 64  # smaller tensors, and shorter rows, keep 32 bits
OCTAVES = 40  # range of the codes of exp_avg_sq within a block
DITHERED_CODES = 16  # codes of exp_avg below this are not rounded to nearest
HALF_DTYPES = (torch.float16, torch.bfloat16)
_INFINITE_BITS, _MAX_INT = 0x7F800000, 0x7FFFFFFF

State = dict[str, Any]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shapes and dtypes by name


class MomentFormat:
    """A storage format of a moment. A new format is a subclass and an entry in :data:`MOMENT_FORMATS`.

    A moment consists of an entry in the parameter's state with the moment's name and the parameter's shape, and of
    further entries whose names start with the moment's, such as scales. For a distributed parameter, all of them are
    distributed along the same dimensions, and decoding and encoding work on this process's shards.
    """

    def fits(self, param: Tensor) -> bool:
        """Whether moments of ``param`` can be stored in this format; if not, they have 32 bits."""
        raise NotImplementedError

    def recognizes(self, state: State, name: str) -> bool:
        """Whether the moment ``name`` in ``state`` is stored in this format."""
        raise NotImplementedError

    def layout(self, param: Tensor, name: str, dtype: torch.dtype) -> Layout:
        """The entries of the state for a moment of zeros.

        Args:
            param: the parameter.
            name: ``exp_avg`` or ``exp_avg_sq``.
            dtype: dtype of the uncompressed moment, see :func:`exact_dtype`.
        """
        raise NotImplementedError

    def decode(self, state: State, name: str) -> Tensor:
        """The moment as a floating-point tensor; may be the stored tensor itself."""
        raise NotImplementedError

    def encode_(self, state: State, name: str, moment: Tensor) -> None:
        """Store ``moment`` in the tensors of ``state``, whose ``step`` is that of the moment."""
        raise NotImplementedError


class ExactMoments(MomentFormat):
    """Floating-point moments, see :func:`exact_dtype`."""

    def fits(self, param: Tensor) -> bool:
        """Any parameter."""
        return True

    def recognizes(self, state: State, name: str) -> bool:
        """Any floating-point tensor."""
        return bool(state[name].is_floating_point())

    def layout(self, param: Tensor, name: str, dtype: torch.dtype) -> Layout:
        """One tensor like ``param``."""
        return {name: (tuple(param.shape), dtype)}

    def decode(self, state: State, name: str) -> Tensor:
        """The tensor itself."""
        moment: Tensor = state[name]
        return moment

    def encode_(self, state: State, name: str, moment: Tensor) -> None:
        """Round to the stored dtype."""
        if state[name] is not moment:
            state[name].copy_(moment)


class EightBitMoments(MomentFormat):
    """8-bit codes with float32 scales per block of a row, as described at the top of this module."""

    def fits(self, param: Tensor) -> bool:
        """Whether ``param`` is large enough, has long rows and, if distributed, is split along the first dimension."""
        if param.dtype not in (torch.float32, *HALF_DTYPES) or param.dim() < 2 or param.numel() < MIN_NUMEL:
            return False
        if any(getattr(placement, "dim", 0) != 0 for placement in getattr(param, "placements", ())):
            return False
        return param.numel() // param.shape[0] >= MIN_ROW

    def recognizes(self, state: State, name: str) -> bool:
        """8-bit integers."""
        return state[name].dtype in (torch.int8, torch.uint8)

    def layout(self, param: Tensor, name: str, dtype: torch.dtype) -> Layout:
        """Codes like ``param``, and their scales of shape (rows, blocks)."""
        rows = param.shape[0] if param.dim() else 1
        scales = (rows, -(-(param.numel() // max(1, rows)) // BLOCK))
        if name == "exp_avg":
            return {name: (tuple(param.shape), torch.int8), "exp_avg_scale": (scales, torch.float32)}
        ends = {f"{name}_{end}": (scales, torch.float32) for end in ("min", "max")}
        return {name: (tuple(param.shape), torch.uint8), **ends}

    def decode(self, state: State, name: str) -> Tensor:
        """The moment in float32."""
        stored = state[name]
        codes = _to_blocks(local_tensor(stored))
        if name == "exp_avg":
            moment = _decode_signed(codes, local_tensor(state["exp_avg_scale"]))
        else:
            low, high = (local_tensor(state[f"{name}_{end}"]) for end in ("min", "max"))
            moment = _decode_positive(codes, low, high)
        return _distributed_like(stored, _from_blocks(moment, local_tensor(stored)), stored.shape)

    def encode_(self, state: State, name: str, moment: Tensor) -> None:
        """Round to codes with new scales."""
        local = local_tensor(moment).float()
        blocks = _to_blocks(local)
        if name == "exp_avg":
            codes, *scales = _encode_signed(blocks, state["step"])
            names = ["scale"]
        else:
            codes, *scales = _encode_positive(blocks, state["step"])
            names = ["min", "max"]
        local_tensor(state[name]).copy_(_from_blocks(codes, local))
        for scale, values in zip(names, scales):
            local_tensor(state[f"{name}_{scale}"]).copy_(values)


MOMENT_FORMATS: dict[int, MomentFormat] = {32: ExactMoments(), 8: EightBitMoments()}


def format_for(param: Tensor, state_bits: int) -> MomentFormat:
    """The format of a new state: the one requested, or 32 bits if it does not support the parameter."""
    wanted = MOMENT_FORMATS[state_bits]
    return wanted if wanted.fits(param) else MOMENT_FORMATS[32]


def format_of(state: State, name: str) -> MomentFormat:
    """The format in which a moment is stored: the one with the fewest bits that recognizes it.

    Raises:
        ValueError: no format recognizes it.
    """
    for _, moment_format in sorted(MOMENT_FORMATS.items()):
        if moment_format.recognizes(state, name):
            return moment_format
    raise ValueError(f"Invalid state: {name} has {state[name].dtype} - should be a floating-point or 8-bit moment.")


def exact_dtype(param: Tensor, master_weight_bits: int | None = None) -> torch.dtype:
    """The dtype of a parameter's moments with ``state_bits=32``.

    The parameter's dtype, but float32 for float16, whose squares would underflow, and for weights of 24 or 32 bits.
    """
    wide = param.dtype == torch.float16 or (master_weight_bits is not None and param.dtype in HALF_DTYPES)
    return torch.float32 if wide else param.dtype


def new_moment(moment_format: MomentFormat, param: Tensor, name: str, dtype: torch.dtype) -> State:
    """The entries of the state for a moment of zeros; ``dtype`` is that of :func:`exact_dtype`."""
    layout = moment_format.layout(param, name, dtype)
    return {key: _zeros(param, shape, entry_dtype) for key, (shape, entry_dtype) in layout.items()}


# ---- codes of 8-bit moments; x has shape (rows, blocks, 128), scales (rows, blocks) ----


def _encode_signed(x: Tensor, step: Any) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1)
    usable = (scale > 0) & (scale < math.inf)
    codes_per_root = torch.where(usable, 127 / scale.sqrt(), 0.0).unsqueeze(-1)
    position = torch.where(usable.unsqueeze(-1), x, 0.0).abs().sqrt_().mul_(codes_per_root)
    rounded = torch.where(position < DITHERED_CODES, position + dither(step, x.device), position + 0.5).floor_()
    codes = torch.where(position < 1, 0.0, rounded)
    return codes.copysign_(x).to(torch.int8), scale


def _decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    q = codes.float()
    return q * q.abs() * (scale * (1 / 127**2)).unsqueeze(-1)


def _encode_positive(x: Tensor, step: Any) -> tuple[Tensor, Tensor, Tensor]:
    bits = x.view(torch.int32) & _MAX_INT  # NaN can have a sign
    high = bits.amax(-1)
    low = torch.where(bits > 0, bits, _MAX_INT).amin(-1)
    low = torch.minimum(torch.maximum(low, high - OCTAVES * 2**23), high)
    low = torch.where(high < _INFINITE_BITS, low, high)
    above = (bits - low.unsqueeze(-1)).clamp_min_(0).float()
    position = above * (1 / _code_width(low, high).float()) + (1 + dither(step, x.device))
    codes = torch.where(bits > 0, position.floor_().clamp_(max=255), 0.0)
    return codes.to(torch.uint8), low.view(torch.float32), high.view(torch.float32)


def _decode_positive(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = low.view(torch.int32), high.view(torch.int32)
    bits = low.unsqueeze(-1) + (codes.int() - 1) * _code_width(low, high)
    return torch.where(codes > 0, bits, 0).view(torch.float32)


def _code_width(low: Tensor, high: Tensor) -> Tensor:
    """Bit patterns per code, as integers."""
    return ((high - low) // 254 + 1).unsqueeze(-1)


def dither_bits(step: Any, device: torch.device | None = None) -> Any:
    """32 bits for a step: the step times 2^32 / (golden ratio), modulo 2^32.

    Of all such sequences of multiples, this one is distributed most evenly over any range of steps.

    Args:
        step: a number or a 0-dim tensor.
        device: of the result, if ``step`` is a tensor.

    Returns:
        An int, or a 0-dim int64 tensor.
    """
    count = step.to(device).long() if isinstance(step, Tensor) else int(step)
    return count * 0x9E3779B1 & 0xFFFFFFFF


def dither(step: Any, device: torch.device | None = None) -> Any:
    """A number in [0, 1) for a step, a float or a 0-dim float32 tensor: the upper 24 bits of :func:`dither_bits`."""
    bits = dither_bits(step, device) >> 8
    return (bits.float() if isinstance(bits, Tensor) else bits) * 2.0**-24


def _to_blocks(x: Tensor) -> Tensor:
    """Divide rows into blocks, padded with zeros: shape (rows, blocks, 128)."""
    rows = x.reshape(x.shape[0], x.shape[1:].numel())
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).view(x.shape[0], -1, BLOCK)


def _from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_to_blocks`; ``like`` gives the shape."""
    return blocks.flatten(1)[:, : like.shape[1:].numel()].reshape(like.shape)


# ---- 16-bit weights with a correction ----

CORRECTION_DTYPES = {24: torch.int8, 32: torch.int16}  # by master_weight_bits


def new_correction(param: Tensor, master_weight_bits: int) -> Tensor:
    """Zeros like ``param``: the parameter is the weight."""
    return zeros_like(param, CORRECTION_DTYPES[master_weight_bits])


def read_weight(param: Tensor, correction: Tensor) -> Tensor:
    """The float32 weight of a half-precision parameter and its correction."""
    local, c = local_tensor(param), local_tensor(correction).int()
    if param.dtype == torch.bfloat16:
        upper = local.contiguous().view(torch.int16).int() << 16
        weight = (upper + c * 2 ** (16 - _bits(correction))).view(torch.float32)
    else:
        weight = local.float() + c * _unit(local) * (1 / (2 ** _bits(correction) - 2))
    return _distributed_like(param, weight, param.shape)


def write_weight_(param: Tensor, correction: Tensor, weight: Tensor, step: Any) -> None:
    """Split a float32 weight into the nearest half-precision number and the correction, in place.

    With 8 bits of correction, the weight is first rounded to their precision with dither, so that updates smaller
    than the rounding unit accumulate on average.
    """
    local, value = local_tensor(param), local_tensor(weight).contiguous()
    if param.dtype == torch.bfloat16:
        bits = value.view(torch.int32)
        if _bits(correction) == 8:
            offset = dither_bits(step, bits.device) >> 24
            bits = torch.where(value.isfinite(), bits + offset, bits) & ~0xFF
        upper = torch.where(value.isnan(), bits, bits + 0x8000) >> 16
        local.copy_(upper.to(torch.int16).view(torch.bfloat16))
        c = (bits - (upper << 16)) >> (16 - _bits(correction))
    else:
        local.copy_(value)
        position = (value - local.float()) / _unit(local) * (2 ** _bits(correction) - 2)
        c = (position + (dither(step, value.device) if _bits(correction) == 8 else 0.5)).floor().nan_to_num(0.0)
    local_tensor(correction).copy_(c)


def _bits(correction: Tensor) -> int:
    return 8 * correction.element_size()


def _unit(x: Tensor) -> Tensor:
    """Unit in the last place of float16 numbers, as float32."""
    exponent_bits = (x.float().view(torch.int32) & _INFINITE_BITS).clamp_min(113 << 23)  # subnormals: that of 2^-14
    return exponent_bits.view(torch.float32) * 2.0**-10


# ---- DTensors: formats work on the shards of this process ----


def local_tensor(x: Tensor) -> Tensor:
    """This process's shard of a DTensor; other tensors unchanged. Checks for the method: the import is slow."""
    to_local: Callable[[], Tensor] | None = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


def _zeros(param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros distributed like ``param``, and with its strides if they have its shape."""
    if param.shape == shape:
        return zeros_like(param, dtype)
    local = local_tensor(param)
    zeros = torch.zeros(local.shape[0], *shape[1:], dtype=dtype, device=local.device)
    return _distributed_like(param, zeros, torch.Size(shape))


def _distributed_like(param: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """``local`` as the shard of a tensor of ``shape``, distributed like ``param``."""
    if not hasattr(param, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, param.device_mesh, param.placements, shape=shape, stride=stride)
