/* The update of hf_dualadam/functional.py in its names and order. dual_update.c includes this file twice, with
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
    *exp_avg = rest1 < (REAL)0.5 ? *exp_avg + rest1 * gap : grad - beta1 * gap;  /* m, rounded as torch.lerp does */
    *exp_avg_sq = beta2 * *exp_avg_sq + rest2 * grad * grad;                     /* v */
}

/* d of one element. */
static INLINE REAL NAME(denominator)(REAL exp_avg_sq, const StepScalars *s)
{
    return SQRT(exp_avg_sq) * (REAL)(1 / s->bias2_sqrt) + (REAL)s->eps;
}

/* One step of n elements, in place; with moments_done, m and v are those of this step already. */
static INLINE void NAME(update_elements)(REAL *restrict params, const REAL *restrict grads, REAL *restrict exp_avgs,
                                         REAL *restrict exp_avg_sqs, int64_t n, const StepScalars *scalars,
                                         int moments_done)
{
    const StepScalars s = *scalars;
    const REAL decay = (REAL)s.decay, step_size = (REAL)s.step_size;
    const REAL alpha = (REAL)s.alpha, adam_share = (REAL)s.adam_share;
    const int blend = s.adam_share != 1; /* before the switch; alpha here is times norm_ratio, which may be 0 */
    for (int64_t i = 0; i < n; i++) {
        REAL param = params[i], exp_avg = exp_avgs[i], exp_avg_sq = exp_avg_sqs[i];
        param *= decay;                                                         /* theta <- theta * (1 - eta*lambda) */
        if (!moments_done)
            NAME(moments)(grads[i], &exp_avg, &exp_avg_sq, &s);                 /* m, v */
        const REAL denom = NAME(denominator)(exp_avg_sq, &s);                   /* d */
        REAL update = adam_share * (exp_avg / denom);                           /* (1-alpha) * m/d */
        if (blend)                                                              /* m*d may overflow after the switch */
            update += alpha * (exp_avg * denom);                                /* + alpha * m*d */
        param -= step_size * update;              /* theta <- theta - eta/(1-beta1^t) * update */
        params[i] = param;
        if (!moments_done) {
            exp_avgs[i] = exp_avg;
            exp_avg_sqs[i] = exp_avg_sq;
        }
    }
}

/* The same, with a loop of its own for each case. */
static INLINE void NAME(update)(REAL *params, const REAL *grads, REAL *exp_avgs, REAL *exp_avg_sqs, int64_t n,
                                const StepScalars *scalars)
{
    if (scalars->moments_done)
        NAME(update_elements)(params, grads, exp_avgs, exp_avg_sqs, n, scalars, 1);
    else
        NAME(update_elements)(params, grads, exp_avgs, exp_avg_sqs, n, scalars, 0);
}

/* The sum of the squares of BLOCK elements, added up in pairs: vectors are used, and the order of the additions is the
 * same for every instruction set and number of threads. */
static INLINE double NAME(sum_of_squares)(const REAL *restrict values)
{
    double parts[BLOCK / 2];
    for (int i = 0; i < BLOCK / 2; i++) {
        const double first = values[i], second = values[i + BLOCK / 2];
        parts[i] = first * first + second * second;
    }
    for (int half = BLOCK / 4; half > 0; half /= 2) {
#pragma GCC ivdep
        for (int i = 0; i < half; i++)
            parts[i] += parts[i + half];
    }
    return parts[0];
}

/* Updates m and v of n <= BLOCK elements; adds the squares of m/d and of m*d to the sums. */
static INLINE void NAME(norms)(const REAL *restrict grads, REAL *restrict exp_avgs, REAL *restrict exp_avg_sqs,
                               int64_t n, const StepScalars *scalars, double sums[2])
{
    const StepScalars s = *scalars;
    REAL adam[BLOCK], inverse[BLOCK];
    for (int64_t i = 0; i < n; i++) {
        REAL exp_avg = exp_avgs[i], exp_avg_sq = exp_avg_sqs[i];
        NAME(moments)(grads[i], &exp_avg, &exp_avg_sq, &s);
        const REAL denom = NAME(denominator)(exp_avg_sq, &s);
        exp_avgs[i] = exp_avg;
        exp_avg_sqs[i] = exp_avg_sq;
        adam[i] = exp_avg / denom;
        inverse[i] = exp_avg * denom;
    }
    for (; n < BLOCK; n++)
        adam[n] = inverse[n] = 0;
    sums[0] += NAME(sum_of_squares)(adam);
    sums[1] += NAME(sum_of_squares)(inverse);
}
