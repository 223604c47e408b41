"""The CUDA kernel: one step of DualAdam over many tensors in a few launches, with functional.py's names and order.

Nothing that changes from step to step is an argument: addresses and step scalars are in tables in device memory. So a
kernel is compiled once per dtype, whatever lr, alpha and the step count are, and CUDA graphs can replay it. Addresses
and element indices are 64 bits wide. ``real`` is the dtype of the arithmetic: float64 for float64, else float32.
"""

import triton
import triton.language as tl

from . import tables


@triton.jit
def _place(tensors, chunks, scalars):
    """The program's tensor: its row, that row in the table, its scalars, and the number of the chunk within it."""
    row = tl.load(chunks + tl.program_id(0)).to(tl.int64)
    tensor = tensors + row * tables.N_COLUMNS
    s = scalars + tl.load(tensor + tables.SCALARS) * tables.N_SCALARS
    return row, tensor, s, tl.program_id(0) - tl.load(tensor + tables.FIRST_CHUNK)


@triton.jit
def _aligned(tensor, grad):
    """Whether all arrays of a tensor start at multiples of 16 bytes."""
    addresses = grad | tl.load(tensor + tables.PARAM) | tl.load(tensor + tables.CORRECTION)
    addresses |= tl.load(tensor + tables.EXP_AVG) | tl.load(tensor + tables.EXP_AVG_SQ)
    return addresses % 16 == 0


@triton.jit
def _elements(tensor, chunk):
    """The elements of a chunk, the size of the tensor, and whether the chunk ends before it."""
    begin = chunk * tables.CHUNK
    numel = tl.load(tensor + tables.NUMEL)
    return begin + tl.arange(0, tables.CHUNK), numel, begin + tables.CHUNK <= numel


@triton.jit
def _pointers(address, i, dtype: tl.constexpr, aligned: tl.constexpr):
    """Pointers to the elements i of the array at an address; `aligned` ones are loaded 16 bytes at a time."""
    start = address.to(tl.pointer_type(dtype))
    if aligned:
        start = tl.multiple_of(start, 16)
    return start + i


@triton.jit
def _sqrt(x):
    """The square root, also of subnormal numbers, which tl.sqrt treats as 0; tl.sqrt_rn needs more registers."""
    tiny = x < 2.0**-100
    root = tl.sqrt(tl.where(tiny, x * 2.0**100, x))
    return tl.where(tiny, root * 2.0**-50, root)


@triton.jit
def _moments(grad, exp_avg, exp_avg_sq, s):
    """m, v and d after this step."""
    beta1 = tl.load(s + tables.BETA1)
    grad *= tl.load(s + tables.SIGN)
    gap = grad - exp_avg
    exp_avg = tl.where(
        beta1 > 0.5, exp_avg + tl.load(s + tables.REST1) * gap, grad - beta1 * gap
    )  # m, rounded as by lerp
    exp_avg_sq = tl.load(s + tables.BETA2) * exp_avg_sq + tl.load(s + tables.REST2) * grad * grad  # v
    denom = _sqrt(exp_avg_sq) * tl.load(s + tables.BIAS2_RSQRT) + tl.load(s + tables.EPS)  # d
    return exp_avg, exp_avg_sq, denom


@triton.jit
def _formula(weight, grad, exp_avg, exp_avg_sq, s, norm_ratio):
    """The weight, m and v after this step."""
    step_size = tl.load(s + tables.STEP_SIZE)
    adam_weight = tl.load(s + tables.ADAM_WEIGHT)
    inverse_weight = tl.load(s + tables.INVERSE_WEIGHT)
    weight *= tl.load(s + tables.DECAY)  # theta <- theta * (1 - eta*lambda)
    exp_avg, exp_avg_sq, denom = _moments(grad, exp_avg, exp_avg_sq, s)  # m, v, d
    update = tl.where(adam_weight != 0, adam_weight * (exp_avg / denom), 0)  # (1-alpha) * m/d
    inverse = inverse_weight * (norm_ratio * (exp_avg * denom))  # alpha * m*d
    update += tl.where(inverse_weight != 0, inverse, 0)
    weight -= tl.where(step_size != 0, step_size * update, 0)  # theta <- theta - eta/(1-beta1^t) * update
    return weight, exp_avg, exp_avg_sq


@triton.jit
def _correction_pointers(tensor, i, bits: tl.constexpr, aligned: tl.constexpr):
    """Pointers to the corrections of the weights i, integers of 8 or 16 bits."""
    address = tl.load(tensor + tables.CORRECTION)
    if bits == 8:
        pointers = _pointers(address, i, tl.int8, aligned)
    else:
        pointers = _pointers(address, i, tl.int16, aligned)
    return pointers


@triton.jit
def _unit(param):
    """The unit in the last place of float16 numbers, given as float32."""
    exponent = param.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent, 113 << 23).to(tl.float32, bitcast=True) * 2.0**-10  # subnormals share 2^-14's


@triton.jit
def _read_weight(param, correction, bits: tl.constexpr, param_dtype: tl.constexpr, real: tl.constexpr):
    """The trained weight, as in states.read_weight."""
    if bits == 0:
        weight = param.to(real)
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
        correction = param  # there is none
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
def _update(
    tensor,
    grad_address,
    s,
    norm_ratio,
    i,
    inside,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    correction_bits: tl.constexpr,
    aligned: tl.constexpr,
):
    """Update the elements i in place: all loads, the formula, all stores."""
    params = _pointers(tl.load(tensor + tables.PARAM), i, param_dtype, aligned)
    grads = _pointers(grad_address, i, param_dtype, aligned)
    exp_avgs = _pointers(tl.load(tensor + tables.EXP_AVG), i, state_dtype, aligned)
    exp_avg_sqs = _pointers(tl.load(tensor + tables.EXP_AVG_SQ), i, state_dtype, aligned)
    param = tl.load(params, inside)
    grad = tl.load(grads, inside).to(real)
    exp_avg = tl.load(exp_avgs, inside).to(real)
    exp_avg_sq = tl.load(exp_avg_sqs, inside).to(real)
    correction = param
    if correction_bits > 0:
        corrections = _correction_pointers(tensor, i, correction_bits, aligned)
        correction = tl.load(corrections, inside)

    weight = _read_weight(param, correction, correction_bits, param_dtype, real)
    weight, exp_avg, exp_avg_sq = _formula(weight, grad, exp_avg, exp_avg_sq, s, norm_ratio)
    param, correction = _split_weight(weight, tl.load(s + tables.DITHER), correction_bits, param_dtype)

    tl.store(params, param, inside)
    tl.store(exp_avgs, exp_avg.to(state_dtype), inside)
    tl.store(exp_avg_sqs, exp_avg_sq.to(state_dtype), inside)
    if correction_bits > 0:
        tl.store(corrections, correction.to(corrections.dtype.element_ty), inside)


@triton.jit
def update_kernel(
    tensors,
    grads,
    chunks,
    scalars,
    norm_ratios,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    correction_bits: tl.constexpr,
    layout: tl.constexpr,
):
    """Update one chunk in place."""
    row, tensor, s, chunk = _place(tensors, chunks, scalars)
    grad = tl.load(grads + row)
    norm_ratio = tl.load(norm_ratios + row)
    i, numel, whole = _elements(tensor, chunk)
    if whole & _aligned(tensor, grad):
        _update(tensor, grad, s, norm_ratio, i, None, param_dtype, state_dtype, real, correction_bits, True)
    else:
        _update(tensor, grad, s, norm_ratio, i, i < numel, param_dtype, state_dtype, real, correction_bits, False)


@triton.jit
def _power_near(x):
    """A power of two whose product with x > 0 is about 1, so that the square neither overflows nor underflows."""
    if x.dtype == tl.float64:
        exponent = x.to(tl.int64, bitcast=True) >> 52
        power = (tl.maximum(2046 - exponent, 1) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = x.to(tl.int32, bitcast=True) >> 23
        power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def _store_norms(chunk_sums, exp_avg, denom, inside):
    """Store the norms of a program's m/d and m*d: for each a power of two, and the sum of squares scaled by it."""
    both = tl.join(exp_avg / denom, exp_avg * denom)  # shape (elements, 2)
    if inside is not None:
        both = tl.where(tl.join(inside, inside), both, 0)
    power = _power_near(tl.max(tl.abs(both), 0))
    both *= power[None, :]
    own = chunk_sums + 4 * tl.program_id(0) + 2 * tl.arange(0, 2)
    tl.store(own, power)
    tl.store(own + 1, tl.sum(both * both, 0))


@triton.jit
def _norms(
    tensor,
    grad_address,
    s,
    chunk_sums,
    i,
    inside,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    aligned: tl.constexpr,
):
    """Measure the elements i."""
    grad = tl.load(_pointers(grad_address, i, param_dtype, aligned), inside).to(real)
    exp_avg = tl.load(_pointers(tl.load(tensor + tables.EXP_AVG), i, state_dtype, aligned), inside).to(real)
    exp_avg_sq = tl.load(_pointers(tl.load(tensor + tables.EXP_AVG_SQ), i, state_dtype, aligned), inside).to(real)
    exp_avg, exp_avg_sq, denom = _moments(grad, exp_avg, exp_avg_sq, s)
    _store_norms(chunk_sums, exp_avg, denom, inside)


@triton.jit
def norms_kernel(
    tensors,
    grads,
    chunks,
    scalars,
    chunk_sums,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    layout: tl.constexpr,
):
    """Measure m/d and m*d of one chunk in the coming update, if the inverse update of its tensor is normalized."""
    row, tensor, s, chunk = _place(tensors, chunks, scalars)
    if tl.load(s + tables.NORMALIZE) != 0:
        grad = tl.load(grads + row)
        i, numel, whole = _elements(tensor, chunk)
        if whole & _aligned(tensor, grad):
            _norms(tensor, grad, s, chunk_sums, i, None, param_dtype, state_dtype, real, True)
        else:
            _norms(tensor, grad, s, chunk_sums, i, i < numel, param_dtype, state_dtype, real, False)


@triton.jit
def _squares(quads, column: tl.constexpr, chunk, n_chunks):
    """Sums of squares of some chunks, in float64, from what _store_norms has stored."""
    power = tl.load(quads + 4 * chunk + column, chunk < n_chunks, other=1).to(tl.float64)
    return tl.load(quads + 4 * chunk + column + 1, chunk < n_chunks, other=0).to(tl.float64) / power / power


@triton.jit
def norm_sums_kernel(tensors, scalars, chunk_sums, sums, layout: tl.constexpr):
    """Sum the squares of one tensor's m/d and m*d; store 1 and 1 unless its inverse update is normalized."""
    tensor = tensors + tl.program_id(0) * tables.N_COLUMNS
    s = scalars + tl.load(tensor + tables.SCALARS) * tables.N_SCALARS
    adam_sum = tl.full((), 1, tl.float64)
    inverse_sum = tl.full((), 1, tl.float64)
    if tl.load(s + tables.NORMALIZE) != 0:
        n_chunks = tl.load(tensor + tables.N_CHUNKS)
        quads = chunk_sums + 4 * tl.load(tensor + tables.FIRST_CHUNK)
        adam_sq = tl.zeros((tables.SUMS,), tl.float64)
        inverse_sq = tl.zeros((tables.SUMS,), tl.float64)
        begin = tl.full((), 0, tl.int64)
        while begin < n_chunks:  # the interpreter of Triton 3.6 cannot count with range() where NumPy is 2.5
            chunk = begin + tl.arange(0, tables.SUMS)
            adam_sq += _squares(quads, 0, chunk, n_chunks)
            inverse_sq += _squares(quads, 2, chunk, n_chunks)
            begin += tables.SUMS
        adam_sum = tl.sum(adam_sq)
        inverse_sum = tl.sum(inverse_sq)
    tl.store(sums + 2 * tl.program_id(0), adam_sum)
    tl.store(sums + 2 * tl.program_id(0) + 1, inverse_sum)


@triton.jit
def step_scalars_kernel(tensors, table_of_options, scalars, layout: tl.constexpr):
    """Count the step of one tensor on the device and compute its scalars, as functional.step_scalars does."""
    tensor = tensors + tl.program_id(0) * tables.N_COLUMNS
    counter = tl.load(tensor + tables.STEP).to(tl.pointer_type(tl.float32))
    t = tl.load(counter) + 1
    tl.store(counter, t)
    t = t.to(tl.float64)
    o = table_of_options + tl.load(tensor + tables.OPTIONS) * tables.N_OPTIONS
    lr = tl.load(o + tables.LR)
    beta1 = tl.load(o + tables.OPTION_BETA1)
    beta2 = tl.load(o + tables.OPTION_BETA2)
    switch_rate = tl.load(o + tables.SWITCH_RATE)
    alpha = 1 - t * switch_rate
    alpha = tl.where(alpha < switch_rate, 0.0, alpha)
    inverse_weight = alpha * tl.load(o + tables.INVERSE_SCALE)
    s = scalars + tl.load(tensor + tables.SCALARS) * tables.N_SCALARS
    tl.store(s + tables.BETA1, beta1)
    tl.store(s + tables.REST1, 1 - beta1)
    tl.store(s + tables.BETA2, beta2)
    tl.store(s + tables.REST2, 1 - beta2)
    tl.store(s + tables.EPS, tl.load(o + tables.OPTION_EPS))
    tl.store(s + tables.SIGN, tl.load(o + tables.OPTION_SIGN))
    tl.store(s + tables.DECAY, 1 - lr * tl.load(o + tables.WEIGHT_DECAY))
    tl.store(s + tables.STEP_SIZE, lr / (1 - tl.exp2(t * tl.log2(beta1))))
    tl.store(s + tables.BIAS2_RSQRT, 1 / tl.sqrt(1 - tl.exp2(t * tl.log2(beta2))))
    tl.store(s + tables.ADAM_WEIGHT, 1 - alpha)
    tl.store(s + tables.INVERSE_WEIGHT, inverse_weight)
    tl.store(s + tables.NORMALIZE, tl.where(inverse_weight != 0, tl.load(o + tables.OPTION_NORMALIZE), 0.0))
    dither = (t.to(tl.int64) * 0x9E3779B1 & 0xFFFFFFFF) >> 8
    tl.store(s + tables.DITHER, dither.to(tl.float64) * 2.0**-24)
