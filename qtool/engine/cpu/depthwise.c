/* Depthwise convolutions on 256-bit vectors: every channel of codes with a kernel of its own.
 *
 * Channels lie side by side. Codes and levels are widened to 16 bits, two taps of the kernel side by
 * side, so that one instruction multiplies and adds both in 32 bits: sums are exact.
 */
#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if X86
#define AVX2 __attribute__((target("avx2")))
#define SIDE 16
#define MOST_TAPS 128

/* Sixteen codes, or fewer and zeros. */
AVX2 static inline __m256i widened(const uint8_t *codes, int64_t count)
{
    __m128i found;
    if (count >= SIDE) {
        found = _mm_loadu_si128((const __m128i *)codes);
    } else if (count == 8) {
        found = _mm_loadl_epi64((const __m128i *)codes);
    } else {
        uint8_t some[SIDE] = {0};
        memcpy(some, codes, (size_t)count);
        found = _mm_loadu_si128((const __m128i *)some);
    }
    return _mm256_cvtepu8_epi16(found);
}

AVX2 static inline __m256 eight_values(__m256i sums, const int32_t *offset, const float *scale,
                                       const float *bias)
{
    sums = _mm256_add_epi32(sums, _mm256_loadu_si256((const __m256i *)offset));
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(scale));
    return bias ? _mm256_add_ps(value, _mm256_loadu_ps(bias)) : value;
}

/* One place of the result. `levels` holds for every sixteen channels and two taps those of channels
 * 0-3 and 8-11, each with both taps, then those of 4-7 and 12-15. */
AVX2 static void one_place(const uint8_t *const *taps, int64_t pairs, int64_t channels,
                           const int16_t *levels, const int32_t *offset, const float *scale,
                           const float *bias, float *out)
{
    for (int64_t first = 0; first < channels; first += SIDE) {
        const int64_t count = channels - first;
        __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
        for (int64_t pair = 0; pair < pairs; pair++, levels += 2 * SIDE) {
            const __m256i one = widened(taps[2 * pair] + first, count);
            const __m256i two = widened(taps[2 * pair + 1] + first, count);
            const __m256i left = _mm256_loadu_si256((const __m256i *)levels);
            const __m256i right = _mm256_loadu_si256((const __m256i *)levels + 1);
            const __m256i lower = _mm256_unpacklo_epi16(one, two);
            const __m256i upper = _mm256_unpackhi_epi16(one, two);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(lower, left));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(upper, right));
        }
        float some[SIDE], *to = count < SIDE ? some : out + first;
        const __m256i halves[2] = {_mm256_permute2x128_si256(low, high, 0x20),
                                   _mm256_permute2x128_si256(low, high, 0x31)};
        for (int half = 0; half < 2; half++) {
            const int64_t place = first + 8 * half;
            _mm256_storeu_ps(to + 8 * half,
                             eight_values(halves[half], offset + place, scale + place,
                                          bias ? bias + place : NULL));
        }
        if (count < SIDE)
            memcpy(out + first, some, (size_t)count * sizeof(float));
    }
}

/* float32 (pictures, rows, columns, channels), or their codes if there is a quantizer; then `values`
 * holds a row of them for each thread. What is told of channels goes on to a multiple of sixteen of
 * them; `outside` are codes that stand for zero, one for each channel. */
void qtool_depthwise(const Window *window, const uint8_t *x, const uint8_t *outside,
                     const int16_t *levels, const int32_t *offset, const float *scale,
                     const float *bias, float *values, uint8_t *codes, const Quantizer *quantizer,
                     int threads)
{
    const int64_t height = window->size[0], width = window->size[1], channels = window->channels;
    const int64_t rows = window->found[0], columns = window->found[1];
    const int64_t area = window->kernel[0] * window->kernel[1], pairs = (area + 1) / 2;
    if (area > MOST_TAPS)
        return;
#pragma omp parallel for num_threads(threads)
    for (int64_t line = 0; line < window->pictures * rows; line++) {
        const uint8_t *picture = x + line / rows * height * width * channels;
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num();
#else
        const int64_t thread = 0;
        (void)threads;
#endif
        float *out = values + (quantizer ? thread : line) * columns * channels;
        const int64_t top = line % rows * window->stride[0] - window->padding[0];
        const uint8_t *taps[MOST_TAPS + 1];
        taps[area] = outside;
        for (int64_t column = 0; column < columns; column++) {
            const int64_t left = column * window->stride[1] - window->padding[1];
            const uint8_t **tap = taps;
            for (int64_t down = 0; down < window->kernel[0]; down++) {
                const int64_t y = top + down * window->dilation[0];
                const uint8_t *row = picture + y * width * channels;
                for (int64_t across = 0; across < window->kernel[1]; across++) {
                    const int64_t at = left + across * window->dilation[1];
                    const int inside = y >= 0 && y < height && at >= 0 && at < width;
                    *tap++ = inside ? row + at * channels : outside;
                }
            }
            one_place(taps, pairs, channels, levels, offset, scale, bias,
                      out + column * channels);
        }
        if (quantizer)
            qtool_codes_avx2(out, codes + line * columns * channels, columns * channels, quantizer);
    }
}
#endif
