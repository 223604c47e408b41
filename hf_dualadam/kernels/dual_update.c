/* One step of DualAdam over all tensors of an optimizer, one pass over memory: the CPU kernel of hf_dualadam.
 *
 * Plain C, with no header of torch or Python, so one build fits every version of either. It links no OpenMP runtime:
 * cpu.py hands over the entry point of the one that torch has loaded, so that there is never a second one.
 */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef SOURCES_CHECKSUM
#define SOURCES_CHECKSUM 0u
#endif
/* CRC-32 of this file and formula.h as setup.py has found them; cpu.py compares it with the files beside the kernel. */
const uint32_t dual_update_sources = SOURCES_CHECKSUM;

#define INLINE inline __attribute__((always_inline))
#define CHUNK 32768 /* elements that one thread takes at a time; p, g, m and v of one float32 chunk are 512 KiB */
#define BLOCK 128   /* elements that are widened from half precision at a time */
#define LANES 32    /* partial sums that squares are added up in: enough for several vectors */

/* Instruction sets to choose from at load time, where the compiler and the C library can. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

/* The rows that cpu.py fills: one per tensor, one per parameter group. All fields are 8 bytes wide. */
typedef struct {
    void *param, *grad, *exp_avg, *exp_avg_sq;
    float *step;
    int64_t size; /* of the parameter, in bytes */
    int64_t dtype, group;
} Tensor;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay, switch_rate, inverse_scale, normalize_inverse, maximize;
} Group;

typedef struct {
    double beta1, beta2, eps, sign, decay, step_size, bias2_rsqrt, adam_weight, inverse_weight;
    double norm_ratio; /* rescales m*d to the norm of m/d; 1 unless the inverse update is normalized */
    int moments_done;  /* m and v are those of this step already: the pass over the norms has updated them */
} StepScalars;

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
static const int64_t itemsizes[] = {4, 8, 2, 2};

/* ---- half precision: conversions to and from float, to nearest even, without branches ---- */

static INLINE float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static INLINE uint32_t as_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static INLINE float from_bfloat16(uint16_t x)
{
    return as_float((uint32_t)x << 16);
}

static INLINE uint16_t to_bfloat16(float x)
{
    const uint32_t bits = as_bits(x); /* NaN stays NaN: from arithmetic on bfloat16, its low bits are 0 */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static INLINE float from_float16(uint16_t x)
{
    const uint32_t magnitude = x & 0x7fff, sign = (uint32_t)(x & 0x8000) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);         /* exponent bias 15 to 127 */
    const uint32_t subnormal = as_bits((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t infinite = (magnitude << 13) | 0x7f800000;         /* or NaN */
    return as_float(sign | (magnitude >= 0x7c00 ? infinite : magnitude < 0x0400 ? subnormal : normal));
}

static INLINE uint16_t to_float16(float x)
{
    const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000; /* 0.5 shifts the mantissa in place */
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (magnitude >= 0x477ff000 ? infinite : finite)); /* 65520 and more round to infinity */
}

/* ---- the formula, in float and in double ---- */

#define NAME(function) function##_float
#define REAL float
#define SQRT sqrtf
#include "formula.h"
#undef NAME
#undef REAL
#undef SQRT

#define NAME(function) function##_double
#define REAL double
#define SQRT sqrt
#include "formula.h"

/* ---- the elements [begin, end) of a tensor, per dtype ---- */

static CLONES void update_float32(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s)
{
    update_float((float *)t->param + begin, (float *)t->grad + begin, (float *)t->exp_avg + begin,
                 (float *)t->exp_avg_sq + begin, end - begin, s);
}

static CLONES void norms_float32(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, double sums[2])
{
    norms_float((float *)t->grad + begin, (float *)t->exp_avg + begin, (float *)t->exp_avg_sq + begin, end - begin, s,
                sums);
}

static CLONES void update_float64(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s)
{
    update_double((double *)t->param + begin, (double *)t->grad + begin, (double *)t->exp_avg + begin,
                  (double *)t->exp_avg_sq + begin, end - begin, s);
}

static CLONES void norms_float64(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, double sums[2])
{
    norms_double((double *)t->grad + begin, (double *)t->exp_avg + begin, (double *)t->exp_avg_sq + begin, end - begin,
                 s, sums);
}

/* Half precision is widened to float a block at a time; the blocks stay in the first-level cache. */

static INLINE void widen(float *restrict to, const void *from, int64_t begin, int64_t n, int bfloat16)
{
    const uint16_t *restrict half = (const uint16_t *)from + begin;
    for (int64_t i = 0; i < n; i++)
        to[i] = bfloat16 ? from_bfloat16(half[i]) : from_float16(half[i]);
}

static INLINE void narrow(void *to, const float *restrict from, int64_t begin, int64_t n, int bfloat16)
{
    uint16_t *restrict half = (uint16_t *)to + begin;
    for (int64_t i = 0; i < n; i++)
        half[i] = bfloat16 ? to_bfloat16(from[i]) : to_float16(from[i]);
}

static INLINE void update_half_block(const Tensor *t, int64_t begin, int64_t n, const StepScalars *s, int bfloat16)
{
    float param[BLOCK], grad[BLOCK], exp_avg[BLOCK], exp_avg_sq[BLOCK];
    widen(param, t->param, begin, n, bfloat16);
    widen(grad, t->grad, begin, n, bfloat16);
    if (bfloat16) {
        widen(exp_avg, t->exp_avg, begin, n, bfloat16);
        widen(exp_avg_sq, t->exp_avg_sq, begin, n, bfloat16);
        update_float(param, grad, exp_avg, exp_avg_sq, n, s);
        narrow(t->exp_avg, exp_avg, begin, n, bfloat16);
        narrow(t->exp_avg_sq, exp_avg_sq, begin, n, bfloat16);
    } else
        update_float(param, grad, (float *)t->exp_avg + begin, (float *)t->exp_avg_sq + begin, n, s);
    narrow(t->param, param, begin, n, bfloat16);
}

static INLINE void norms_half_block(const Tensor *t, int64_t begin, int64_t n, const StepScalars *s, double sums[2],
                                    int bfloat16)
{
    float grad[BLOCK], exp_avg[BLOCK], exp_avg_sq[BLOCK];
    widen(grad, t->grad, begin, n, bfloat16);
    if (bfloat16) {
        widen(exp_avg, t->exp_avg, begin, n, bfloat16);
        widen(exp_avg_sq, t->exp_avg_sq, begin, n, bfloat16);
        norms_float(grad, exp_avg, exp_avg_sq, n, s, sums);
    } else
        norms_float(grad, (float *)t->exp_avg + begin, (float *)t->exp_avg_sq + begin, n, s, sums);
}

/* Whole blocks, whose length the compiler knows, and the rest. */

static INLINE void update_half(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, int bfloat16)
{
    for (; end - begin >= BLOCK; begin += BLOCK)
        update_half_block(t, begin, BLOCK, s, bfloat16);
    update_half_block(t, begin, end - begin, s, bfloat16);
}

static INLINE void norms_half(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, double sums[2],
                              int bfloat16)
{
    for (; end - begin >= BLOCK; begin += BLOCK)
        norms_half_block(t, begin, BLOCK, s, sums, bfloat16);
    norms_half_block(t, begin, end - begin, s, sums, bfloat16);
}

static CLONES void update_bfloat16(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s)
{
    update_half(t, begin, end, s, 1);
}

static CLONES void norms_bfloat16(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, double sums[2])
{
    norms_half(t, begin, end, s, sums, 1);
}

static CLONES void update_float16(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s)
{
    update_half(t, begin, end, s, 0);
}

static CLONES void norms_float16(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, double sums[2])
{
    norms_half(t, begin, end, s, sums, 0);
}

static void (*const updates[])(const Tensor *, int64_t, int64_t, const StepScalars *) = {
    update_float32, update_float64, update_bfloat16, update_float16};
static void (*const norms[])(const Tensor *, int64_t, int64_t, const StepScalars *, double *) = {
    norms_float32, norms_float64, norms_bfloat16, norms_float16};

/* ---- scalars of a step, as functional.step_scalars ---- */

static double inverse_weight(double step, double switch_rate)
{
    const double alpha = 1 - step * switch_rate;
    return alpha < switch_rate ? 0 : alpha;
}

static StepScalars step_scalars(double step, const Group *group)
{
    const double alpha = inverse_weight(step, group->switch_rate);
    return (StepScalars){
        .beta1 = group->beta1,
        .beta2 = group->beta2,
        .eps = group->eps,
        .sign = group->maximize ? -1 : 1,
        .decay = 1 - group->lr * group->weight_decay,
        .step_size = group->lr / (1 - pow(group->beta1, step)),
        .bias2_rsqrt = 1 / sqrt(1 - pow(group->beta2, step)),
        .adam_weight = 1 - alpha,
        .inverse_weight = alpha * group->inverse_scale,
        .norm_ratio = 1,
    };
}

/* ---- all tensors, all threads ---- */

/* What there is to do about one tensor. A task is one chunk of it, or its norms where they are to be measured: those
 * of all chunks come first. A tensor of a single chunk is one task in any case. */
typedef struct {
    int64_t numel, first_task;
    int normalize;
    int64_t pending_norms; /* chunks whose norms are still to be measured; -1 once norm_ratio is known */
    double (*sums)[2];     /* one pair per chunk: squares of m/d and of m*d */
    double norm_ratio;     /* scale of the inverse update: 1 unless it is normalized */
} Plan;

typedef struct {
    const Tensor *tensors;
    const Group *groups;
    Plan *plans;
    int64_t n_tensors, n_tasks, next_task;
} Job;

static int64_t n_chunks(int64_t numel)
{
    return (numel + CHUNK - 1) / CHUNK;
}

/* The last plan with first_task <= task. */
static int64_t plan_of_task(const Job *job, int64_t task)
{
    int64_t low = 0, high = job->n_tensors;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (job->plans[middle].first_task <= task)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Counts one chunk's norms as done. The last one works out the ratio, adding up in the order of the chunks. */
static void finish_norms(Plan *plan)
{
    if (__atomic_sub_fetch(&plan->pending_norms, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    double adam_sq = 0, inverse_sq = 0;
    for (int64_t chunk = 0; chunk < n_chunks(plan->numel); chunk++) {
        adam_sq += plan->sums[chunk][0];
        inverse_sq += plan->sums[chunk][1];
    }
    plan->norm_ratio = inverse_sq != 0 ? sqrt(adam_sq / inverse_sq) : 0; /* NaN stays NaN */
    __atomic_store_n(&plan->pending_norms, -1, __ATOMIC_RELEASE);
}

/* What every thread does: take the next task until none is left. An update of a large tensor goes from the last chunk
 * to the first, so that it finds in the cache what the norms have read last. */
static void work(void *data)
{
    Job *job = data;
    StepScalars scalars;
    double step = -1;
    int64_t group = -1, task;
    while ((task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED)) < job->n_tasks) {
        const int64_t place = plan_of_task(job, task);
        const Tensor *t = &job->tensors[place];
        Plan *plan = &job->plans[place];
        const int64_t n = n_chunks(plan->numel), number = task - plan->first_task;
        const int measure = plan->normalize && number < n, update = !measure || n == 1;
        const int64_t chunk = number < n ? number : 2 * n - 1 - number;
        const int64_t begin = chunk * CHUNK, end = plan->numel - begin < CHUNK ? plan->numel : begin + CHUNK;
        if (*t->step != step || t->group != group) {
            step = *t->step;
            group = t->group;
            scalars = step_scalars(step, &job->groups[group]);
        }
        if (measure) {
            plan->sums[chunk][0] = plan->sums[chunk][1] = 0;
            norms[t->dtype](t, begin, end, &scalars, plan->sums[chunk]);
            finish_norms(plan);
        }
        if (update) {
            while (plan->normalize && __atomic_load_n(&plan->pending_norms, __ATOMIC_ACQUIRE) >= 0)
                sched_yield();
            scalars.norm_ratio = plan->norm_ratio;
            scalars.moments_done = plan->normalize && t->dtype != BFLOAT16; /* it stores m and v rounded */
            updates[t->dtype](t, begin, end, &scalars);
        }
    }
}

/* Counts the step of every tensor and updates it.
 *   parallel   GOMP_parallel of the OpenMP runtime in use; not called, and may be NULL, if threads is 1
 * Returns 0, or 1 if there was no memory; then nothing has changed. */
int dual_update(const Tensor *tensors, int64_t n_tensors, const Group *groups, int threads,
                void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags))
{
    Plan *plans = calloc(n_tensors + 1, sizeof *plans);
    int64_t numel = 0, n_norms = 0;
    for (int64_t i = 0; plans && i < n_tensors; i++) {
        const Group *group = &groups[tensors[i].group];
        plans[i].numel = tensors[i].size / itemsizes[tensors[i].dtype];
        plans[i].norm_ratio = 1;
        if (group->normalize_inverse && step_scalars(*tensors[i].step + 1, group).inverse_weight != 0)
            plans[i].normalize = 1;
        plans[i].pending_norms = n_chunks(plans[i].numel);
        numel += plans[i].numel;
        n_norms += plans[i].normalize ? n_chunks(plans[i].numel) : 0;
    }
    double (*sums)[2] = malloc((n_norms + 1) * sizeof *sums);
    if (!plans || !sums) {
        free(plans);
        free(sums);
        return 1;
    }
    Job job = {.tensors = tensors, .groups = groups, .plans = plans, .n_tensors = n_tensors};
    double (*next_sums)[2] = sums;
    for (int64_t i = 0; i < n_tensors; i++) {
        const int64_t n = n_chunks(plans[i].numel);
        plans[i].first_task = job.n_tasks;
        plans[i].sums = next_sums;
        next_sums += plans[i].normalize ? n : 0;
        job.n_tasks += plans[i].normalize && n > 1 ? 2 * n : n;
        *tensors[i].step += 1;
    }
    if (threads > 1 && numel > CHUNK) /* for less, waking other threads takes longer than the work */
        parallel(work, &job, threads, 0);
    else
        work(&job);
    free(plans);
    free(sums);
    return 0;
}
