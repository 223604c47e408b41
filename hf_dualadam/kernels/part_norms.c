/* Norms of the components of the last update, for all tensors, from their moments in one pass over memory. Changes
 * nothing.
 *
 * The second source of the CPU kernel of hf_dualadam, called by part_norms.py. As in dual_update.c, no headers of torch
 * or Python are used, and the caller passes the entry point of torch's OpenMP runtime.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))
#define CHUNK 32768 /* elements per task */
#define LANES 32    /* partial sums: enough for several vectors, and added in the same order on every processor */
#define N_NORMS 4

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

/* The rows filled in by part_norms.py, one per tensor. All fields are 8 bytes wide. */
typedef struct {
    const void *param, *exp_avg, *exp_avg_sq;
    int64_t numel, dtype;       /* of all three: 0 float32, 1 float64, 2 bfloat16 */
    double bias2_rsqrt, eps;
} Row;

static INLINE float load_float32(const void *from, int64_t i) { return ((const float *)from)[i]; }

static INLINE double load_float64(const void *from, int64_t i) { return ((const double *)from)[i]; }

static INLINE float load_bfloat16(const void *from, int64_t i)
{
    const uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Adds the squares of m/d, m*d, m and the parameter, of the elements [begin, end), to the sums. */
#define MEASURE(DTYPE, REAL, SQRT)                                                                                     \
    static INLINE void add_##DTYPE(const Row *row, int64_t begin, int64_t n, double lanes[N_NORMS][LANES])             \
    {                                                                                                                  \
        REAL parts[N_NORMS][LANES];                                                                                    \
        const REAL bias2_rsqrt = (REAL)row->bias2_rsqrt, eps = (REAL)row->eps;                                         \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            const REAL exp_avg = load_##DTYPE(row->exp_avg, begin + i);                                                \
            const REAL denom = SQRT(load_##DTYPE(row->exp_avg_sq, begin + i)) * bias2_rsqrt + eps;                     \
            parts[0][i] = exp_avg / denom;                                                                             \
            parts[1][i] = exp_avg * denom;                                                                             \
            parts[2][i] = exp_avg;                                                                                     \
            parts[3][i] = load_##DTYPE(row->param, begin + i);                                                         \
        }                                                                                                              \
        for (int part = 0; part < N_NORMS; part++)                                                                     \
            for (int64_t i = 0; i < n; i++)                                                                            \
                lanes[part][i] += (double)parts[part][i] * parts[part][i];                                             \
    }                                                                                                                  \
                                                                                                                       \
    static CLONES void measure_##DTYPE(const Row *row, int64_t begin, int64_t end, double sums[N_NORMS])               \
    {                                                                                                                  \
        double lanes[N_NORMS][LANES] = {{0}};                                                                          \
        for (; end - begin >= LANES; begin += LANES)                                                                   \
            add_##DTYPE(row, begin, LANES, lanes);                                                                     \
        add_##DTYPE(row, begin, end - begin, lanes);                                                                   \
        for (int part = 0; part < N_NORMS; part++)                                                                     \
            for (int lane = 0; lane < LANES; lane++)                                                                   \
                sums[part] += lanes[part][lane];                                                                       \
    }

MEASURE(float32, float, sqrtf)
MEASURE(float64, double, sqrt)
MEASURE(bfloat16, float, sqrtf)

static void (*const measures[])(const Row *, int64_t, int64_t, double *) = {
    measure_float32, measure_float64, measure_bfloat16};

typedef struct {
    const Row *rows;
    const int64_t *first_tasks;  /* the first task of each row, followed by the number of tasks */
    double (*sums)[N_NORMS];     /* one per task, which is a chunk of a tensor */
    int64_t n_rows, next_task;
} Job;

static void work(void *data)
{
    Job *job = data;
    int64_t task;
    while ((task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED)) < job->first_tasks[job->n_rows]) {
        int64_t low = 0, high = job->n_rows; /* the last row with first_task <= task */
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (job->first_tasks[middle] <= task)
                low = middle;
            else
                high = middle;
        }
        const Row *row = &job->rows[low];
        const int64_t begin = (task - job->first_tasks[low]) * CHUNK;
        measures[row->dtype](row, begin, row->numel - begin < CHUNK ? row->numel : begin + CHUNK, job->sums[task]);
    }
}

/* Writes the squared norms of m/d, m*d, m and the parameter, for each row.
 *   parallel   GOMP_parallel of the OpenMP runtime in use; not called, and may be NULL, if threads is 1
 * Returns 0, or 1 if it ran out of memory. The number in the name is the version of this interface. */
int part_norms_1(const Row *rows, int64_t n_rows, double (*squares)[N_NORMS], int threads,
                 void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags))
{
    int64_t *first_tasks = calloc(n_rows + 1, sizeof *first_tasks);
    for (int64_t i = 0; first_tasks && i < n_rows; i++)
        first_tasks[i + 1] = first_tasks[i] + (rows[i].numel + CHUNK - 1) / CHUNK;
    double (*sums)[N_NORMS] = first_tasks ? calloc(first_tasks[n_rows] + 1, sizeof *sums) : NULL;
    if (!sums) {
        free(first_tasks);
        return 1;
    }
    Job job = {.rows = rows, .first_tasks = first_tasks, .sums = sums, .n_rows = n_rows};
    if (threads > 1 && first_tasks[n_rows] > n_rows)
        parallel(work, &job, threads, 0);
    else
        work(&job);
    for (int64_t i = 0; i < n_rows; i++)
        for (int part = 0; part < N_NORMS; part++) {
            squares[i][part] = 0;
            for (int64_t task = first_tasks[i]; task < first_tasks[i + 1]; task++)
                squares[i][part] += sums[task][part];
        }
    free(first_tasks);
    free(sums);
    return 0;
}
