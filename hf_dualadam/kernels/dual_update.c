/* One step of DualAdam over all tensors of an optimizer, one pass over memory: the CPU kernel of hf_dualadam.
 *
 * From top to bottom: the tables filled in by cpu.py, the formula (formula.h), the storage formats (formats.h), one
 * pass over a chunk, the scalars of a step, and the distribution of the chunks over threads.
 *
 * Plain C without headers of torch or Python, so one build works with every version of either. It is not linked
 * against an OpenMP runtime: cpu.py passes the entry point of the one torch has loaded, so a process never loads two.
 */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef SOURCES_CHECKSUM
#define SOURCES_CHECKSUM 0u
#endif
/* CRC-32 of the sources at build time, from setup.py; cpu.py compares it with the files next to the kernel. */
const uint32_t dual_update_sources = SOURCES_CHECKSUM;

#define INLINE inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define BLOCK 128  /* elements that share a scale in 8-bit moments */
#define PIECE 4    /* blocks read, updated and written at a time: with fewer, arithmetic waits; with more, memory */
#define CHUNK 256  /* blocks per task; the param, grad, m and v of a float32 chunk take 512 KiB */
#define LANES (BLOCK / 4) /* partial sums of squares: enough for several vectors */
#define N_SUMS 4   /* of squares: of m/d, of m*d and, for the last update only, of m and of the parameters */
#define SCALE 0x1p30 /* of d in the last update: brings the squares of m/d and of m*d into the range of float */
#define OCTAVES 40 /* range of the codes of exp_avg_sq within a block */
#define DITHERED_CODES 16 /* codes of exp_avg below this are not rounded to nearest */

/* Instruction sets, selected at load time where the compiler and the C library support it. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CLONES
#endif

/* ---- the tables: one row per tensor and one per parameter group; all fields are 8 bytes wide ---- */

typedef struct {
    void *param, *grad, *exp_avg, *exp_avg_sq;
    void *correction;                                       /* of 16-bit weights; else NULL */
    float *exp_avg_scale, *exp_avg_sq_min, *exp_avg_sq_max; /* of 8-bit moments; else NULL */
    float *step;
    int64_t size; /* of the parameter, in bytes */
    int64_t row;  /* elements per row, which blocks do not cross; with 8-bit moments, those of one param[i] */
    int64_t dtype, moments_dtype, correction_bits, group;
} Tensor;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay, switch_rate, inverse_scale, normalize_inverse, maximize;
} Group;

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, CODES };
static const int64_t itemsizes[] = {4, 8, 2, 2, 1};

typedef struct {
    double beta1, beta2, eps, sign, decay, step_size, bias2_rsqrt, adam_weight, inverse_weight;
    double norm_ratio; /* rescales m*d to the norm of m/d; 1 unless the inverse update is normalized */
    float step;
    int moments_done; /* m and v are already updated: the pass over the norms stored them */
} StepScalars;

typedef struct {
    double lanes[N_SUMS][LANES];
} Squares;

/* The purposes of dual_update, dual_norms and last_norms. */
typedef enum { UPDATE, NEXT_NORMS, LAST_NORMS } Purpose;

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

/* ---- the formats ---- */

#include "formats.h"

/* ---- one pass over the blocks [begin, end) of a tensor ---- */

typedef struct {
    float param[PIECE * BLOCK], grad[PIECE * BLOCK], exp_avg[PIECE * BLOCK], exp_avg_sq[PIECE * BLOCK];
} Buffers;

/* Returns float32 numbers in place; converts 16-bit numbers into the buffer. */
static INLINE float *read_floats(const void *from, int64_t dtype, int64_t i, float *buffer, int64_t n)
{
    if (dtype == FLOAT32)
        return (float *)from + i;
    if (dtype == BFLOAT16)
        read_bfloat16(buffer, (const uint16_t *)from + i, n);
    else
        read_float16(buffer, (const uint16_t *)from + i, n);
    return buffer;
}

static INLINE float *read_params(const Tensor *t, int64_t i, float *buffer, int64_t n)
{
    float *params = read_floats(t->param, t->dtype, i, buffer, n);
    if (t->correction_bits == 8 && t->dtype == BFLOAT16)
        add_bfloat16_corrections(params, (int8_t *)t->correction + i, 8, n);
    else if (t->correction_bits == 16 && t->dtype == BFLOAT16)
        add_bfloat16_corrections(params, (int16_t *)t->correction + i, 16, n);
    else if (t->correction_bits == 8)
        add_float16_corrections(params, (int8_t *)t->correction + i, 8, n);
    else if (t->correction_bits == 16)
        add_float16_corrections(params, (int16_t *)t->correction + i, 16, n);
    return params;
}

static INLINE void write_params(const Tensor *t, int64_t i, const float *params, float step, int64_t n)
{
    uint16_t *to = (uint16_t *)t->param + i;
    if (t->dtype == FLOAT32)
        return;
    if (t->dtype == BFLOAT16) {
        if (t->correction_bits == 8)
            write_corrected_bfloat16(to, (int8_t *)t->correction + i, 8, params, step, n);
        else if (t->correction_bits == 16)
            write_corrected_bfloat16(to, (int16_t *)t->correction + i, 16, params, step, n);
        else
            write_bfloat16(to, params, n);
        return;
    }
    write_float16(to, params, n);
    if (t->correction_bits) {
        float rounded[PIECE * BLOCK];
        read_float16(rounded, to, n);
        if (t->correction_bits == 8)
            write_float16_corrections((int8_t *)t->correction + i, 8, rounded, params, step, n);
        else
            write_float16_corrections((int16_t *)t->correction + i, 16, rounded, params, step, n);
    }
}

/* The length of the block that begins at element k of n; a constant where n is one. */
static INLINE int64_t block_length(int64_t k, int64_t n)
{
    return n % BLOCK == 0 || n - k > BLOCK ? BLOCK : n - k;
}

static INLINE void read_moments(const Tensor *t, int64_t block, int64_t i, Buffers *buffers, float **exp_avg,
                                float **exp_avg_sq, int64_t n)
{
    if (t->moments_dtype != CODES) {
        *exp_avg = read_floats(t->exp_avg, t->moments_dtype, i, buffers->exp_avg, n);
        *exp_avg_sq = read_floats(t->exp_avg_sq, t->moments_dtype, i, buffers->exp_avg_sq, n);
        return;
    }
    *exp_avg = buffers->exp_avg;
    *exp_avg_sq = buffers->exp_avg_sq;
    for (int64_t k = 0; k < n; k += BLOCK, block++)
        read_codes(*exp_avg + k, *exp_avg_sq + k, (int8_t *)t->exp_avg + i + k, (uint8_t *)t->exp_avg_sq + i + k,
                   t->exp_avg_scale[block], t->exp_avg_sq_min[block], t->exp_avg_sq_max[block], block_length(k, n));
}

static INLINE void write_moments(const Tensor *t, int64_t block, int64_t i, const float *exp_avg,
                                 const float *exp_avg_sq, float step, int64_t n)
{
    if (t->moments_dtype == BFLOAT16) {
        write_bfloat16((uint16_t *)t->exp_avg + i, exp_avg, n);
        write_bfloat16((uint16_t *)t->exp_avg_sq + i, exp_avg_sq, n);
    } else if (t->moments_dtype == CODES) {
        Coding codings[PIECE]; /* of all blocks first: no block waits for its extremes, root and quotient alone */
        for (int64_t k = 0, j = 0; k < n; k += BLOCK, j++) {
            codings[j] = coding_of(exp_avg + k, exp_avg_sq + k, block_length(k, n));
            t->exp_avg_scale[block + j] = codings[j].scale;
            t->exp_avg_sq_min[block + j] = codings[j].min;
            t->exp_avg_sq_max[block + j] = codings[j].max;
        }
        for (int64_t k = 0, j = 0; k < n; k += BLOCK, j++)
            write_codes((int8_t *)t->exp_avg + i + k, (uint8_t *)t->exp_avg_sq + i + k, exp_avg + k, exp_avg_sq + k,
                        &codings[j], step, block_length(k, n));
    }
}

static INLINE void update_piece(const Tensor *t, int64_t block, int64_t i, int64_t n, const StepScalars *s)
{
    Buffers buffers ALIGNED;
    float *exp_avg, *exp_avg_sq, *param = read_params(t, i, buffers.param, n);
    const float *grad = read_floats(t->grad, t->dtype, i, buffers.grad, n);
    read_moments(t, block, i, &buffers, &exp_avg, &exp_avg_sq, n);
    update_float(param, grad, exp_avg, exp_avg_sq, n, s);
    write_params(t, i, param, s->step, n);
    write_moments(t, block, i, exp_avg, exp_avg_sq, s->step, n);
}

/* Whether the pass over the norms can store m and v without rounding them. */
static int stores_exactly(const Tensor *t)
{
    return t->moments_dtype == FLOAT32 || t->moments_dtype == FLOAT64;
}

static INLINE void norms_block(const Tensor *t, int64_t block, int64_t i, int64_t n, const StepScalars *s,
                               Purpose purpose, Squares *squares)
{
    Buffers buffers ALIGNED;
    float *exp_avg, *exp_avg_sq;
    read_moments(t, block, i, &buffers, &exp_avg, &exp_avg_sq, n);
    if (purpose == LAST_NORMS)
        last_norms_float(read_floats(t->param, t->dtype, i, buffers.param, n), exp_avg, exp_avg_sq, n, s, squares);
    else
        norms_float(read_floats(t->grad, t->dtype, i, buffers.grad, n), exp_avg, exp_avg_sq, n, s,
                    purpose == UPDATE && stores_exactly(t), squares);
}

static INLINE void norms_of_doubles(const Tensor *t, int64_t i, int64_t n, const StepScalars *s, Purpose purpose,
                                    Squares *squares)
{
    double *exp_avg = (double *)t->exp_avg + i, *exp_avg_sq = (double *)t->exp_avg_sq + i;
    if (purpose == LAST_NORMS)
        last_norms_double((double *)t->param + i, exp_avg, exp_avg_sq, n, s, squares);
    else
        norms_double((double *)t->grad + i, exp_avg, exp_avg_sq, n, s, purpose == UPDATE, squares);
}

static int64_t numel(const Tensor *t)
{
    return t->size / itemsizes[t->dtype];
}

static int64_t blocks_of_row(const Tensor *t)
{
    return (t->row + BLOCK - 1) / BLOCK;
}

static int64_t n_blocks(const Tensor *t)
{
    return t->row ? numel(t) / t->row * blocks_of_row(t) : 0;
}

/* The index of a block's first element; for the block past the last, the number of elements. */
static int64_t first_element(const Tensor *t, int64_t block)
{
    const int64_t of_row = blocks_of_row(t);
    return block / of_row * t->row + block % of_row * BLOCK;
}

/* The number of elements from the start of a block to the end of its row. */
static int64_t rest_of_row(const Tensor *t, int64_t block)
{
    return t->row - block % blocks_of_row(t) * BLOCK;
}

/* The number of elements to process next: those of up to PIECE blocks, across rows if no block is shorter. */
static INLINE int64_t piece_length(const Tensor *t, int64_t block, int64_t end)
{
    const int64_t most = (end - block < PIECE ? end - block : PIECE) * BLOCK;
    const int64_t rest = t->row % BLOCK ? rest_of_row(t, block) : most;
    return rest < most ? rest : most;
}

static CLONES void update(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s)
{
    int64_t i = first_element(t, begin), n;
    for (int64_t block = begin; block < end; block += (n + BLOCK - 1) / BLOCK, i += n) {
        n = piece_length(t, block, end);
        if (t->dtype == FLOAT64)
            update_double((double *)t->param + i, (double *)t->grad + i, (double *)t->exp_avg + i,
                          (double *)t->exp_avg_sq + i, n, s);
        else if (n == PIECE * BLOCK) /* a length known to the compiler */
            update_piece(t, block, i, PIECE * BLOCK, s);
        else
            update_piece(t, block, i, n, s);
    }
}

/* Prefetches the next block, since nothing is read while squares are summed. */
static INLINE void prefetch(const void *array, int64_t dtype, int64_t i)
{
    const char *block = (const char *)array + i * itemsizes[dtype];
    for (int64_t byte = 0; byte < BLOCK * itemsizes[dtype]; byte += 64)
        __builtin_prefetch(block + byte);
}

/* Sums the squares for a purpose. Before an update, also stores m and v if their format does not round them. */
static CLONES void norms(const Tensor *t, int64_t begin, int64_t end, const StepScalars *s, Purpose purpose,
                         double sums[N_SUMS])
{
    Squares squares ALIGNED = {{{0}}};
    int64_t i = first_element(t, begin), rest = rest_of_row(t, begin);
    for (int64_t block = begin; block < end; block++) {
        const int64_t n = rest < BLOCK ? rest : BLOCK;
        prefetch(purpose == LAST_NORMS ? t->param : t->grad, t->dtype, i + n);
        prefetch(t->exp_avg, t->moments_dtype, i + n);
        prefetch(t->exp_avg_sq, t->moments_dtype, i + n);
        if (t->dtype == FLOAT64)
            norms_of_doubles(t, i, n, s, purpose, &squares);
        else if (n == BLOCK)
            norms_block(t, block, i, BLOCK, s, purpose, &squares);
        else
            norms_block(t, block, i, n, s, purpose, &squares);
        i += n;
        rest = rest > BLOCK ? rest - BLOCK : t->row;
    }
    for (int sum = 0; sum < N_SUMS; sum++) {
        sums[sum] = 0;
        for (int lane = 0; lane < LANES; lane++)
            sums[sum] += squares.lanes[sum][lane];
    }
}

/* ---- scalars of a step, as functional.step_scalars ---- */

static double inverse_weight(double step, double switch_rate)
{
    const double alpha = 1 - step * switch_rate;
    return alpha < switch_rate ? 0 : alpha;
}

static StepScalars step_scalars(float step, const Group *group)
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
        .step = step,
    };
}

/* ---- all tensors, all threads ---- */

/* The work on one tensor. Each of its chunks is a task: to update the chunk or, if the inverse update is normalized,
 * to measure its norms first. Consecutive small tensors share a task. Once the norms of a tensor are known, updating
 * its chunks takes precedence over all tasks, from the last chunk to the first: those measured last are still in the
 * cache, and no thread waits while there is work. */
typedef struct {
    int64_t n_chunks, first_task;
    int measured;          /* whether the norms have to be measured */
    int64_t pending_norms; /* chunks whose norms are not measured yet */
    int64_t next_update;   /* chunks handed out for updating since the norms are known */
    double (*sums)[N_SUMS]; /* of squares, per chunk */
    double norm_ratio;     /* scale of the inverse update: 1 unless it is normalized */
} Work;

typedef struct {
    const Tensor *tensors;
    const Group *groups;
    Work *works;
    int64_t n_tensors, n_tasks, next_task;
    Purpose purpose;
    int64_t *ready;       /* tensors of several chunks whose norms are known: their index plus 1 */
    int64_t n_ready, all_ready, first_ready;
} Job;

/* A thread's state between tasks: consecutive tasks often share their scalars. */
typedef struct {
    Job *job;
    int64_t group;
    StepScalars scalars;
} Worker;

static int64_t end_of_chunk(const Tensor *t, int64_t chunk)
{
    const int64_t blocks = n_blocks(t), end = (chunk + 1) * CHUNK;
    return end < blocks ? end : blocks;
}

static const StepScalars *scalars_for(Worker *worker, int64_t place)
{
    const Tensor *t = &worker->job->tensors[place];
    const float step = *t->step + (worker->job->purpose == NEXT_NORMS); /* dual_update has already counted the step */
    if (t->group != worker->group || step != worker->scalars.step) {
        worker->scalars = step_scalars(step, &worker->job->groups[t->group]);
        worker->group = t->group;
    }
    worker->scalars.norm_ratio = worker->job->works[place].norm_ratio;
    worker->scalars.moments_done = worker->job->works[place].measured && stores_exactly(t);
    return &worker->scalars;
}

static void update_chunk(Worker *worker, int64_t place, int64_t chunk)
{
    const Tensor *t = &worker->job->tensors[place];
    update(t, chunk * CHUNK, end_of_chunk(t, chunk), scalars_for(worker, place));
}

/* Sums the squares of a tensor's chunks, in order. */
static void add_up(const Work *work, double sums[N_SUMS])
{
    for (int sum = 0; sum < N_SUMS; sum++) {
        sums[sum] = 0;
        for (int64_t chunk = 0; work->measured && chunk < work->n_chunks; chunk++)
            sums[sum] += work->sums[chunk][sum];
    }
}

/* Measures the norms of a chunk. After the tensor's last one, computes their ratio (summed in the order of the chunks,
 * whichever is last) and updates the tensor or marks it as ready. */
static void measure_chunk(Worker *worker, int64_t place, int64_t chunk)
{
    Job *job = worker->job;
    Work *work = &job->works[place];
    const Tensor *t = &job->tensors[place];
    norms(t, chunk * CHUNK, end_of_chunk(t, chunk), scalars_for(worker, place), job->purpose, work->sums[chunk]);
    if (job->purpose != UPDATE || __atomic_sub_fetch(&work->pending_norms, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    double squares[N_SUMS];
    add_up(work, squares);
    work->norm_ratio = squares[1] != 0 ? sqrt(squares[0] / squares[1]) : 0; /* NaN stays NaN */
    if (work->n_chunks == 1)
        update_chunk(worker, place, 0);
    else {
        const int64_t slot = __atomic_fetch_add(&job->n_ready, 1, __ATOMIC_RELAXED);
        __atomic_store_n(&job->ready[slot], place + 1, __ATOMIC_RELEASE);
    }
}

/* Updates a chunk of a tensor whose norms are known. Returns 0 if there is none. */
static int update_ready(Worker *worker)
{
    Job *job = worker->job;
    int64_t slot;
    while ((slot = __atomic_load_n(&job->first_ready, __ATOMIC_RELAXED)) < job->all_ready) {
        const int64_t place = __atomic_load_n(&job->ready[slot], __ATOMIC_ACQUIRE) - 1;
        if (place < 0)
            return 0;
        Work *work = &job->works[place];
        const int64_t number = __atomic_fetch_add(&work->next_update, 1, __ATOMIC_RELAXED);
        if (number < work->n_chunks) {
            update_chunk(worker, place, work->n_chunks - 1 - number);
            return 1;
        }
        __atomic_compare_exchange_n(&job->first_ready, &slot, slot + 1, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
    return 0;
}

/* Runs in every thread: takes tasks until none is left. */
static void work(void *data)
{
    Job *job = data;
    Worker worker = {.job = job, .group = -1};
    int64_t place = 0; /* task numbers increase, so this thread never returns to an earlier tensor */
    for (;;) {
        if (update_ready(&worker))
            continue;
        const int64_t task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED);
        if (task >= job->n_tasks) {
            if (__atomic_load_n(&job->first_ready, __ATOMIC_RELAXED) == job->all_ready)
                return;
            sched_yield(); /* other threads are measuring the last norms */
            continue;
        }
        for (; place < job->n_tensors && job->works[place].first_task <= task; place++) {
            const Work *work = &job->works[place];
            const int64_t chunk = task - work->first_task;
            if (chunk < work->n_chunks)
                (work->measured ? measure_chunk : update_chunk)(&worker, place, chunk);
            if (chunk + 1 < work->n_chunks)
                break;
        }
    }
}

/* Divides the tensors into tasks. Returns the number of chunks whose norms have to be measured. */
static int64_t plan(Job *job, const double *norm_ratios)
{
    int64_t n_measured = 0, blocks_of_task = CHUNK;
    for (int64_t i = 0; i < job->n_tensors; i++) {
        const Tensor *t = &job->tensors[i];
        const Group *group = &job->groups[t->group];
        Work *work = &job->works[i];
        const int64_t blocks = n_blocks(t);
        work->norm_ratio = norm_ratios ? norm_ratios[i] : 1;
        work->measured = job->purpose == LAST_NORMS ||
                         (!norm_ratios && group->normalize_inverse &&
                          inverse_weight(*t->step + 1, group->switch_rate) * group->inverse_scale != 0);
        work->n_chunks = job->purpose != UPDATE && !work->measured ? 0 : (blocks + CHUNK - 1) / CHUNK;
        work->pending_norms = work->n_chunks;
        if (work->n_chunks == 1 && blocks_of_task + blocks <= CHUNK) {
            work->first_task = job->n_tasks - 1;
            blocks_of_task += blocks;
        } else {
            work->first_task = job->n_tasks;
            job->n_tasks += work->n_chunks;
            blocks_of_task = work->n_chunks == 1 ? blocks : CHUNK;
        }
        n_measured += work->measured ? work->n_chunks : 0;
        job->all_ready += work->measured && work->n_chunks > 1 && job->purpose == UPDATE;
    }
    return n_measured;
}

typedef void Parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* Implements dual_update, dual_norms and last_norms. Stores each tensor's sums of squares in `sums` if not NULL. */
static int run(Job job, const double *norm_ratios, double (*sums)[N_SUMS], int threads, Parallel *parallel)
{
    job.works = calloc(job.n_tensors + 1, sizeof *job.works);
    const int64_t n_measured = job.works ? plan(&job, norm_ratios) : 0;
    double (*chunk_sums)[N_SUMS] = malloc((n_measured + 1) * sizeof *chunk_sums);
    job.ready = calloc(job.all_ready + 1, sizeof *job.ready);
    const int failed = !job.works || !chunk_sums || !job.ready;
    if (!failed) {
        double (*next_sums)[N_SUMS] = chunk_sums;
        for (int64_t i = 0; i < job.n_tensors; i++) {
            job.works[i].sums = next_sums;
            next_sums += job.works[i].measured ? job.works[i].n_chunks : 0;
            if (job.purpose == UPDATE)
                *job.tensors[i].step += 1;
        }
        if (threads > 1 && job.n_tasks > 1) /* waking other threads takes longer than a single task */
            parallel(work, &job, threads, 0);
        else
            work(&job);
        for (int64_t i = 0; sums && i < job.n_tensors; i++)
            add_up(&job.works[i], sums[i]);
    }
    free(job.works);
    free(chunk_sums);
    free(job.ready);
    return failed;
}

/* Counts the step of every tensor and updates it.
 *   norm_ratios  the scale of each tensor's inverse update, or NULL to measure it in groups that normalize
 *   parallel     GOMP_parallel of the OpenMP runtime in use; not called, and may be NULL, if threads is 1
 * Returns 0, or 1 if it ran out of memory; then nothing has changed. */
int dual_update(const Tensor *tensors, int64_t n_tensors, const Group *groups, const double *norm_ratios, int threads,
                Parallel *parallel)
{
    const Job job = {.tensors = tensors, .groups = groups, .n_tensors = n_tensors};
    return run(job, norm_ratios, NULL, threads, parallel);
}

/* Stores in `sums`, for each tensor, the sums of the squares of m/d and of m*d in the coming update, or 0 if that is
 * not normalized; changes nothing else. For sharded tensors, the caller adds up the sums of all processes. Returns as
 * dual_update. */
int dual_norms(const Tensor *tensors, int64_t n_tensors, const Group *groups, double (*sums)[N_SUMS], int threads,
               Parallel *parallel)
{
    const Job job = {.tensors = tensors, .groups = groups, .n_tensors = n_tensors, .purpose = NEXT_NORMS};
    return run(job, NULL, sums, threads, parallel);
}

/* Stores in `sums`, for each tensor, the sums of the squares of m/d / SCALE, of m*d * SCALE, of m and of the parameter
 * (without its correction) in the last update; changes nothing else. Reads no gradients. Returns as dual_update. */
int last_norms(const Tensor *tensors, int64_t n_tensors, const Group *groups, double (*sums)[N_SUMS], int threads,
               Parallel *parallel)
{
    const Job job = {.tensors = tensors, .groups = groups, .n_tensors = n_tensors, .purpose = LAST_NORMS};
    return run(job, NULL, sums, threads, parallel);
}

/* Copies the step count of each tensor from its address. */
void read_steps(float *const *steps, int64_t n, float *counts)
{
    for (int64_t i = 0; i < n; i++)
        counts[i] = *steps[i];
}

/* Increments the step count of each tensor, for kernels that run elsewhere.
 *   steps     addresses of the counts
 *   rows      the index in `expected` of each tensor
 *   expected  the counts that should result
 * Returns how many differ from those expected. */
int64_t count_steps(float *const *steps, const int64_t *rows, int64_t n, const float *expected)
{
    int64_t unexpected = 0;
    for (int64_t i = 0; i < n; i++)
        unexpected += (*steps[i] += 1) != expected[rows[i]];
    return unexpected;
}
