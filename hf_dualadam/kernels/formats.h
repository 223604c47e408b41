/* The storage formats, read and written a block at a time: 16-bit floats, 16-bit weights with a correction, and 8-bit
 * moments, bit for bit as hf_dualadam/states.py defines them. The loops have no branches, so that they are vectorized;
 * n is the number of elements; of coded moments, those of one block.
 */

#define INFINITE 0x7f800000 /* bit pattern of infinity; those of NaN are larger */

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

/* ---- 16-bit floats: rounded to nearest, ties to even ---- */

static INLINE float from_bfloat16(uint16_t x)
{
    return as_float((uint32_t)x << 16);
}

static INLINE uint16_t to_bfloat16(float x)
{
    const uint32_t bits = as_bits(x); /* NaN stays NaN, since arithmetic on bfloat16 gives NaN with low bits of 0 */
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
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000; /* + 0.5 aligns the mantissa */
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (magnitude >= 0x477ff000 ? infinite : finite)); /* 65520 and above become infinite */
}

static INLINE void read_bfloat16(float *restrict to, const uint16_t *restrict from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = from_bfloat16(from[i]);
}

static INLINE void write_bfloat16(uint16_t *restrict to, const float *restrict from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = to_bfloat16(from[i]);
}

/* The processor's conversion instructions, where available, round the same way. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_F16C __builtin_cpu_supports("avx2") /* every processor with AVX2 also has F16C */
#define F16C __attribute__((target("avx,f16c")))
#define VECTOR 8

static F16C void read_float16_f16c(float *to, const uint16_t *from, int64_t n)
{
    for (int64_t i = 0; i < n / VECTOR * VECTOR; i += VECTOR)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (int64_t i = n / VECTOR * VECTOR; i < n; i++)
        to[i] = _cvtsh_ss(from[i]);
}

static F16C void write_float16_f16c(uint16_t *to, const float *from, int64_t n)
{
    for (int64_t i = 0; i < n / VECTOR * VECTOR; i += VECTOR)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (int64_t i = n / VECTOR * VECTOR; i < n; i++)
        to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
#define HAS_F16C 0
#define read_float16_f16c(to, from, n)
#define write_float16_f16c(to, from, n)
#endif

static INLINE void read_float16(float *restrict to, const uint16_t *restrict from, int64_t n)
{
    if (HAS_F16C) {
        read_float16_f16c(to, from, n);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        to[i] = from_float16(from[i]);
}

static INLINE void write_float16(uint16_t *restrict to, const float *restrict from, int64_t n)
{
    if (HAS_F16C) {
        write_float16_f16c(to, from, n);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        to[i] = to_float16(from[i]);
}

/* ---- the dither of a step, as in states.dither ---- */

static INLINE uint32_t dither_bits(float step)
{
    return (uint32_t)step * 0x9e3779b1u;
}

/* In [0, 1). */
static INLINE float dither(float step)
{
    return (float)(dither_bits(step) >> 8) * 0x1p-24f;
}

/* ---- 8-bit moments ---- */

/* Bit patterns per code of exp_avg_sq. */
static INLINE int32_t code_width(int32_t low, int32_t high)
{
    return (high - low) / 254 + 1;
}

static INLINE void read_codes(float *restrict exp_avg, float *restrict exp_avg_sq, const int8_t *restrict avg_codes,
                              const uint8_t *restrict sq_codes, float scale, float min, float max, int64_t n)
{
    const float unit = scale * (float)(1.0 / (127 * 127));
    const uint32_t low = as_bits(min), width = code_width(low, as_bits(max)), below = low - width; /* at code 0 */
    for (int64_t i = 0; i < n; i++) {
        const float q = avg_codes[i];
        exp_avg[i] = q * fabsf(q) * unit;
    }
    for (int64_t i = 0; i < n; i++)
        exp_avg_sq[i] = as_float(sq_codes[i] ? below + sq_codes[i] * width : 0);
}

/* The parameters for encoding the moments of a block. */
typedef struct {
    float scale, min, max; /* as stored */
    int32_t low;           /* bit pattern of min */
    float codes_per_root, codes_per_bit;
    uint32_t magnitude;    /* mask that clears the sign, or everything if the block is not finite: its codes are 0 */
} Coding;

static INLINE Coding coding_of(const float *restrict exp_avg, const float *restrict exp_avg_sq, int64_t n)
{
    /* Bit patterns of positive floats sort like the floats, with NaN above them all. */
    int32_t largest = 0, high = 0;
    uint32_t below = UINT32_MAX; /* one less than the smallest positive pattern; for 0 it wraps to the largest */
    for (int64_t i = 0; i < n; i++) {
        const int32_t avg_bits = as_bits(exp_avg[i]) & 0x7fffffff, sq_bits = as_bits(exp_avg_sq[i]) & 0x7fffffff;
        largest = avg_bits > largest ? avg_bits : largest;
        high = sq_bits > high ? sq_bits : high;
        below = (uint32_t)sq_bits - 1 < below ? (uint32_t)sq_bits - 1 : below;
    }
    const int finite = largest < INFINITE;
    const int32_t smallest = below + 1, lowest = high < INFINITE ? high - (OCTAVES << 23) : high;
    const int32_t low = smallest < lowest ? lowest : smallest;
    return (Coding){
        .scale = as_float(largest),
        .min = as_float(low),
        .max = as_float(high),
        .low = low,
        .codes_per_root = finite && largest ? 127 / sqrtf(as_float(largest)) : 0,
        .codes_per_bit = 1 / (float)code_width(low, high),
        .magnitude = finite ? 0x7fffffff : 0,
    };
}

static INLINE void write_codes(int8_t *restrict avg_codes, uint8_t *restrict sq_codes, const float *restrict exp_avg,
                               const float *restrict exp_avg_sq, const Coding *coding, float step, int64_t n)
{
    const Coding c = *coding;
    const float offset = dither(step), offset_from_1 = 1 + offset;
    int32_t wide_avg_codes[BLOCK] ALIGNED, wide_sq_codes[BLOCK] ALIGNED; /* narrowing afterwards vectorizes better */
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = as_bits(exp_avg[i]), sign = bits & 0x80000000;
        const float root = sqrtf(as_float(bits & c.magnitude)) * c.codes_per_root;
        const float nearest = root + 0.5f, dithered = root < 1 ? 0 : root + offset;
        const float magnitude = root < DITHERED_CODES ? dithered : nearest;
        wide_avg_codes[i] = (int32_t)as_float(as_bits(magnitude) | sign); /* rounds towards 0 */

        const int32_t sq_bits = as_bits(exp_avg_sq[i]), clamped = sq_bits > c.low ? sq_bits : c.low;
        const float position = (float)(clamped - c.low) * c.codes_per_bit + offset_from_1;
        const int32_t code = (int32_t)(sq_bits ? position : 0);
        wide_sq_codes[i] = code < 255 ? code : 255;
    }
    for (int64_t i = 0; i < n; i++)
        avg_codes[i] = (int8_t)wide_avg_codes[i];
    for (int64_t i = 0; i < n; i++)
        sq_codes[i] = (uint8_t)wide_sq_codes[i];
}

/* ---- conversion between float and 16-bit weights with a correction of 8 or 16 bits ---- */

static INLINE void add_bfloat16_corrections(float *restrict weights, const void *restrict corrections, int bits,
                                            int64_t n)
{
    const int8_t *restrict of_8_bits = corrections;
    const int16_t *restrict of_16_bits = corrections;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t correction = bits == 8 ? (uint32_t)of_8_bits[i] << 8 : (uint32_t)of_16_bits[i];
        weights[i] = as_float(as_bits(weights[i]) + correction);
    }
}

static INLINE void write_corrected_bfloat16(uint16_t *restrict params, void *restrict corrections, int bits,
                                            const float *restrict weights, float step, int64_t n)
{
    int8_t *restrict of_8_bits = corrections;
    int16_t *restrict of_16_bits = corrections;
    const uint32_t offset = dither_bits(step) >> 24;
    for (int64_t i = 0; i < n; i++) {
        uint32_t weight = as_bits(weights[i]);
        const uint32_t magnitude = weight & 0x7fffffff;
        if (bits == 8)
            weight = (magnitude < 0x7f800000 ? weight + offset : weight) & ~0xffu;
        const uint32_t upper = (magnitude > 0x7f800000 ? weight : weight + 0x8000) >> 16;
        const uint32_t correction = weight - (upper << 16);
        params[i] = (uint16_t)upper;
        if (bits == 8)
            of_8_bits[i] = (int8_t)(correction >> 8);
        else
            of_16_bits[i] = (int16_t)correction;
    }
}

/* The unit in the last place of a float16 number. */
static INLINE float float16_unit(float param)
{
    const uint32_t exponent = as_bits(param) & 0x7f800000, least = 113u << 23; /* subnormals share 2^-14's */
    return as_float(exponent > least ? exponent : least) * 0x1p-10f;
}

static INLINE void add_float16_corrections(float *restrict weights, const void *restrict corrections, int bits,
                                           int64_t n)
{
    const int8_t *restrict of_8_bits = corrections;
    const int16_t *restrict of_16_bits = corrections;
    const float share = bits == 8 ? (float)(1.0 / 254) : (float)(1.0 / 65534);
    for (int64_t i = 0; i < n; i++) {
        const float correction = bits == 8 ? of_8_bits[i] : of_16_bits[i];
        weights[i] += correction * float16_unit(weights[i]) * share;
    }
}

/* `params` are the weights rounded to float16, as floats. */
static INLINE void write_float16_corrections(void *restrict corrections, int bits, const float *restrict params,
                                             const float *restrict weights, float step, int64_t n)
{
    int8_t *restrict of_8_bits = corrections;
    int16_t *restrict of_16_bits = corrections;
    const float shares = bits == 8 ? 254 : 65534, offset = bits == 8 ? dither(step) : 0.5f;
    for (int64_t i = 0; i < n; i++) {
        const float position = (weights[i] - params[i]) / float16_unit(params[i]) * shares;
        const float rounded = floorf(position + offset);
        const float correction = rounded == rounded ? rounded : 0; /* NaN if not finite in float16 */
        if (bits == 8)
            of_8_bits[i] = (int8_t)correction;
        else
            of_16_bits[i] = (int16_t)correction;
    }
}
