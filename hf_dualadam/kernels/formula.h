/* The update of hf_dualadam/functional.py in its names and order. dual_update.c includes this file once per dtype with
 *   NAME(function)        the function's name for this dtype
 *   PARAM, STATE, REAL    types of parameter and gradient, of the moments, and of the arithmetic
 *   FROM_PARAM, TO_PARAM, FROM_STATE, TO_STATE   conversions from and to REAL
 *   SQRT                  square root of a REAL
 */

/* Updates m and v of one element; returns d. */
static INLINE REAL NAME(moments)(REAL grad, REAL *exp_avg, REAL *exp_avg_sq, const StepScalars *s)
{
    const REAL beta1 = (REAL)s->beta1, rest1 = (REAL)(1 - s->beta1);
    const REAL beta2 = (REAL)s->beta2, rest2 = (REAL)(1 - s->beta2);
    const REAL gap = grad - *exp_avg;
    *exp_avg = rest1 < (REAL)0.5 ? *exp_avg + rest1 * gap : grad - beta1 * gap;  /* m, rounded as torch.lerp does */
    *exp_avg_sq = beta2 * *exp_avg_sq + rest2 * grad * grad;                     /* v */
    return SQRT(*exp_avg_sq) * (REAL)(1 / s->bias2_sqrt) + (REAL)s->eps;         /* d */
}

/* One step of the elements [begin, end) of a tensor, in place. */
static CLONES void NAME(update)(const Tensor *t, int64_t begin, int64_t end, const StepScalars *scalars)
{
    const StepScalars s = *scalars;
    const REAL sign = (REAL)s.sign, decay = (REAL)s.decay, step_size = (REAL)s.step_size;
    const REAL alpha = (REAL)s.alpha, adam_share = (REAL)s.adam_share;
    PARAM *restrict params = t->param;
    const PARAM *restrict grads = t->grad;
    STATE *restrict exp_avgs = t->exp_avg, *restrict exp_avg_sqs = t->exp_avg_sq;
    for (int64_t i = begin; i < end; i++) {
        REAL exp_avg = FROM_STATE(exp_avgs[i]), exp_avg_sq = FROM_STATE(exp_avg_sqs[i]);
        const REAL param = FROM_PARAM(params[i]) * decay;            /* theta <- theta * (1 - eta*lambda) */
        const REAL denom = NAME(moments)(sign * FROM_PARAM(grads[i]), &exp_avg, &exp_avg_sq, &s);  /* m, v, d */
        REAL update = exp_avg / denom;                               /* m/d */
        if (alpha != 0)                                              /* after the switch, m*d may overflow */
            update = adam_share * update + alpha * (exp_avg * denom);  /* (1-alpha) * m/d + alpha * m*d */
        params[i] = TO_PARAM(param - step_size * update);            /* theta <- theta - eta/(1-beta1^t) * update */
        exp_avgs[i] = TO_STATE(exp_avg);
        exp_avg_sqs[i] = TO_STATE(exp_avg_sq);
    }
}

/* Adds the squares of the coming step's m/d and m*d, of at most LANES elements from i on, lane by lane. */
static INLINE void NAME(add_squares)(const Tensor *t, int64_t i, int lanes, const StepScalars *s, double *adam_sq,
                                     double *inverse_sq)
{
    const PARAM *restrict grads = (const PARAM *)t->grad + i;
    const STATE *restrict exp_avgs = (const STATE *)t->exp_avg + i;
    const STATE *restrict exp_avg_sqs = (const STATE *)t->exp_avg_sq + i;
    for (int lane = 0; lane < lanes; lane++) {
        REAL exp_avg = FROM_STATE(exp_avgs[lane]), exp_avg_sq = FROM_STATE(exp_avg_sqs[lane]);
        const REAL grad = (REAL)s->sign * FROM_PARAM(grads[lane]);
        const REAL denom = NAME(moments)(grad, &exp_avg, &exp_avg_sq, s);
        const double adam = exp_avg / denom, inverse = exp_avg * denom;
        adam_sq[lane] += adam * adam;
        inverse_sq[lane] += inverse * inverse;
    }
}

/* Sums of the squares of m/d and m*d over the elements [begin, end); writes nothing else. The order of the additions
 * is the same for every instruction set and number of threads. */
static CLONES void NAME(norms)(const Tensor *t, int64_t begin, int64_t end, const StepScalars *scalars, double sums[2])
{
    const StepScalars s = *scalars;
    double adam_sq[LANES] = {0}, inverse_sq[LANES] = {0};
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES)
        NAME(add_squares)(t, i, LANES, &s, adam_sq, inverse_sq);
    NAME(add_squares)(t, i, (int)(end - i), &s, adam_sq, inverse_sq);
    sums[0] = sums[1] = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sums[0] += adam_sq[lane];
        sums[1] += inverse_sq[lane];
    }
}
