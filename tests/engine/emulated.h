/* AVX-512, its 8-bit products and AMX by loops, for CPUs that have none of them.
 *
 * Given to the compiler before any source (`-include`), with AVX2 and FMA for all of it, so that the
 * passes for larger machines run here. Rounding is to nearest, ties to even, as they ask for.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* The CPU says that it has everything, and functions are compiled for what it has. */
#define target(features)
#define target_clones(...)
#define __builtin_cpu_supports(feature) 1
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) 0

typedef union {
    __m512 floats;
    __m512i whole;
    float f[16];
    int32_t i[16];
    uint32_t u[16];
    uint16_t h[32];
    uint8_t b[64];
    int8_t s[64];
} Lanes;

#define UNUSED static __attribute__((unused))

/* A function of up to three vectors, lane by lane; `part` is what they are a union of. */
#define LANES_OF(name, type, part, count, lane, value, ...)                                         \
    UNUSED type emulated_##name(__VA_ARGS__)                                                        \
    {                                                                                               \
        Lanes found;                                                                                \
        for (int k = 0; k < count; k++)                                                             \
            found.lane[k] = value;                                                                  \
        return found.part;                                                                          \
    }
#define FLOATS(name, value, ...) LANES_OF(name, __m512, floats, 16, f, value, __VA_ARGS__)
#define WORDS(name, value, ...) LANES_OF(name, __m512i, whole, 16, u, value, __VA_ARGS__)
#define BYTES(name, value, ...) LANES_OF(name, __m512i, whole, 64, b, value, __VA_ARGS__)
#define OF(vector, lane) (((const Lanes *)&(vector))->lane[k])
#define IN(mask) ((mask) >> k & 1)

FLOATS(set1_ps, x, float x)
FLOATS(add_ps, OF(x, f) + OF(y, f), __m512 x, __m512 y)
FLOATS(sub_ps, OF(x, f) - OF(y, f), __m512 x, __m512 y)
FLOATS(mul_ps, OF(x, f) * OF(y, f), __m512 x, __m512 y)
FLOATS(div_ps, OF(x, f) / OF(y, f), __m512 x, __m512 y)
FLOATS(max_ps, OF(x, f) > OF(y, f) ? OF(x, f) : OF(y, f), __m512 x, __m512 y)
FLOATS(min_ps, OF(x, f) < OF(y, f) ? OF(x, f) : OF(y, f), __m512 x, __m512 y)
FLOATS(abs_ps, fabsf(OF(x, f)), __m512 x)
FLOATS(round_ps, nearbyintf(OF(x, f)), __m512 x)
FLOATS(fnmadd_ps, fmaf(-OF(x, f), OF(y, f), OF(z, f)), __m512 x, __m512 y, __m512 z)
FLOATS(cvtepi32_ps, (float)OF(x, i), __m512i x)
FLOATS(maskz_loadu_ps, IN(some) ? ((const float *)from)[k] : 0, __mmask16 some, const void *from)

WORDS(set1_epi32, (uint32_t)x, int x)
WORDS(add_epi32, OF(x, u) + OF(y, u), __m512i x, __m512i y)
WORDS(mullo_epi32, OF(x, u) * OF(y, u), __m512i x, __m512i y)
WORDS(and_si512, OF(x, u) & OF(y, u), __m512i x, __m512i y)
WORDS(xor_si512, OF(x, u) ^ OF(y, u), __m512i x, __m512i y)
WORDS(cvtps_epi32, fabsf(OF(x, f)) < 0x1p31f ? (uint32_t)(int32_t)nearbyintf(OF(x, f)) : 1u << 31,
      __m512 x)
WORDS(maskz_loadu_epi32, IN(some) ? ((const uint32_t *)from)[k] : 0, __mmask16 some,
      const void *from)

BYTES(set1_epi8, (uint8_t)x, char x)
BYTES(sub_epi8, (uint8_t)(OF(x, b) - OF(y, b)), __m512i x, __m512i y)
BYTES(loadu_si512, ((const uint8_t *)from)[k], const void *from)
BYTES(mask_blend_epi8, IN(some) ? OF(y, b) : OF(x, b), __mmask64 some, __m512i x, __m512i y)
BYTES(permutex2var_epi8,
      (OF(at, b) & 64 ? (const uint8_t *)&y : (const uint8_t *)&x)[OF(at, b) & 63], __m512i x,
      __m512i at, __m512i y)
BYTES(castsi128_si512, k < 16 ? ((const uint8_t *)&x)[k] : 99, __m128i x) /* 99: undefined */
BYTES(inserti32x4, k / 16 == part ? ((const uint8_t *)&y)[k % 16] : OF(x, b), __m512i x, __m128i y,
      int part)
LANES_OF(srl_epi16, __m512i, whole, 32, h, (uint16_t)(OF(x, h) >> _mm_cvtsi128_si32(by)), __m512i x,
         __m128i by)

UNUSED __m512i emulated_dpbusd_epi32(__m512i sums, __m512i codes, __m512i levels)
{
    Lanes found = {.whole = sums};
    for (int k = 0; k < 64; k++)
        found.i[k / 4] += OF(codes, b) * OF(levels, s);
    return found.whole;
}

UNUSED __mmask16 emulated_not_less(__m512 x, __m512 y)
{
    unsigned found = 0;
    for (int k = 0; k < 16; k++)
        found |= (unsigned)!(OF(x, f) < OF(y, f)) << k;
    return (__mmask16)found;
}

UNUSED __mmask64 emulated_movepi8_mask(__m512i x)
{
    __mmask64 found = 0;
    for (int k = 0; k < 64; k++)
        found |= (__mmask64)(OF(x, b) >> 7) << k;
    return found;
}

UNUSED __m512i emulated_load_si512(const void *from)
{
    if ((uintptr_t)from % 64)
        __builtin_trap();
    return emulated_loadu_si512(from);
}

UNUSED __m128i emulated_extracti32x4_epi32(__m512i x, int part)
{
    return _mm_loadu_si128((const __m128i *)&x + part);
}

UNUSED __m128i emulated_cvtepi32_epi8(__m512i x)
{
    uint8_t found[16];
    for (int k = 0; k < 16; k++)
        found[k] = (uint8_t)OF(x, u);
    return _mm_loadu_si128((const __m128i *)found);
}

UNUSED void emulated_mask_storeu_epi8(void *to, __mmask64 some, __m512i x)
{
    for (int k = 0; k < 64; k++)
        if (IN(some))
            ((uint8_t *)to)[k] = OF(x, b);
}

UNUSED void emulated_mask_storeu_ps(void *to, __mmask16 some, __m512 x)
{
    for (int k = 0; k < 16; k++)
        if (IN(some))
            ((float *)to)[k] = OF(x, f);
}

#define _mm512_abs_ps emulated_abs_ps
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_and_si512 emulated_and_si512
#define _mm512_castsi128_si512 emulated_castsi128_si512
#define _mm512_castsi512_si128(x) emulated_extracti32x4_epi32(x, 0)
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_div_ps emulated_div_ps
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_fnmadd_ps emulated_fnmadd_ps
#define _mm512_load_si512 emulated_load_si512
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_mask_blend_epi8 emulated_mask_blend_epi8
#define _mm512_mask_storeu_epi8 emulated_mask_storeu_epi8
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_maskz_loadu_epi32 emulated_maskz_loadu_epi32
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_movepi8_mask emulated_movepi8_mask
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_mullo_epi32 emulated_mullo_epi32
#define _mm512_permutex2var_epi8 emulated_permutex2var_epi8
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_setzero_ps() emulated_set1_ps(0)
#define _mm512_setzero_si512() emulated_set1_epi32(0)
#define _mm512_srl_epi16 emulated_srl_epi16
#define _mm512_storeu_ps(to, x) emulated_mask_storeu_ps(to, 0xFFFF, x)
#define _mm512_storeu_si512(to, x) emulated_mask_storeu_epi8(to, ~0ULL, x)
#define _mm512_sub_epi8 emulated_sub_epi8
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_xor_si512 emulated_xor_si512
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(x, y, how) emulated_not_less(x, y)
#undef _mm512_extracti32x4_epi32
#define _mm512_extracti32x4_epi32 emulated_extracti32x4_epi32
#undef _mm512_inserti32x4
#define _mm512_inserti32x4 emulated_inserti32x4
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(x, how) emulated_round_ps(x)

/* Eight tiles of sixteen rows of 64 bytes, one set for each thread. */
static __thread struct {
    uint8_t rows[16][64];
} emulated_tiles[8];

UNUSED void emulated_tile_loadd(int tile, const void *from, int64_t stride)
{
    for (int row = 0; row < 16; row++)
        memcpy(emulated_tiles[tile].rows[row], (const char *)from + row * stride, 64);
}

UNUSED void emulated_tile_stored(int tile, void *to, int64_t stride)
{
    for (int row = 0; row < 16; row++)
        memcpy((char *)to + row * stride, emulated_tiles[tile].rows[row], 64);
}

UNUSED void emulated_tile_dpbusd(int sums, int codes, int levels)
{
    for (int row = 0; row < 16; row++) {
        int32_t *found = (int32_t *)emulated_tiles[sums].rows[row];
        for (int step = 0; step < 16; step++) {
            const uint8_t *four = emulated_tiles[codes].rows[row] + 4 * step;
            const int8_t *columns = (const int8_t *)emulated_tiles[levels].rows[step];
            for (int column = 0; column < 64; column++)
                found[column / 4] += four[column % 4] * columns[column];
        }
    }
}

#undef _tile_dpbusd
#define _tile_dpbusd emulated_tile_dpbusd
#undef _tile_loadconfig
#define _tile_loadconfig(tiles) ((void)(tiles))
#undef _tile_loadd
#define _tile_loadd emulated_tile_loadd
#undef _tile_release
#define _tile_release() memset(emulated_tiles, 99, sizeof emulated_tiles)
#undef _tile_stored
#define _tile_stored emulated_tile_stored
#undef _tile_zero
#define _tile_zero(tile) memset(emulated_tiles + (tile), 0, sizeof *emulated_tiles)
