/* What the compiled passes share: places in tensors, quantizers. */
#ifndef QTOOL_NATIVE_H
#define QTOOL_NATIVE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(QTOOL_PLAIN)
#include <immintrin.h>
#define X86 1
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define X86 0
#define CLONES
#endif

/* Four dimensions: their sizes, and the strides of the first three in source and target. */
typedef struct {
    int64_t size[4];
    int64_t from[3];
    int64_t to[3];
} Walk;

/* Values are multiplied by `factor` first; codes lie between `bottom` and `top`. Powers of two have
 * neither zero point nor table. With `flip` 128 instead of 0 codes are signed, less 128. A table of
 * at most sixteen steps is told by them too: `steps` is their number or 0, the first begins at code 0
 * and each other one behind a code of `before`, less 128. Those lie as a search goes through them:
 * the middle one of fifteen, the two in the middle of what is left on either side, four, eight. */
typedef struct {
    float factor, scale, zero, bottom, top;
    const uint8_t *table;
    int32_t powers, flip, steps;
    int8_t before[16];
    uint8_t level[16];
} Quantizer;

/* What a convolution reads: pictures of codes (size[0], size[1], channels), at places (found[0],
 * found[1]) of each, down and across; outside of a picture lie codes `zero`. */
typedef struct {
    int64_t pictures, channels, size[2], found[2], kernel[2], stride[2], padding[2], dilation[2];
    int64_t zero;
} Window;

static inline int64_t rows_of(const Walk *walk)
{
    return walk->size[0] * walk->size[1] * walk->size[2];
}

/* Goes over the rows of a walk: where one begins in source and target. */
typedef struct {
    int64_t index[3];
    int64_t from, to;
} Place;

static inline Place place_of(const Walk *walk, int64_t row)
{
    const int64_t third = row % walk->size[2], others = row / walk->size[2];
    const int64_t second = others % walk->size[1], first = others / walk->size[1];
    return (Place){{first, second, third},
                   first * walk->from[0] + second * walk->from[1] + third * walk->from[2],
                   first * walk->to[0] + second * walk->to[1] + third * walk->to[2]};
}

static inline void step(const Walk *walk, Place *place)
{
    for (int axis = 2; axis >= 0; axis--) {
        place->from += walk->from[axis];
        place->to += walk->to[axis];
        if (++place->index[axis] < walk->size[axis] || axis == 0)
            return;
        place->from -= walk->size[axis] * walk->from[axis];
        place->to -= walk->size[axis] * walk->to[axis];
        place->index[axis] = 0;
    }
}

/* The sum of some codes. */
int32_t qtool_sum_of_codes(const uint8_t *codes, int64_t length);

#define ROWS 4 /* rows of the left factor that one pass over the right one serves */

/* The rows of an attention product that are multiplied at once: where each begins, the last one
 * again behind the end, and what the zero points of both factors add to its sums. */
typedef struct {
    const uint8_t *codes[ROWS];
    int32_t added[ROWS];
} Rows;

static inline Rows rows_at(const uint8_t *codes, int64_t stride, int64_t rows, int64_t length,
                           int32_t zero, int32_t shift)
{
    Rows found;
    for (int r = 0; r < ROWS; r++) {
        found.codes[r] = codes + (r < rows ? r : rows - 1) * stride;
        const int32_t sum = qtool_sum_of_codes(found.codes[r], length);
        found.added[r] = shift * (sum - (int32_t)length * zero);
    }
    return found;
}

/* Four bytes as they lie. */
static inline int32_t word(const void *bytes)
{
    int32_t found;
    memcpy(&found, bytes, sizeof found);
    return found;
}

#if X86
/* What `avx2.c` has for CPUs without AVX-512 VNNI, or without VBMI. */
void qtool_codes_avx2(const float *x, uint8_t *out, int64_t length, const Quantizer *quantizer);
void qtool_pack_keys_avx2(const int8_t *keys, int16_t *packed, int32_t *columns, int64_t tokens,
                          int64_t width, int32_t query_zero);
void qtool_scores_avx2(const uint8_t *queries, int64_t rows, const int16_t *packed,
                       const int32_t *columns, int64_t tokens, int64_t width, int32_t query_zero,
                       int32_t shift, float scale, float *out);
void qtool_pack_values_avx2(const int8_t *values, int16_t *packed, int32_t *columns, int64_t tokens,
                            int64_t width, int32_t zero);
void qtool_attended_avx2(const uint8_t *probabilities, int64_t stride, int64_t rows,
                         const int16_t *packed, const int32_t *columns, int64_t tokens,
                         int64_t width, int32_t zero, int32_t shift, float *out);

#define VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))

/* Sixteen codes. The product with 1 / scale rounds to the same integer as the quotient unless it
 * lies within their common error of a half; only then is the division made. */
VBMI static inline __m128i sixteen_codes(__m512 x, __m512 scale, __m512 inverse, __m512 zero,
                                         __m512 bottom, __m512 top)
{
    const __m512 half = _mm512_set1_ps(0.5f), slack = _mm512_set1_ps(5e-7f);
    __m512 ratio = _mm512_mul_ps(x, inverse);
    __m512 level = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 distance = _mm512_abs_ps(_mm512_sub_ps(ratio, level));
    __m512 bound = _mm512_fnmadd_ps(_mm512_abs_ps(ratio), slack, half);
    if (_mm512_cmp_ps_mask(distance, bound, _CMP_NLT_UQ)) {
        ratio = _mm512_div_ps(x, scale);
        level = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    level = _mm512_max_ps(_mm512_add_ps(level, zero), bottom);
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_min_ps(level, top)));
}

/* The four quarters of a table of 256 bytes. */
VBMI static inline void load_table(const uint8_t *table, __m512i quarters[4])
{
    for (int part = 0; part < 4; part++)
        quarters[part] = table ? _mm512_loadu_si512(table + 64 * part) : _mm512_setzero_si512();
}

/* Four times sixteen codes side by side, looked up in a table if there is one, and flipped. */
VBMI static inline __m512i joined_codes(const __m128i found[4], int has_table,
                                        const __m512i quarters[4], __m512i flip)
{
    __m512i codes = _mm512_castsi128_si512(found[0]);
    codes = _mm512_inserti32x4(codes, found[1], 1);
    codes = _mm512_inserti32x4(codes, found[2], 2);
    codes = _mm512_inserti32x4(codes, found[3], 3);
    if (has_table) {
        const __m512i low = _mm512_permutex2var_epi8(quarters[0], codes, quarters[1]);
        const __m512i high = _mm512_permutex2var_epi8(quarters[2], codes, quarters[3]);
        codes = _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
    }
    return _mm512_xor_si512(codes, flip);
}
#endif

#endif
