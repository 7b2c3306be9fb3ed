/* Quantizing in one pass over memory.
 *
 * Tensors have four dimensions, the last one contiguous in both; strides count elements. Codes are
 * those of qtool.engine.ops.quantize_uniform and quantize_table, bit for bit:
 * clamp(round_half_even(x / scale) + zero, bottom, top) with an IEEE division.
 *
 * Plain C that any compiler turns into vector code; with AVX-512 VBMI, four bytes of a table lie in
 * each of 64 lanes, so that 64 lookups take a handful of instructions. Which version runs is decided
 * when the library is loaded.
 */
#include "native.h"

#define FEW 32768 /* elements below which a second thread costs more than it saves */
#define RUN 64     /* rows that a thread takes at once */
#define CHUNK 256  /* values of a row that the stack holds */

typedef void (*CodesOfRow)(const float *x, uint8_t *out, int64_t length, const Quantizer *quantizer);

CLONES
static void codes_plain(const float *restrict x, uint8_t *restrict out, int64_t length,
                        const Quantizer *quantizer)
{
    const float factor = quantizer->factor, scale = quantizer->scale;
    const float zero = quantizer->zero, bottom = quantizer->bottom, top = quantizer->top;
    for (int64_t i = 0; i < length; i++) {
        float code = rintf(x[i] * factor / scale) + zero;
        code = code > bottom ? code : bottom;
        code = code < top ? code : top;
        out[i] = (uint8_t)(int32_t)code;
    }
    if (quantizer->table)
        for (int64_t i = 0; i < length; i++)
            out[i] = quantizer->table[out[i]];
    if (quantizer->flip)
        for (int64_t i = 0; i < length; i++)
            out[i] ^= 128;
}

#if X86
VBMI static void codes_vbmi(const float *restrict x, uint8_t *restrict out, int64_t length,
                            const Quantizer *quantizer)
{
    const uint8_t *table = quantizer->table;
    const __m512 scale = _mm512_set1_ps(quantizer->scale);
    const __m512 inverse = _mm512_set1_ps(1.0f / quantizer->scale);
    const __m512 zero = _mm512_set1_ps(quantizer->zero), top = _mm512_set1_ps(quantizer->top);
    const __m512 factor = _mm512_set1_ps(quantizer->factor);
    const __m512 bottom = _mm512_set1_ps(quantizer->bottom);
    const __m512i flip = _mm512_set1_epi8((char)quantizer->flip);
    __m512i quarters[4];
    load_table(table, quarters);
    for (int64_t i = 0; i < length; i += 64) {
        const int64_t left = length - i < 64 ? length - i : 64;
        const __mmask64 inside = left == 64 ? ~0ULL : (1ULL << left) - 1;
        __m128i found[4];
        for (int part = 0; part < 4; part++) {
            __mmask16 some = (__mmask16)(inside >> 16 * part);
            __m512 values = _mm512_maskz_loadu_ps(some, x + i + 16 * part);
            values = _mm512_mul_ps(values, factor);
            found[part] = sixteen_codes(values, scale, inverse, zero, bottom, top);
        }
        const __m512i codes = joined_codes(found, table != NULL, quarters, flip);
        _mm512_mask_storeu_epi8(out + i, inside, codes);
    }
}
#endif

static CodesOfRow codes_of_row(void)
{
#if X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi"))
        return codes_vbmi;
    if (__builtin_cpu_supports("avx2"))
        return qtool_codes_avx2;
#endif
    return codes_plain;
}

CLONES
static void widen_row(const uint8_t *restrict codes, float *restrict out, int64_t length,
                      float zero)
{
    for (int64_t i = 0; i < length; i++)
        out[i] = (float)codes[i] - zero;
}

/* The power of two that a log2 code stands for: the exponent field of the quotient, with a carry
 * above sqrt(1/2); 0 from code `top` on. */
CLONES
static void powers_of_row(const float *x, float *out, int64_t length, const Quantizer *quantizer)
{
    const float last = quantizer->top - 1.0f < 126.0f ? quantizer->top - 1.0f : 126.0f;
    const int32_t least = (127 - (int32_t)last) << 23, one = 127 << 23;
    const float factor = quantizer->factor, scale = quantizer->scale;
    for (int64_t i = 0; i < length; i++) {
        union {
            float value;
            int32_t bits;
        } power = {x[i] * factor / scale};
        int32_t field = (power.bits + (0x800000 - 0x3504F4)) & ~0x7FFFFF;
        field = field < one ? field : one;
        power.bits = field < least ? 0 : field;
        out[i] = power.value;
    }
}

/* Tell a table's steps, if they are few. */
void qtool_tell_steps(Quantizer *quantizer)
{
    const uint8_t *table = quantizer->table;
    int8_t before[15];
    memset(before, 127, sizeof before); /* no code lies behind it */
    quantizer->level[0] = table[0];
    quantizer->steps = 1;
    for (int code = 1; code < 256; code++) {
        if (table[code] == table[code - 1])
            continue;
        if (quantizer->steps == 16) {
            quantizer->steps = 0;
            return;
        }
        before[quantizer->steps - 1] = (int8_t)(code - 1 - 128);
        quantizer->level[quantizer->steps++] = table[code];
    }
    for (int many = 1; many < 16; many *= 2)
        for (int i = 0; i < many; i++)
            quantizer->before[many - 1 + i] = before[(2 * i + 1) * 8 / many - 1];
}

/* Rows are handed to threads in runs, so that places are worked out once a run. */
static inline int64_t run_length(int64_t rows, int threads)
{
    const int64_t even = (rows + threads - 1) / threads;
    return even < RUN ? even : RUN;
}

/* Codes of float32 values. There are `count` quantizers, and as many parts of source and target, so
 * many elements apart. */
void qtool_codes(const float *x, uint8_t *out, const Walk *walk, const Quantizer *quantizers,
                 int64_t count, int64_t from_step, int64_t to_step, int threads)
{
    const CodesOfRow one = codes_of_row();
    const int64_t rows = rows_of(walk), length = walk->size[3];
    const int64_t run = run_length(rows, threads), runs = rows ? (rows + run - 1) / run : 0;
#pragma omp parallel for num_threads(threads) if (count * rows * length >= FEW)
    for (int64_t number = 0; number < count * runs; number++) {
        const int64_t part = number / runs, first = number % runs * run;
        Place place = place_of(walk, first);
        for (int64_t row = first; row < rows && row < first + run; row++, step(walk, &place))
            one(x + part * from_step + place.from, out + part * to_step + place.to, length,
                quantizers + part);
    }
}

/* Powers of two of float32 values, in place. */
void qtool_powers(float *x, int64_t rows, int64_t length, const Quantizer *quantizer, int threads)
{
#pragma omp parallel for num_threads(threads) if (rows * length >= FEW)
    for (int64_t row = 0; row < rows; row++)
        powers_of_row(x + row * length, x + row * length, length, quantizer);
}

CLONES
int32_t qtool_sum_of_codes(const uint8_t *codes, int64_t length)
{
    int32_t sum = 0;
    for (int64_t i = 0; i < length; i++)
        sum += codes[i];
    return sum;
}

/* Whether vectors of 256 bits are at hand. */
int qtool_has_vectors(void)
{
#if X86
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

/* How the products of attention below run here: 2 on 8-bit units, 1 on vectors, 0 not at all. */
int qtool_has_products(void)
{
#if X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return 2;
#endif
    return qtool_has_vectors();
}

#if X86
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define LANES 16 /* sums of a vector */

/* Keys of a head, blocks of sixteen side by side: four bytes of each in turn, zeros past the last
 * one. `columns` gets what every query loses to the zero point of the queries. */
VNNI static void pack_keys(const int8_t *keys, int32_t *packed, int32_t *columns, int64_t tokens,
                           int64_t width, int32_t query_zero)
{
    const int64_t blocks = (tokens + LANES - 1) / LANES, words = width / 4;
    const __m512i ones = _mm512_set1_epi8(1), minus_zero = _mm512_set1_epi32(-query_zero);
    for (int64_t block = 0; block < blocks; block++) {
        int32_t *target = packed + block * words * LANES;
        for (int64_t lane = 0; lane < LANES; lane += 4) {
            const int64_t token = block * LANES + lane;
            for (int64_t i = 0; i < words; i += 4) {
                __m128i row[4];
                for (int j = 0; j < 4; j++)
                    row[j] = token + j < tokens ? _mm_loadu_si128((const __m128i *)(
                                                      keys + (token + j) * width + 4 * i))
                                                : _mm_setzero_si128();
                const __m128i low = _mm_unpacklo_epi32(row[0], row[1]);
                const __m128i low_next = _mm_unpacklo_epi32(row[2], row[3]);
                const __m128i high = _mm_unpackhi_epi32(row[0], row[1]);
                const __m128i high_next = _mm_unpackhi_epi32(row[2], row[3]);
                const __m128i turned[4] = {_mm_unpacklo_epi64(low, low_next),
                                           _mm_unpackhi_epi64(low, low_next),
                                           _mm_unpacklo_epi64(high, high_next),
                                           _mm_unpackhi_epi64(high, high_next)};
                for (int j = 0; j < 4; j++)
                    _mm_storeu_si128((__m128i *)(target + (i + j) * LANES + lane), turned[j]);
            }
        }
        __m512i sums = _mm512_setzero_si512();
        for (int64_t i = 0; i < words; i++)
            sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(target + i * LANES));
        _mm512_storeu_si512(columns + block * LANES, _mm512_mullo_epi32(sums, minus_zero));
    }
}

/* Scores of up to ROWS queries with all keys of their head. */
VNNI static void scores_of_rows(const uint8_t *queries, int64_t rows, const int32_t *packed,
                                const int32_t *columns, int64_t tokens, int64_t width,
                                int32_t query_zero, int32_t shift, float scale, float *out)
{
    const int64_t blocks = (tokens + LANES - 1) / LANES, words = width / 4;
    const __m512 scales = _mm512_set1_ps(scale);
    const Rows some = rows_at(queries, width, rows, width, query_zero, shift);
    for (int64_t block = 0; block < blocks; block += 2) {
        const int32_t *first = packed + block * words * LANES;
        const int32_t *second = block + 1 < blocks ? first + words * LANES : first;
        __m512i sums[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            sums[r][0] = sums[r][1] = _mm512_set1_epi32(some.added[r]);
        for (int64_t i = 0; i < words; i++) {
            const __m512i left = _mm512_loadu_si512(first + i * LANES);
            const __m512i right = _mm512_loadu_si512(second + i * LANES);
            for (int r = 0; r < ROWS; r++) {
                const __m512i codes = _mm512_set1_epi32(word(some.codes[r] + 4 * i));
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], codes, left);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], codes, right);
            }
        }
        for (int half = 0; half < 2 && block + half < blocks; half++) {
            const int64_t start = (block + half) * LANES, left = tokens - start;
            const __mmask16 inside = left >= LANES ? 0xFFFF : (__mmask16)((1u << left) - 1);
            const __m512i column = _mm512_loadu_si512(columns + start);
            for (int r = 0; r < rows; r++) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[r][half], column));
                _mm512_mask_storeu_ps(out + r * tokens + start, inside,
                                      _mm512_mul_ps(sum, scales));
            }
        }
    }
}

/* Values of a head, four tokens side by side in every column, zeros past the last one. */
VNNI static void pack_values(const int8_t *values, int8_t *packed, int32_t *columns, int64_t tokens,
                             int64_t width, int32_t zero)
{
    const __m512i ones = _mm512_set1_epi8(1), minus_zero = _mm512_set1_epi32(-zero);
    for (int64_t column = 0; column < width; column += LANES) {
        __m512i sums = _mm512_setzero_si512();
        for (int64_t token = 0; token < tokens; token += 4) {
            __m128i row[4];
            for (int i = 0; i < 4; i++)
                row[i] = token + i < tokens ? _mm_loadu_si128((const __m128i *)(
                                                  values + (token + i) * width + column))
                                            : _mm_setzero_si128();
            const __m128i low = _mm_unpacklo_epi8(row[0], row[1]);
            const __m128i low_next = _mm_unpacklo_epi8(row[2], row[3]);
            const __m128i high = _mm_unpackhi_epi8(row[0], row[1]);
            const __m128i high_next = _mm_unpackhi_epi8(row[2], row[3]);
            __m512i four = _mm512_castsi128_si512(_mm_unpacklo_epi16(low, low_next));
            four = _mm512_inserti32x4(four, _mm_unpackhi_epi16(low, low_next), 1);
            four = _mm512_inserti32x4(four, _mm_unpacklo_epi16(high, high_next), 2);
            four = _mm512_inserti32x4(four, _mm_unpackhi_epi16(high, high_next), 3);
            _mm512_storeu_si512(packed + (token * width + column * 4), four);
            sums = _mm512_dpbusd_epi32(sums, ones, four);
        }
        _mm512_storeu_si512(columns + column, _mm512_mullo_epi32(sums, minus_zero));
    }
}

/* Attended values of up to ROWS tokens, LANES columns at a time. */
VNNI static void attended_of_rows(const uint8_t *probabilities, int64_t stride, int64_t rows,
                                  const int8_t *packed, const int32_t *columns, int64_t tokens,
                                  int64_t width, int32_t zero, int32_t shift, float *out)
{
    const int64_t groups = (tokens + 3) / 4;
    const Rows some = rows_at(probabilities, stride, rows, tokens, zero, shift);
    for (int64_t start = 0; start < width; start += 2 * LANES) {
        const int64_t next = start + LANES < width ? LANES : 0;
        __m512i sums[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            sums[r][0] = sums[r][1] = _mm512_set1_epi32(some.added[r]);
        for (int64_t group = 0; group < groups; group++) {
            const int8_t *place = packed + (group * width + start) * 4;
            const __m512i left = _mm512_loadu_si512(place);
            const __m512i right = _mm512_loadu_si512(place + 4 * next);
            for (int r = 0; r < ROWS; r++) {
                const __m512i codes = _mm512_set1_epi32(word(some.codes[r] + 4 * group));
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], codes, left);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], codes, right);
            }
        }
        for (int half = 0; half < (next ? 2 : 1); half++) {
            const int64_t column = start + half * LANES;
            const __m512i lost = _mm512_loadu_si512(columns + column);
            for (int r = 0; r < rows; r++)
                _mm512_storeu_ps(out + r * width + column,
                                 _mm512_cvtepi32_ps(_mm512_add_epi32(sums[r][half], lost)));
        }
    }
}

/* Scores of attention. Queries are unsigned codes, keys codes less 128; matrices of a head follow
 * one another, their width is a multiple of 16. For each head `packed` has a byte for every input of
 * every token, two without 8-bit units, and `columns` a word for each token, their number made a
 * multiple of LANES. */
void qtool_scores(const uint8_t *queries, const int8_t *keys, float *out, int64_t heads,
                  int64_t tokens, int64_t width, int32_t query_zero, int32_t key_zero, float scale,
                  void *packed, int32_t *columns, int threads)
{
    const int64_t room = (tokens + LANES - 1) / LANES * LANES, runs = (tokens + ROWS - 1) / ROWS;
    const int units = qtool_has_products() > 1;
    int32_t *words = packed;
    int16_t *pairs = packed;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t head = 0; head < heads; head++) {
            const int8_t *from = keys + head * tokens * width;
            int32_t *sums = columns + head * room;
            if (units)
                pack_keys(from, words + head * room * (width / 4), sums, tokens, width, query_zero);
            else
                qtool_pack_keys_avx2(from, pairs + head * room * width, sums, tokens, width,
                                     query_zero);
        }
#pragma omp for
        for (int64_t run = 0; run < heads * runs; run++) {
            const int64_t head = run / runs, row = run % runs * ROWS;
            const int64_t rows = tokens - row < ROWS ? tokens - row : ROWS;
            const uint8_t *from = queries + (head * tokens + row) * width;
            const int32_t *sums = columns + head * room;
            float *to = out + (head * tokens + row) * tokens;
            if (units)
                scores_of_rows(from, rows, words + head * room * (width / 4), sums, tokens, width,
                               query_zero, 128 - key_zero, scale, to);
            else
                qtool_scores_avx2(from, rows, pairs + head * room * width, sums, tokens, width,
                                  query_zero, 128 - key_zero, scale, to);
        }
    }
}

/* Codes of attended values. Probabilities are unsigned codes in rows `stride` apart, zeros behind
 * them up to a multiple of 4; values are codes less 128, their width a multiple of LANES and at most
 * CHUNK. `packed` has room for four times as many bytes as a head has columns, twice as many without
 * 8-bit units, for every four tokens; `columns` for the columns of all heads. */
void qtool_attended(const uint8_t *probabilities, int64_t stride, const int8_t *values,
                    uint8_t *out, const Walk *walk, int32_t probability_zero, int32_t value_zero,
                    const Quantizer *quantizer, void *packed, int32_t *columns, int threads)
{
    const CodesOfRow one = codes_of_row();
    const int64_t heads = walk->size[0] * walk->size[1], tokens = walk->size[2];
    const int64_t width = walk->size[3], room = (tokens + 3) / 4 * 4 * width;
    const int64_t runs = (tokens + ROWS - 1) / ROWS;
    const int units = qtool_has_products() > 1;
    int8_t *bytes = packed;
    int16_t *pairs = packed;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t head = 0; head < heads; head++) {
            const int8_t *from = values + head * tokens * width;
            int32_t *sums = columns + head * width;
            if (units)
                pack_values(from, bytes + head * room, sums, tokens, width, probability_zero);
            else
                qtool_pack_values_avx2(from, pairs + head * room, sums, tokens, width,
                                       probability_zero);
        }
#pragma omp for
        for (int64_t run = 0; run < heads * runs; run++) {
            const int64_t head = run / runs, row = run % runs * ROWS;
            const int64_t rows = tokens - row < ROWS ? tokens - row : ROWS;
            const uint8_t *from = probabilities + (head * tokens + row) * stride;
            const int32_t *sums = columns + head * width;
            float attended[ROWS * CHUNK];
            if (units)
                attended_of_rows(from, stride, rows, bytes + head * room, sums, tokens, width,
                                 probability_zero, 128 - value_zero, attended);
            else
                qtool_attended_avx2(from, stride, rows, pairs + head * room, sums, tokens, width,
                                    probability_zero, 128 - value_zero, attended);
            Place place = place_of(walk, head * tokens + row);
            for (int64_t r = 0; r < rows; r++, step(walk, &place))
                one(attended + r * width, out + place.to, width, quantizer);
        }
    }
}
#endif

/* Codes less a zero point. */
void qtool_widen(const uint8_t *codes, float *out, const Walk *walk, float zero, int threads)
{
    const int64_t rows = rows_of(walk), length = walk->size[3];
    const int64_t run = run_length(rows, threads), runs = rows ? (rows + run - 1) / run : 0;
#pragma omp parallel for num_threads(threads) if (rows * length >= FEW)
    for (int64_t number = 0; number < runs; number++) {
        const int64_t first = number * run;
        Place place = place_of(walk, first);
        for (int64_t row = first; row < rows && row < first + run; row++, step(walk, &place))
            widen_row(codes + place.from, out + place.to, length, zero);
    }
}
