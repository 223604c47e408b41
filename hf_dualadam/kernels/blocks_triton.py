"""8-bit moments and corrected weights in the CUDA kernel: the formats of states.py, read and written in one pass.

A program updates a few blocks, each of elements that share a scale, as an array of shape (block, element). See
dual_update_triton.py for the formula and tables.py for the tables.
"""

import triton
import triton.language as tl

from . import tables
from .dual_update_triton import (
    _aligned,
    _correction_pointers,
    _formula,
    _moments,
    _place,
    _pointers,
    _read_weight,
    _split_weight,
    _sqrt,
    _store_norms,
)


@triton.jit
def _load(pointers, inside, whole: tl.constexpr):
    """Load elements; without a mask if all blocks are complete, so that the loads are vectorized."""
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
def _read_codes(tensor, i, inside, blocks, inside_blocks, whole: tl.constexpr):
    """Decode m and v of some blocks, as in states._decode_signed and _decode_positive."""
    codes = _load(_pointers(tl.load(tensor + tables.EXP_AVG), i, tl.int8, whole), inside, whole).to(tl.float32)
    scales = _pointers(tl.load(tensor + tables.EXP_AVG_SCALE), blocks, tl.float32, False)
    scale = _load(scales, inside_blocks, whole)
    exp_avg = codes * tl.abs(codes) * (scale * (1 / 127**2))[:, None]
    codes = _load(_pointers(tl.load(tensor + tables.EXP_AVG_SQ), i, tl.uint8, whole), inside, whole).to(tl.int32)
    low = _load(_pointers(tl.load(tensor + tables.EXP_AVG_SQ_MIN), blocks, tl.int32, False), inside_blocks, whole)
    high = _load(_pointers(tl.load(tensor + tables.EXP_AVG_SQ_MAX), blocks, tl.int32, False), inside_blocks, whole)
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
    _store(_pointers(tl.load(tensor + tables.EXP_AVG), i, tl.int8, whole), code.to(tl.int8), inside, whole)
    _store(_pointers(tl.load(tensor + tables.EXP_AVG_SCALE), blocks, tl.float32, False), scale, inside_blocks, whole)


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
    _store(_pointers(tl.load(tensor + tables.EXP_AVG_SQ), i, tl.uint8, whole), code.to(tl.uint8), inside, whole)
    _store(_pointers(tl.load(tensor + tables.EXP_AVG_SQ_MIN), blocks, tl.int32, False), low, inside_blocks, whole)
    _store(_pointers(tl.load(tensor + tables.EXP_AVG_SQ_MAX), blocks, tl.int32, False), high, inside_blocks, whole)


@triton.jit
def _whole_blocks(tensor, grad, chunk):
    """Whether a program's blocks all have 128 elements that can be loaded together."""
    end = (chunk + 1) * tables.BLOCKS * tables.BLOCK
    rows_fit = tl.load(tensor + tables.ROW) % tables.BLOCK == 0
    return (end <= tl.load(tensor + tables.NUMEL)) & rows_fit & _aligned(tensor, grad)


@triton.jit
def _blocks(tensor, chunk, whole: tl.constexpr):
    """The elements and blocks of a program. No block crosses a row, so the last one of a row may be shorter."""
    blocks = chunk * tables.BLOCKS + tl.arange(0, tables.BLOCKS)
    element = tl.arange(0, tables.BLOCK)[None, :]
    if whole:  # they follow each other in memory
        i = (blocks * tables.BLOCK)[:, None] + element
        inside = i >= 0
        inside_blocks = blocks >= 0
    else:
        row = tl.load(tensor + tables.ROW)
        blocks_in_row = tl.cdiv(row, tables.BLOCK)
        inside_blocks = blocks < tl.load(tensor + tables.NUMEL) // row * blocks_in_row
        column = blocks % blocks_in_row * tables.BLOCK
        i = (blocks // blocks_in_row * row + column)[:, None] + element
        size = tl.where(inside_blocks, tl.minimum(row - column, tables.BLOCK), 0).to(tl.int32)
        inside = element < size[:, None]
    return i, inside, blocks, inside_blocks


@triton.jit
def _update_blocks(
    tensor,
    grad_address,
    s,
    norm_ratio,
    chunk,
    param_dtype: tl.constexpr,
    correction_bits: tl.constexpr,
    whole: tl.constexpr,
):
    """Update a program's blocks in place: all loads, the formula, all stores."""
    i, inside, blocks, inside_blocks = _blocks(tensor, chunk, whole)
    params = _pointers(tl.load(tensor + tables.PARAM), i, param_dtype, whole)
    param = _load(params, inside, whole)
    grad = _load(_pointers(grad_address, i, param_dtype, whole), inside, whole).to(tl.float32)
    exp_avg, exp_avg_sq = _read_codes(tensor, i, inside, blocks, inside_blocks, whole)
    correction = param
    if correction_bits > 0:
        corrections = _correction_pointers(tensor, i, correction_bits, whole)
        correction = _load(corrections, inside, whole)

    dither = tl.load(s + tables.DITHER)
    weight = _read_weight(param, correction, correction_bits, param_dtype, tl.float32)
    weight, exp_avg, exp_avg_sq = _formula(weight, grad, exp_avg, exp_avg_sq, s, norm_ratio)
    param, correction = _split_weight(weight, dither, correction_bits, param_dtype)

    _store(params, param, inside, whole)
    if correction_bits > 0:
        _store(corrections, correction.to(corrections.dtype.element_ty), inside, whole)
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
    row, tensor, s, chunk = _place(tensors, chunks, scalars)
    grad = tl.load(grads + row)
    norm_ratio = tl.load(norm_ratios + row)
    if _whole_blocks(tensor, grad, chunk):
        _update_blocks(tensor, grad, s, norm_ratio, chunk, param_dtype, correction_bits, True)
    else:
        _update_blocks(tensor, grad, s, norm_ratio, chunk, param_dtype, correction_bits, False)


@triton.jit
def _norms_of_blocks(tensor, grad_address, s, chunk_sums, chunk, param_dtype: tl.constexpr, whole: tl.constexpr):
    """Measure a program's blocks."""
    i, inside, blocks, inside_blocks = _blocks(tensor, chunk, whole)
    grad = _load(_pointers(grad_address, i, param_dtype, whole), inside, whole).to(tl.float32)
    exp_avg, exp_avg_sq = _read_codes(tensor, i, inside, blocks, inside_blocks, whole)
    exp_avg, exp_avg_sq, denom = _moments(grad, exp_avg, exp_avg_sq, s)
    if whole:
        _store_norms(chunk_sums, tl.ravel(exp_avg), tl.ravel(denom), None)
    else:
        _store_norms(chunk_sums, tl.ravel(exp_avg), tl.ravel(denom), tl.ravel(inside))


@triton.jit
def norms_blocks_kernel(tensors, grads, chunks, scalars, chunk_sums, param_dtype: tl.constexpr, layout: tl.constexpr):
    """Do the work of norms_kernel for a program's blocks of a tensor with 8-bit moments."""
    row, tensor, s, chunk = _place(tensors, chunks, scalars)
    if tl.load(s + tables.NORMALIZE) != 0:
        grad = tl.load(grads + row)
        if _whole_blocks(tensor, grad, chunk):
            _norms_of_blocks(tensor, grad, s, chunk_sums, chunk, param_dtype, True)
        else:
            _norms_of_blocks(tensor, grad, s, chunk_sums, chunk, param_dtype, False)
