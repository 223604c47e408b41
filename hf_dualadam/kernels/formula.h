/* The update of hf_dualadam/functional.py, with its names and order. dual_update.c includes this file twice, with
 *   REAL            float or double
 *   SQRT            its square root
 *   NAME(function)  the function's name for this type
 */

/* Updates m and v of one element. */
static INLINE void NAME(moments)(REAL grad, REAL *exp_avg, REAL *exp_avg_sq, const StepScalars *s)
{
    const REAL beta1 = (REAL)s->beta1, rest1 = (REAL)(1 - s->beta1);
    const REAL beta2 = (REAL)s->beta2, rest2 = (REAL)(1 - s->beta2);
    grad *= (REAL)s->sign;
    const REAL gap = grad - *exp_avg;
    *exp_avg = rest1 < (REAL)0.5 ? *exp_avg + rest1 * gap : grad - beta1 * gap; /* m, rounded as torch.lerp does */
    *exp_avg_sq = beta2 * *exp_avg_sq + rest2 * grad * grad;                    /* v */
}

/* d of one element. */
static INLINE REAL NAME(denominator)(REAL exp_avg_sq, const StepScalars *s)
{
    return SQRT(exp_avg_sq) * (REAL)s->bias2_rsqrt + (REAL)s->eps;
}

/* Updates n elements in place. */
static INLINE void NAME(update_elements)(REAL *restrict params, const REAL *restrict grads, REAL *restrict exp_avgs,
                                         REAL *restrict exp_avg_sqs, int64_t n, const StepScalars *scalars,
                                         int moments_done)
{
    const StepScalars s = *scalars;
    const REAL decay = (REAL)s.decay, step_size = (REAL)s.step_size;
    const REAL adam_weight = (REAL)s.adam_weight, inverse_weight = (REAL)s.inverse_weight;
    const REAL norm_ratio = (REAL)s.norm_ratio;
    const int moves = s.step_size != 0, adam = s.adam_weight != 0, before_switch = s.inverse_weight != 0;
    for (int64_t i = 0; i < n; i++) {
        REAL param = params[i], exp_avg = exp_avgs[i], exp_avg_sq = exp_avg_sqs[i];
        param *= decay;                                                     /* theta <- theta * (1 - eta*lambda) */
        if (!moments_done)
            NAME(moments)(grads[i], &exp_avg, &exp_avg_sq, &s);             /* m, v */
        const REAL denom = NAME(denominator)(exp_avg_sq, &s);               /* d */
        REAL update = 0;
        if (adam)
            update = adam_weight * (exp_avg / denom);                       /* (1-alpha) * m/d */
        if (before_switch)
            update += inverse_weight * (norm_ratio * (exp_avg * denom));    /* + alpha * m*d */
        if (moves)
            param -= step_size * update;                   /* theta <- theta - eta/(1-beta1^t) * update */
        params[i] = param;
        if (!moments_done) {
            exp_avgs[i] = exp_avg;
            exp_avg_sqs[i] = exp_avg_sq;
        }
    }
}

/* Specializes the loop on moments_done. */
static INLINE void NAME(update)(REAL *params, const REAL *grads, REAL *exp_avgs, REAL *exp_avg_sqs, int64_t n,
                                const StepScalars *scalars)
{
    if (scalars->moments_done)
        NAME(update_elements)(params, grads, exp_avgs, exp_avg_sqs, n, scalars, 1);
    else
        NAME(update_elements)(params, grads, exp_avgs, exp_avg_sqs, n, scalars, 0);
}

/* The sum over one lane of a block. It is computed in the type of the numbers, which is faster, if it can represent
 * their squares. */
static INLINE double NAME(sum_of_squares)(const REAL *x, int in_range)
{
    if (in_range) {
        const REAL a = x[0], b = x[LANES], c = x[2 * LANES], d = x[3 * LANES];
        return a * a + b * b + (c * c + d * d);
    }
    const double a = x[0], b = x[LANES], c = x[2 * LANES], d = x[3 * LANES];
    return a * a + b * b + (c * c + d * d);
}

/* Adds the squares of n numbers of each of `n_sums` kinds to `squares`. There is one sum per lane, so that the loop is
 * vectorized and the order of the additions is the same for every instruction set and number of threads. Sets the rest
 * of the blocks to 0. */
static INLINE void NAME(add_squares)(REAL x[][BLOCK], int n_sums, int64_t n, int in_range, Squares *restrict squares)
{
    for (int sum = 0; sum < n_sums; sum++) {
        for (int64_t i = n; i < BLOCK; i++)
            x[sum][i] = 0;
        for (int lane = 0; lane < LANES; lane++)
            squares->lanes[sum][lane] += NAME(sum_of_squares)(x[sum] + lane, in_range);
    }
}

/* Adds the squares of m/d and of m*d of n elements, at most BLOCK, in the coming update; with `store`, stores their m
 * and v. */
static INLINE void NAME(norms)(const REAL *restrict grads, REAL *restrict exp_avgs, REAL *restrict exp_avg_sqs,
                               int64_t n, const StepScalars *scalars, int store, Squares *restrict squares)
{
    const StepScalars s = *scalars;
    REAL parts[2][BLOCK] ALIGNED;
    for (int64_t i = 0; i < n; i++) {
        REAL exp_avg = exp_avgs[i], exp_avg_sq = exp_avg_sqs[i];
        NAME(moments)(grads[i], &exp_avg, &exp_avg_sq, &s);
        const REAL denom = NAME(denominator)(exp_avg_sq, &s);
        parts[0][i] = exp_avg / denom;
        parts[1][i] = exp_avg * denom;
        if (store) {
            exp_avgs[i] = exp_avg;
            exp_avg_sqs[i] = exp_avg_sq;
        }
    }
    NAME(add_squares)(parts, 2, n, 0, squares);
}

/* Adds the squares of m/d, of m*d, of m and of the parameters after the last update, for n elements, at most BLOCK;
 * d is scaled by SCALE. */
static INLINE void NAME(last_norms)(const REAL *restrict params, const REAL *restrict exp_avgs,
                                    const REAL *restrict exp_avg_sqs, int64_t n, const StepScalars *scalars,
                                    Squares *restrict squares)
{
    StepScalars s = *scalars;
    s.bias2_rsqrt *= SCALE;
    s.eps *= SCALE;
    REAL parts[N_SUMS][BLOCK] ALIGNED;
    for (int64_t i = 0; i < n; i++) {
        const REAL exp_avg = exp_avgs[i], denom = NAME(denominator)(exp_avg_sqs[i], &s);
        parts[0][i] = exp_avg / denom;
        parts[1][i] = exp_avg * denom;
        parts[2][i] = exp_avg;
        parts[3][i] = params[i];
    }
    NAME(add_squares)(parts, N_SUMS, n, 1, squares);
}
