"""One step of DualAdam over many tensors in a few launches: the CUDA kernel, in functional.py's names and order.

Nothing that changes from step to step is an argument: addresses, options and step scalars lie in tables in device
memory. So a kernel is compiled once per dtype, however lr, alpha and the step count move, and CUDA graphs can replay
it. Addresses and element indices are 64 bits wide.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(2048)  # elements of one program

# Columns of the table of tensors (int64).
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
STEP = tl.constexpr(4)
NUMEL = tl.constexpr(5)
FIRST_CHUNK = tl.constexpr(6)  # number of chunks in the tensors before this one
SCALARS = tl.constexpr(7)  # row in the table of scalars
OPTIONS = tl.constexpr(8)  # row in the table of options
N_COLUMNS = tl.constexpr(9)

# Columns of the table of scalars (float64); those up to NORMALIZE are the table of options.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
WEIGHT_DECAY = tl.constexpr(4)
SWITCH_RATE = tl.constexpr(5)
INVERSE_SCALE = tl.constexpr(6)
SIGN = tl.constexpr(7)  # -1 to maximize
NORMALIZE = tl.constexpr(8)
N_OPTIONS = tl.constexpr(9)
BIAS1 = tl.constexpr(9)  # 1 - beta1^t
BIAS2_RSQRT = tl.constexpr(10)  # 1 / sqrt(1 - beta2^t)
ALPHA = tl.constexpr(11)
N_SCALARS = tl.constexpr(12)


@triton.jit
def _elements(tensor, column: tl.constexpr, dtype: tl.constexpr, i, aligned: tl.constexpr):
    """Pointers to the elements i of a tensor."""
    start = tl.load(tensor + column).to(tl.pointer_type(dtype))
    if aligned:
        start = tl.multiple_of(start, 16)
    return start + i


@triton.jit
def _moments(
    tensor,
    s,
    i,
    inside,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    aligned: tl.constexpr,
):
    """m, v and d of the elements i after this step."""
    grad = tl.load(_elements(tensor, GRAD, param_dtype, i, aligned), inside).to(real)
    exp_avg = tl.load(_elements(tensor, EXP_AVG, state_dtype, i, aligned), inside).to(real)
    exp_avg_sq = tl.load(_elements(tensor, EXP_AVG_SQ, state_dtype, i, aligned), inside).to(real)
    beta1 = tl.load(s + BETA1)
    beta2 = tl.load(s + BETA2)
    grad *= tl.load(s + SIGN).to(real)
    gap = grad - exp_avg
    exp_avg = tl.where(beta1 > 0.5, exp_avg + (1 - beta1).to(real) * gap, grad - beta1.to(real) * gap)  # m
    exp_avg_sq = beta2.to(real) * exp_avg_sq + (1 - beta2).to(real) * grad * grad  # v
    denom = tl.sqrt(exp_avg_sq) * tl.load(s + BIAS2_RSQRT).to(real) + tl.load(s + EPS).to(real)  # d
    return exp_avg, exp_avg_sq, denom


@triton.jit
def _update(
    tensor,
    s,
    norm_ratio,
    i,
    inside,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    aligned: tl.constexpr,
):
    """One step of the elements i, in place."""
    decay = (1 - tl.load(s + LR) * tl.load(s + WEIGHT_DECAY)).to(real)
    step_size = (tl.load(s + LR) / tl.load(s + BIAS1)).to(real)
    adam_weight = (1 - tl.load(s + ALPHA)).to(real)
    inverse_weight = (tl.load(s + ALPHA) * tl.load(s + INVERSE_SCALE)).to(real)

    params = _elements(tensor, PARAM, param_dtype, i, aligned)
    param = tl.load(params, inside).to(real) * decay  # theta <- theta * (1 - eta*lambda)
    exp_avg, exp_avg_sq, denom = _moments(tensor, s, i, inside, param_dtype, state_dtype, real, aligned)  # m, v, d
    adam = tl.where(adam_weight != 0, adam_weight * (exp_avg / denom), 0)  # (1-alpha) * m/d
    inverse = inverse_weight * (norm_ratio.to(real) * (exp_avg * denom))  # alpha * m*d
    update = adam + tl.where(inverse_weight != 0, inverse, 0)
    param -= tl.where(step_size != 0, step_size * update, 0)  # theta <- theta - eta/(1-beta1^t) * update
    tl.store(params, param.to(param_dtype), inside)
    tl.store(_elements(tensor, EXP_AVG, state_dtype, i, aligned), exp_avg.to(state_dtype), inside)
    tl.store(_elements(tensor, EXP_AVG_SQ, state_dtype, i, aligned), exp_avg_sq.to(state_dtype), inside)


@triton.jit
def update_kernel(
    tensors,
    chunks,
    scalars,
    norm_ratios,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    aligned: tl.constexpr,
):
    """One step of one chunk, in place."""
    row = tl.load(chunks + tl.program_id(0)).to(tl.int64)
    tensor = tensors + row * N_COLUMNS
    s = scalars + tl.load(tensor + SCALARS) * N_SCALARS
    norm_ratio = tl.load(norm_ratios + row)
    begin = (tl.program_id(0) - tl.load(tensor + FIRST_CHUNK)) * CHUNK
    i = begin + tl.arange(0, CHUNK)
    numel = tl.load(tensor + NUMEL)
    if begin + CHUNK <= numel:  # without a mask, elements are loaded four at a time
        _update(tensor, s, norm_ratio, i, None, param_dtype, state_dtype, real, aligned)
    else:
        _update(tensor, s, norm_ratio, i, i < numel, param_dtype, state_dtype, real, aligned)


@triton.jit
def _store_squares(
    sums,
    tensor,
    s,
    i,
    inside,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    aligned: tl.constexpr,
):
    """Sums of the squares of m/d and m*d of the elements i, as the coming update will have them."""
    exp_avg, _, denom = _moments(tensor, s, i, inside, param_dtype, state_dtype, real, aligned)
    adam = (exp_avg / denom).to(tl.float64)
    inverse = (exp_avg * denom).to(tl.float64)
    if inside is not None:
        adam = tl.where(inside, adam, 0)
        inverse = tl.where(inside, inverse, 0)
    tl.store(sums, tl.sum(adam * adam))
    tl.store(sums + 1, tl.sum(inverse * inverse))


@triton.jit
def norms_kernel(
    tensors,
    chunks,
    scalars,
    sums,
    param_dtype: tl.constexpr,
    state_dtype: tl.constexpr,
    real: tl.constexpr,
    aligned: tl.constexpr,
):
    """Measure the norms of one chunk, if its tensor is to be normalized in this step."""
    tensor = tensors + tl.load(chunks + tl.program_id(0)).to(tl.int64) * N_COLUMNS
    s = scalars + tl.load(tensor + SCALARS) * N_SCALARS
    if tl.load(s + NORMALIZE) * tl.load(s + ALPHA) * tl.load(s + INVERSE_SCALE) != 0:
        sums += 2 * tl.program_id(0)
        begin = (tl.program_id(0) - tl.load(tensor + FIRST_CHUNK)) * CHUNK
        i = begin + tl.arange(0, CHUNK)
        numel = tl.load(tensor + NUMEL)
        if begin + CHUNK <= numel:
            _store_squares(sums, tensor, s, i, None, param_dtype, state_dtype, real, aligned)
        else:
            _store_squares(sums, tensor, s, i, i < numel, param_dtype, state_dtype, real, aligned)


@triton.jit
def norm_ratios_kernel(tensors, scalars, sums, norm_ratios):
    """The scale of one tensor's inverse update: 1 unless it is normalized."""
    tensor = tensors + tl.program_id(0) * N_COLUMNS
    s = scalars + tl.load(tensor + SCALARS) * N_SCALARS
    ratio = tl.full((), 1, tl.float64)
    if tl.load(s + NORMALIZE) * tl.load(s + ALPHA) * tl.load(s + INVERSE_SCALE) != 0:
        n_chunks = tl.cdiv(tl.load(tensor + NUMEL), CHUNK)
        pairs = sums + 2 * tl.load(tensor + FIRST_CHUNK)
        adam_sq = tl.zeros((CHUNK,), tl.float64)
        inverse_sq = tl.zeros((CHUNK,), tl.float64)
        for begin in range(0, n_chunks, CHUNK):
            chunk = begin + tl.arange(0, CHUNK)
            adam_sq += tl.load(pairs + 2 * chunk, chunk < n_chunks, other=0)
            inverse_sq += tl.load(pairs + 2 * chunk + 1, chunk < n_chunks, other=0)
        inverse_sum = tl.sum(inverse_sq)
        ratio = tl.where(inverse_sum == 0, 0.0, tl.sqrt(tl.sum(adam_sq) / inverse_sum))  # NaN stays NaN
    tl.store(norm_ratios + tl.program_id(0), ratio)


@triton.jit
def step_scalars_kernel(tensors, options, scalars):
    """Count the step of one tensor on the device and work out its scalars, as functional.step_scalars does."""
    tensor = tensors + tl.program_id(0) * N_COLUMNS
    counter = _elements(tensor, STEP, tl.float32, 0, False)
    t = tl.load(counter) + 1
    tl.store(counter, t)
    t = t.to(tl.float64)
    o = options + tl.load(tensor + OPTIONS) * N_OPTIONS
    s = scalars + tl.load(tensor + SCALARS) * N_SCALARS
    for column in tl.static_range(N_OPTIONS):
        tl.store(s + column, tl.load(o + column))
    switch_rate = tl.load(o + SWITCH_RATE)
    alpha = 1 - t * switch_rate
    tl.store(s + ALPHA, tl.where(alpha < switch_rate, 0.0, alpha))
    tl.store(s + BIAS1, 1 - tl.exp2(t * tl.log2(tl.load(o + BETA1))))
    tl.store(s + BIAS2_RSQRT, 1 / tl.sqrt(1 - tl.exp2(t * tl.log2(tl.load(o + BETA2)))))
