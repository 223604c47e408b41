"""Storage of an optimizer's state: formats of the moments, and 16-bit weights with a correction.

A format says how a moment tensor is kept between steps; :data:`MOMENT_FORMATS` maps ``state_bits`` to it. The formula
sees decoded moments only. The kernels read and write the same formats in one pass, and are tested against this module.

8-bit moments (ours). Each row, all that lies behind the first dimension, is cut into blocks of 128 elements, so any
split along the first dimension cuts codes and scales where it cuts the parameter.

- ``exp_avg`` (signed): code q in -127..127 stands for sign(q) * (q / 127)^2 * scale, where ``exp_avg_scale`` is the
  block's largest magnitude. Rounded to nearest.
- ``exp_avg_sq`` (>= 0): code 0 is exactly 0; 1..255 are even steps of the float32 bit pattern, a piecewise linear
  logarithm, between ``exp_avg_sq_min`` and ``exp_avg_sq_max``, the block's smallest positive and largest value; the
  smallest is at most 40 octaves below the largest. So v has the same relative error at both ends of its range, as the
  formula needs, which divides by its root and multiplies by it. Rounding is stochastic, since 0.999 * v is less than a
  code away from v and rounding to nearest would drift.

Weights (ours). With ``master_weight_bits``, the weight that is trained is the half-precision parameter plus
``weight_correction``, an integer of 8 or 16 bits per element. For bfloat16 it holds the next 8 or all 16 bits of the
float32 weight's bit pattern; for float16, units of 2^-8 or 2^-16 of the parameter's unit in the last place.

Random bits are a hash of the rounded number's bits and the step count, so they are the same on every process, on every
path and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import zeros_like

BLOCK = 128  # elements that share a scale
MIN_NUMEL, MIN_ROW = 4096, 64  # smaller tensors, and shorter rows, keep 32 bits
OCTAVES = 40  # range of the codes of exp_avg_sq within a block
HALF_DTYPES = (torch.float16, torch.bfloat16)
_INFINITE_BITS, _MAX_INT = 0x7F800000, 0x7FFFFFFF

State = dict[str, Any]


class MomentFormat:
    """How a moment is stored between steps; a subclass says what of a parameter's state belongs to it.

    Every method but :meth:`fits` takes a parameter's state and the name of the moment (``exp_avg``, ``exp_avg_sq``).
    """

    def fits(self, param: Tensor) -> bool:
        """Whether moments of ``param`` can be stored like this; if not, they keep 32 bits."""
        raise NotImplementedError

    def recognizes(self, state: State, name: str) -> bool:
        """Whether the moment in ``state`` is stored like this."""
        raise NotImplementedError

    def zeros(self, param: Tensor, name: str) -> State:
        """The entries of a new state."""
        raise NotImplementedError

    def decode(self, state: State, name: str) -> Tensor:
        """The moment as a floating-point tensor; may be the stored tensor itself."""
        raise NotImplementedError

    def encode_(self, state: State, name: str, moment: Tensor) -> None:
        """Store ``moment`` in the tensors of ``state``, whose ``step`` is that of the moment."""
        raise NotImplementedError


class ExactMoments(MomentFormat):
    """Floating-point moments: of the parameter's dtype, or float32 for float16, whose squares would underflow."""

    def fits(self, param: Tensor) -> bool:
        """Any parameter."""
        return True

    def recognizes(self, state: State, name: str) -> bool:
        """Any floating-point tensor."""
        return bool(state[name].is_floating_point())

    def zeros(self, param: Tensor, name: str) -> State:
        """One tensor like ``param``."""
        return {name: zeros_like(param, exact_dtype(param))}

    def decode(self, state: State, name: str) -> Tensor:
        """The tensor itself."""
        return state[name]

    def encode_(self, state: State, name: str, moment: Tensor) -> None:
        """Round to the stored dtype."""
        if state[name] is not moment:
            state[name].copy_(moment)


class EightBitMoments(MomentFormat):
    """8-bit codes with float32 scales per block of a row, as described at the top of this module."""

    def fits(self, param: Tensor) -> bool:
        """Large enough, in rows that are worth their scales, and if distributed, split along the first dimension."""
        if param.dtype not in (torch.float32, *HALF_DTYPES) or param.dim() < 2 or param.numel() < MIN_NUMEL:
            return False
        if any(placement.is_shard() and placement.dim != 0 for placement in getattr(param, "placements", ())):
            return False
        return param.numel() // param.shape[0] >= MIN_ROW

    def recognizes(self, state: State, name: str) -> bool:
        """8-bit integers."""
        return state[name].dtype in (torch.int8, torch.uint8)

    def zeros(self, param: Tensor, name: str) -> State:
        """Codes like ``param`` but contiguous, and their scales of shape (rows, blocks)."""
        rows = param.shape[0]
        blocks = -(-(param.numel() // rows) // BLOCK)
        dtype, scales = (torch.int8, ["scale"]) if name == "exp_avg" else (torch.uint8, ["min", "max"])
        local = local_tensor(param)
        codes = zeros_like(local.contiguous(), dtype)
        entries = {name: _distributed_like(param, codes, param.shape)}
        for scale in scales:
            values = torch.zeros(local.shape[0], blocks, dtype=torch.float32, device=local.device)
            entries[f"{name}_{scale}"] = _distributed_like(param, values, torch.Size((rows, blocks)))
        return entries

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
            codes, *scales = _encode_signed(blocks)
            names = ["scale"]
        else:
            codes, *scales = _encode_positive(blocks, state["step"])
            names = ["min", "max"]
        local_tensor(state[name]).copy_(_from_blocks(codes, local))
        for scale, values in zip(names, scales):
            local_tensor(state[f"{name}_{scale}"]).copy_(values)


MOMENT_FORMATS: dict[int, MomentFormat] = {32: ExactMoments(), 8: EightBitMoments()}


def format_for(param: Tensor, state_bits: int) -> MomentFormat:
    """The format of a new state: the one asked for, or 32 bits where that does not fit the parameter."""
    wanted = MOMENT_FORMATS[state_bits]
    return wanted if wanted.fits(param) else MOMENT_FORMATS[32]


def format_of(state: State, name: str) -> MomentFormat:
    """The format in which a moment is stored.

    Raises:
        ValueError: none of ours.
    """
    for moment_format in MOMENT_FORMATS.values():
        if moment_format.recognizes(state, name):
            return moment_format
    raise ValueError(f"Invalid state: {name} has {state[name].dtype} - should be a floating-point or 8-bit moment.")


def exact_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments with ``state_bits=32``."""
    return torch.float32 if param.dtype == torch.float16 else param.dtype


# ---- codes of 8-bit moments; x has shape (rows, blocks, 128), scales (rows, blocks) ----


def _encode_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1)
    magnitude = (x.abs() / scale.unsqueeze(-1)).nan_to_num_(0.0, 0.0).sqrt_().mul_(127).round_()
    return magnitude.copysign_(x).to(torch.int8), scale


def _decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    q = codes.float()
    return q * q.abs() * (scale * (1 / 127**2)).unsqueeze(-1)


def _encode_positive(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bits = x.view(torch.int32) & _MAX_INT  # a NaN may have a sign
    high = bits.amax(-1)
    low = torch.where(bits > 0, bits, _MAX_INT).amin(-1)
    low = torch.minimum(torch.maximum(low, high - OCTAVES * 2**23), high)
    position = (bits - low.unsqueeze(-1)).float() / _code_width(low, high) + _dither(bits, step)
    codes = torch.where(bits > 0, position.floor_().clamp_(0, 254).add_(1), 0.0)
    return codes.to(torch.uint8), low.view(torch.float32), high.view(torch.float32)


def _decode_positive(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = low.view(torch.int32), high.view(torch.int32)
    bits = low.unsqueeze(-1) + (codes.int() - 1) * _code_width(low, high)
    return torch.where(codes > 0, bits, 0).view(torch.float32)


def _code_width(low: Tensor, high: Tensor) -> Tensor:
    """Bit patterns per code, as integers."""
    return ((high - low) // 254 + 1).unsqueeze(-1)


def hash_bits(bits: Tensor, step: Any) -> Tensor:
    """32 pseudo-random bits for each int32 of ``bits``, as int64: two rounds of multiplication and shift."""
    seed = (torch.as_tensor(step).long().to(bits.device) * 0x9E3779B1) & _MAX_INT
    mixed = ((bits.long() ^ seed) * 0x9E3779B1) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF


def _dither(bits: Tensor, step: Any) -> Tensor:
    """Uniform numbers in [0, 1) from the upper 24 bits of the hash."""
    return (hash_bits(bits, step) >> 8).float() * 2.0**-24


def _to_blocks(x: Tensor) -> Tensor:
    """Rows cut into blocks and padded with zeros: shape (rows, blocks, 128)."""
    rows = x.reshape(x.shape[0], -1) if x.shape[0] else x.reshape(0, x[:0].flatten(1).shape[1])
    padding = -rows.shape[1] % BLOCK
    return torch.nn.functional.pad(rows, (0, padding)).view(x.shape[0], -1, BLOCK)


def _from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_to_blocks`; ``like`` gives the shape."""
    row = like[0].numel() if like.shape[0] else 0
    return blocks.flatten(1)[:, :row].reshape(like.shape)


# ---- 16-bit weights with a correction ----

CORRECTION_DTYPES = {24: torch.int8, 32: torch.int16}  # by master_weight_bits


def new_correction(param: Tensor, master_weight_bits: int) -> Tensor:
    """Zeros like ``param``: the parameter is the weight."""
    return zeros_like(param, CORRECTION_DTYPES[master_weight_bits])


def read_weight(param: Tensor, correction: Tensor) -> Tensor:
    """The float32 weight of a half-precision parameter and its correction."""
    local, c = local_tensor(param), local_tensor(correction).int()
    if param.dtype == torch.bfloat16:
        bits = (local.contiguous().view(torch.int16).int() << 16) + (c << 8 if correction.dtype == torch.int8 else c)
        weight = bits.view(torch.float32)
    else:
        weight = local.float() + c * (_unit(local) * 2.0 ** -_bits(correction))
    return _distributed_like(param, weight, param.shape)


def write_weight_(param: Tensor, correction: Tensor, weight: Tensor, step: Any) -> None:
    """Split a float32 weight into the nearest half-precision number and the correction, in place.

    With 8 bits of correction, the weight is rounded stochastically to what they can hold, so that updates smaller
    than its unit count on average.
    """
    local, value = local_tensor(param), local_tensor(weight).contiguous()
    bits = value.view(torch.int32)
    if param.dtype == torch.bfloat16:
        if correction.dtype == torch.int8:
            bits = torch.where(value.isfinite(), bits + (hash_bits(bits, step) & 0xFF).int(), bits) & ~0xFF
        upper = torch.where(value.isnan(), bits, bits + 0x8000) >> 16
        c = bits - (upper << 16)
        c = c >> 8 if correction.dtype == torch.int8 else c
        local.copy_(upper.to(torch.int16).view(torch.bfloat16).view_as(local))
    else:
        local.copy_(value)
        exact = (value - local.float()) / (_unit(local) * 2.0 ** -_bits(correction))
        dither = _dither(bits, step) if correction.dtype == torch.int8 else 0.5
        limit = 2 ** (_bits(correction) - 1)
        c = (exact + dither).floor().nan_to_num(0.0).clamp(-limit, limit - 1)
    local_tensor(correction).copy_(c)


def _bits(correction: Tensor) -> int:
    return 8 if correction.dtype == torch.int8 else 16


def _unit(x: Tensor) -> Tensor:
    """The unit in the last place of float16 numbers, in float32."""
    exponent_bits = (x.float().view(torch.int32) & _INFINITE_BITS).clamp_min(113 << 23)  # subnormals share 2^-14's
    return exponent_bits.view(torch.float32) * 2.0**-10


# ---- DTensors: formats work on the shards of this process ----


def local_tensor(x: Tensor) -> Tensor:
    """This process's shard of a DTensor, told by its method since its module is slow to import; else ``x`` itself."""
    to_local: Callable[[], Tensor] | None = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


def _distributed_like(param: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """``local`` as the shard of a tensor of ``shape``, distributed like ``param``."""
    if not hasattr(param, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, param.device_mesh, param.placements, shape=shape, stride=stride)
