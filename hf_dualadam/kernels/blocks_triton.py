"""8-bit moments and corrected weights in the CUDA kernel: the formats of states.py, read and written in one pass.

A program updates 8 blocks, each of elements that share a scale, as an array of shape (block, element). See
dual_update_triton.py for the formula and tables.py for the tables.
"""

import triton
import triton.language as tl

from . import tables
from .dual_update_triton import _moments, _pointers, _scaled_square_sum, _sqrt


@triton.jit
def _load(pointers, inside, whole: tl.constexpr):
    """Load elements; without a mask if the blocks are `whole`, so that each load can be wide."""
    if whole:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, inside, other=0)
    return values


@triton.jit
def _store(pointers, values, inside, whole: tl.constexpr):
    if whole:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, inside)


@triton.jit
def _codes_at(address, i, dtype: tl.constexpr, aligned: tl.constexpr):
    """Pointers to the integers i of the array at an address."""
    start = address.to(tl.pointer_type(dtype))
    if aligned:
        start = tl.multiple_of(start, 16)
    return start + i


@triton.jit
def _unit(param):
    """The unit in the last place of float16 numbers, given as float32."""
    exponent = param.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent, 113 << 23).to(tl.float32, bitcast=True) * 2.0**-10  # subnormals share 2^-14's


@triton.jit
def _read_weight(param, correction, bits: tl.constexpr, param_dtype: tl.constexpr):
    """The trained weight, in float32, as in states.read_weight."""
    if bits == 0:
        weight = param.to(tl.float32)
    elif param_dtype == tl.bfloat16:
        upper = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
        weight = (upper + correction.to(tl.int32) * (1 << (16 - bits))).to(tl.float32, bitcast=True)
    else:
        weight = param.to(tl.float32)
        weight += correction.to(tl.float32) * _unit(weight) * (1 / ((1 << bits) - 2))
    return weight


@triton.jit
def _split_weight(weight, dither, bits: tl.constexpr, param_dtype: tl.constexpr):
    """The parameter and its correction, as in states.write_weight_."""
    if bits == 0:
        param = weight.to(param_dtype)
        correction = param
    elif param_dtype == tl.bfloat16:
        pattern = weight.to(tl.int32, bitcast=True)
        magnitude = pattern & 0x7FFFFFFF
        if bits == 8:
            pattern = tl.where(magnitude < 0x7F800000, pattern + (dither * 256).to(tl.int32), pattern) & -256
        upper = tl.where(magnitude > 0x7F800000, pattern, pattern + 0x8000) >> 16
        param = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
        correction = (pattern - (upper << 16)) >> (16 - bits)
    else:
        param = weight.to(tl.float16)
        rounded = param.to(tl.float32)
        position = (weight - rounded) / _unit(rounded) * ((1 << bits) - 2)
        if bits == 8:
            position = tl.floor(position + dither)
        else:
            position = tl.floor(position + 0.5)
        correction = tl.where(position == position, position, 0.0).to(tl.int32)
    return param, correction


@triton.jit
def _read_codes(tensor, i, inside, blocks, inside_blocks, whole: tl.constexpr):
    """Decode m and v of some blocks, as in states._decode_signed and _decode_positive."""
    codes = _load(_codes_at(tl.load(tensor + tables.EXP_AVG), i, tl.int8, whole), inside, whole).to(tl.float32)
    scales = _codes_at(tl.load(tensor + tables.EXP_AVG_SCALE), blocks, tl.float32, False)
    scale = _load(scales, inside_blocks, whole)
    exp_avg = codes * tl.abs(codes) * (scale * (1 / 127**2))[:, None]
    codes = _load(_codes_at(tl.load(tensor + tables.EXP_AVG_SQ), i, tl.uint8, whole), inside, whole).to(tl.int32)
    low = _load(_codes_at(tl.load(tensor + tables.EXP_AVG_SQ_MIN), blocks, tl.int32, False), inside_blocks, whole)
    high = _load(_codes_at(tl.load(tensor + tables.EXP_AVG_SQ_MAX), blocks, tl.int32, False), inside_blocks, whole)
    bits = low[:, None] + (codes - 1) * ((high - low) // 254 + 1)[:, None]
    return exp_avg, tl.where(codes > 0, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _write_exp_avg(tensor, exp_avg, dither, i, inside, blocks, inside_blocks, whole: tl.constexpr):
    """Encode m of some blocks, as in states._encode_signed. Bit patterns sort like magnitudes, with NaN on top."""
    pattern = exp_avg.to(tl.int32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    if not whole:
        magnitude = tl.where(inside, magnitude, 0)
    largest = tl.max(magnitude, 1)
    scale = largest.to(tl.float32, bitcast=True)
    usable = (largest > 0) & (largest < 0x7F800000)
    codes_per_root = tl.where(usable, 127 / _sqrt(tl.where(usable, scale, 1.0)), 0.0)
    root = _sqrt(tl.where(usable[:, None], magnitude, 0).to(tl.float32, bitcast=True))
    position = root * codes_per_root[:, None]
    code = tl.floor(position + tl.where(position < 16, dither, 0.5)).to(tl.int32)
    code = tl.where(position < 1, 0, tl.where(pattern < 0, -code, code))
    _store(_codes_at(tl.load(tensor + tables.EXP_AVG), i, tl.int8, whole), code.to(tl.int8), inside, whole)
    _store(_codes_at(tl.load(tensor + tables.EXP_AVG_SCALE), blocks, tl.float32, False), scale, inside_blocks, whole)


@triton.jit
def _write_exp_avg_sq(tensor, exp_avg_sq, dither, i, inside, blocks, inside_blocks, whole: tl.constexpr):
    """Encode v of some blocks, as in states._encode_positive."""
    bits = exp_avg_sq.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not whole:
        bits = tl.where(inside, bits, 0)
    high = tl.max(bits, 1)
    low = tl.min(tl.where(bits > 0, bits, 0x7FFFFFFF), 1)
    low = tl.minimum(tl.maximum(low, high - 40 * (1 << 23)), high)
    low = tl.where(high < 0x7F800000, low, high)
    codes_per_bit = 1 / ((high - low) // 254 + 1).to(tl.float32)
    above = tl.maximum(bits - low[:, None], 0).to(tl.float32)
    code = tl.minimum(tl.floor(above * codes_per_bit[:, None] + dither).to(tl.int32), 254) + 1
    code = tl.where(bits > 0, code, 0)
    _store(_codes_at(tl.load(tensor + tables.EXP_AVG_SQ), i, tl.uint8, whole), code.to(tl.uint8), inside, whole)
    _store(_codes_at(tl.load(tensor + tables.EXP_AVG_SQ_MIN), blocks, tl.int32, False), low, inside_blocks, whole)
    _store(_codes_at(tl.load(tensor + tables.EXP_AVG_SQ_MAX), blocks, tl.int32, False), high, inside_blocks, whole)


@triton.jit
def _blocks(tensor, first_block):
    """The elements and blocks of a program. No block crosses a row, so the last one of a row may be shorter."""
    row = tl.load(tensor + tables.ROW)
    blocks_in_row = tl.cdiv(row, tables.BLOCK)
    blocks = first_block + tl.arange(0, tables.BLOCKS)
    inside_blocks = blocks < tl.load(tensor + tables.NUMEL) // row * blocks_in_row
    column = (blocks % blocks_in_row * tables.BLOCK)[:, None] + tl.arange(0, tables.BLOCK)[None, :]
    i = (blocks // blocks_in_row * row)[:, None] + column
    return i, inside_blocks[:, None] & (column < row), blocks, inside_blocks


@triton.jit
def _update_blocks(
    tensor,
    grad_address,
    s,
    norm_ratio,
    i,
    inside,
    blocks,
    inside_blocks,
    param_dtype: tl.constexpr,
    correction_bits: tl.constexpr,
    whole: tl.constexpr,
):
    """Update some blocks in place: all loads, the formula, all stores."""
    params = _pointers(tl.load(tensor + tables.PARAM), i, param_dtype, whole)
    param = _load(params, inside, whole)
    grad = _load(_pointers(grad_address, i, param_dtype, whole), inside, whole).to(tl.float32)
    exp_avg, exp_avg_sq = _read_codes(tensor, i, inside, blocks, inside_blocks, whole)
    if correction_bits == 8:
        corrections = _codes_at(tl.load(tensor + tables.CORRECTION), i, tl.int8, whole)
        correction = _load(corrections, inside, whole)
    elif correction_bits == 16:
        corrections = _codes_at(tl.load(tensor + tables.CORRECTION), i, tl.int16, whole)
        correction = _load(corrections, inside, whole)
    else:
        correction = param

    step_size = tl.load(s + tables.STEP_SIZE)
    adam_weight = tl.load(s + tables.ADAM_WEIGHT)
    inverse_weight = tl.load(s + tables.INVERSE_WEIGHT)
    dither = tl.load(s + tables.DITHER)
    weight = _read_weight(param, correction, correction_bits, param_dtype)
    weight *= tl.load(s + tables.DECAY)  # theta <- theta * (1 - eta*lambda)
    exp_avg, exp_avg_sq, denom = _moments(grad, exp_avg, exp_avg_sq, s, tl.float32)  # m, v, d
    update = tl.where(adam_weight != 0, adam_weight * (exp_avg / denom), 0)  # (1-alpha) * m/d
    inverse = inverse_weight * (norm_ratio * (exp_avg * denom))  # alpha * m*d
    update += tl.where(inverse_weight != 0, inverse, 0)
    weight -= tl.where(step_size != 0, step_size * update, 0)  # theta <- theta - eta/(1-beta1^t) * update

    param, correction = _split_weight(weight, dither, correction_bits, param_dtype)
    _store(params, param, inside, whole)
    if correction_bits == 8:
        _store(corrections, correction.to(tl.int8), inside, whole)
    elif correction_bits == 16:
        _store(corrections, correction.to(tl.int16), inside, whole)
    _write_exp_avg(tensor, exp_avg, dither, i, inside, blocks, inside_blocks, whole)
    _write_exp_avg_sq(tensor, exp_avg_sq, dither, i, inside, blocks, inside_blocks, whole)


@triton.jit
def update_blocks_kernel(
    tensors,
    grads,
    chunks,
    scalars,
    norm_ratios,
    param_dtype: tl.constexpr,
    correction_bits: tl.constexpr,
    layout: tl.constexpr,
):
    """Update a program's blocks of a tensor with 8-bit moments in place."""
    place = tl.load(chunks + tl.program_id(0)).to(tl.int64)
    tensor = tensors + place * tables.N_COLUMNS
    grad = tl.load(grads + place)
    s = scalars + tl.load(tensor + tables.SCALARS) * tables.N_SCALARS
    norm_ratio = tl.load(norm_ratios + place)
    chunk = tl.program_id(0) - tl.load(tensor + tables.FIRST_CHUNK)
    i, inside, blocks, inside_blocks = _blocks(tensor, chunk * tables.BLOCKS)
    addresses = (
        grad | tl.load(tensor + tables.PARAM) | tl.load(tensor + tables.EXP_AVG) | tl.load(tensor + tables.EXP_AVG_SQ)
    )
    addresses |= tl.load(tensor + tables.CORRECTION)
    if (
        ((chunk + 1) * tables.BLOCKS * tables.BLOCK <= tl.load(tensor + tables.NUMEL))
        & (addresses % 16 == 0)
        & (tl.load(tensor + tables.ROW) % tables.BLOCK == 0)
    ):
        # Whole blocks are contiguous.
        i = (
            chunk * tables.BLOCKS * tables.BLOCK
            + (tl.arange(0, tables.BLOCKS) * tables.BLOCK)[:, None]
            + tl.arange(0, tables.BLOCK)[None, :]
        )
        _update_blocks(
            tensor, grad, s, norm_ratio, i, inside, blocks, inside_blocks, param_dtype, correction_bits, True
        )
    else:
        _update_blocks(
            tensor, grad, s, norm_ratio, i, inside, blocks, inside_blocks, param_dtype, correction_bits, False
        )


@triton.jit
def norms_blocks_kernel(tensors, grads, chunks, scalars, chunk_sums, param_dtype: tl.constexpr, layout: tl.constexpr):
    """Do the work of norms_kernel for a program's blocks of a tensor with 8-bit moments."""
    place = tl.load(chunks + tl.program_id(0)).to(tl.int64)
    tensor = tensors + place * tables.N_COLUMNS
    s = scalars + tl.load(tensor + tables.SCALARS) * tables.N_SCALARS
    if tl.load(s + tables.NORMALIZE) != 0:
        i, inside, blocks, inside_blocks = _blocks(
            tensor, (tl.program_id(0) - tl.load(tensor + tables.FIRST_CHUNK)) * tables.BLOCKS
        )
        grad = tl.load(_pointers(tl.load(grads + place), i, param_dtype, False), inside, other=0).to(tl.float32)
        exp_avg, exp_avg_sq = _read_codes(tensor, i, inside, blocks, inside_blocks, False)
        exp_avg, exp_avg_sq, denom = _moments(grad, exp_avg, exp_avg_sq, s, tl.float32)
        adam_largest, adam_sum = _scaled_square_sum(exp_avg / denom, inside)
        inverse_largest, inverse_sum = _scaled_square_sum(exp_avg * denom, inside)
        own = chunk_sums + 4 * tl.program_id(0)
        tl.store(own, adam_largest)
        tl.store(own + 1, adam_sum)
        tl.store(own + 2, inverse_largest)
        tl.store(own + 3, inverse_sum)
