/* Layers in panels and the products of attention on 256-bit vectors, without 8-bit units (AVX2).
 *
 * A panel has 16 columns; for every four inputs it holds those of each column side by side, 64
 * bytes. The instruction that multiplies uint8 by int8 adds pairs of products in 16 bits and
 * saturates. Where levels are so small that the sums of `run` groups of four inputs fit, they are
 * taken that way and widened once a run; else levels and codes are widened before they are
 * multiplied, at half the speed. Either way sums are exact.
 */
#include "panels.h"

#if X86
#define AVX2 __attribute__((target("avx2")))
#define SIDE 16
#define GROUP 64 /* bytes of sixteen columns and four inputs */
#define WIDENED (96 * 1024) /* codes */
/* Tells the compiler that a value stands in a register from here on. Left alone it adds the products
 * of several groups before their sums, runs out of registers and goes through memory. */
#define IN_REGISTER(x) __asm__("" : "+x"(x))

/* A quantizer made ready for eight values at once. */
typedef struct {
    __m256 factor, scale, inverse, zero, bottom, top;
    __m256i flip;
    const Quantizer *told;
} Ready;

AVX2 static Ready ready_of(const Quantizer *quantizer)
{
    return (Ready){_mm256_set1_ps(quantizer->factor), _mm256_set1_ps(quantizer->scale),
                   _mm256_set1_ps(1.0f / quantizer->scale), _mm256_set1_ps(quantizer->zero),
                   _mm256_set1_ps(quantizer->bottom), _mm256_set1_ps(quantizer->top),
                   _mm256_set1_epi8((char)quantizer->flip), quantizer};
}

/* Thirty-two codes of four times eight values. As in `sixteen_codes`, the division is made only where
 * it could matter. */
AVX2 static inline __m256i codes_of(const __m256 x[4], const Ready *how)
{
    const __m256 sign = _mm256_set1_ps(-0.0f), half = _mm256_set1_ps(0.5f);
    __m256 values[4], levels[4], unsure = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        values[i] = _mm256_mul_ps(x[i], how->factor);
        const __m256 ratio = _mm256_mul_ps(values[i], how->inverse);
        levels[i] = _mm256_round_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 distance = _mm256_andnot_ps(sign, _mm256_sub_ps(ratio, levels[i]));
        const __m256 slack = _mm256_mul_ps(_mm256_andnot_ps(sign, ratio), _mm256_set1_ps(5e-7f));
        const __m256 bound = _mm256_sub_ps(half, slack);
        unsure = _mm256_or_ps(unsure, _mm256_cmp_ps(distance, bound, _CMP_NLT_UQ));
    }
    if (_mm256_movemask_ps(unsure))
        for (int i = 0; i < 4; i++)
            levels[i] = _mm256_round_ps(_mm256_div_ps(values[i], how->scale),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i found[4];
    for (int i = 0; i < 4; i++) {
        const __m256 level = _mm256_max_ps(_mm256_add_ps(levels[i], how->zero), how->bottom);
        found[i] = _mm256_cvtps_epi32(_mm256_min_ps(level, how->top));
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i codes = _mm256_packus_epi16(_mm256_packs_epi32(found[0], found[1]),
                                        _mm256_packs_epi32(found[2], found[3]));
    codes = _mm256_permutevar8x32_epi32(codes, order);
    const Quantizer *told = how->told;
    if (told->steps) {
        const __m256i shifted = _mm256_xor_si256(codes, _mm256_set1_epi8((char)128));
        const __m256i middle = _mm256_set1_epi8(told->before[0]);
        __m256i step = _mm256_abs_epi8(_mm256_cmpgt_epi8(shifted, middle));
        for (int many = 2; many < 16; many *= 2) { /* a digit more */
            const __m128i rest = _mm_loadu_si128((const __m128i *)(told->before + many - 1));
            const __m256i next = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(rest), step);
            step = _mm256_sub_epi8(_mm256_add_epi8(step, step), _mm256_cmpgt_epi8(shifted, next));
        }
        const __m128i level = _mm_loadu_si128((const __m128i *)told->level);
        codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(level), step);
    } else if (told->table) {
        uint8_t bytes[32];
        _mm256_storeu_si256((__m256i *)bytes, codes);
        for (int i = 0; i < 32; i++)
            bytes[i] = told->table[bytes[i]];
        codes = _mm256_loadu_si256((const __m256i *)bytes);
    }
    return _mm256_xor_si256(codes, how->flip);
}

/* The codes of a row; see `codes_plain`. */
AVX2 void qtool_codes_avx2(const float *restrict x, uint8_t *restrict out, int64_t length,
                           const Quantizer *quantizer)
{
    const Ready how = ready_of(quantizer);
    float few[32];
    uint8_t found[32];
    for (int64_t next = 0; next < length; next += 32) {
        /* The last ones overlap others; where there are fewer they are copied. */
        const int64_t start = length - next < 32 && length >= 32 ? length - 32 : next;
        const float *source = x + start;
        uint8_t *target = out + start;
        if (length < 32) {
            memset(few, 0, sizeof few);
            memcpy(few, x, (size_t)length * sizeof(float));
            source = few;
            target = found;
        }
        __m256 some[4];
        for (int part = 0; part < 4; part++)
            some[part] = _mm256_loadu_ps(source + 8 * part);
        _mm256_storeu_si256((__m256i *)target, codes_of(some, &how));
    }
    if (length < 32)
        memcpy(out, found, (size_t)length);
}

/* One group of four inputs more, in 16 bits. */
AVX2 static inline __attribute__((always_inline)) void
add_group(__m256i few[ROWS][2], const uint8_t *const row[ROWS], const int8_t *panel, int64_t group)
{
    const __m256i *place = (const __m256i *)(panel + group * GROUP);
    __m256i left = _mm256_loadu_si256(place), right = _mm256_loadu_si256(place + 1);
    IN_REGISTER(left);
    IN_REGISTER(right);
    for (int r = 0; r < ROWS; r++) {
        const __m256i codes = _mm256_set1_epi32(word(row[r] + 4 * group));
        few[r][0] = _mm256_add_epi16(few[r][0], _mm256_maddubs_epi16(codes, left));
        few[r][1] = _mm256_add_epi16(few[r][1], _mm256_maddubs_epi16(codes, right));
        IN_REGISTER(few[r][0]);
        IN_REGISTER(few[r][1]);
    }
}

/* Sums of four rows with sixteen columns, runs of groups in 16 bits. */
AVX2 static void narrow_sums(const uint8_t *const row[ROWS], const int8_t *panel, int64_t groups,
                             int64_t run, int32_t *out)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i *sums = (__m256i *)out;
    for (int i = 0; i < 2 * ROWS; i++)
        sums[i] = _mm256_setzero_si256();
    for (int64_t group = 0; group < groups;) {
        const int64_t end = group + run < groups ? group + run : groups;
        __m256i few[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            few[r][0] = few[r][1] = _mm256_setzero_si256();
        for (; group + 4 <= end; group += 4)
            for (int i = 0; i < 4; i++)
                add_group(few, row, panel, group + i);
        for (; group < end; group++)
            add_group(few, row, panel, group);
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++)
                sums[2 * r + half] = _mm256_add_epi32(sums[2 * r + half],
                                                      _mm256_madd_epi16(few[r][half], ones));
    }
}

/* The same for any levels: codes and levels have 16 bits, codes of rows lie `length` apart. */
AVX2 static void wide_sums(const int16_t *codes, int64_t length, const int16_t *panel,
                           int64_t groups, int32_t *out)
{
    for (int half = 0; half < 2; half++) {
        __m256i sums[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            sums[r][0] = sums[r][1] = _mm256_setzero_si256();
        for (int64_t group = 0; group < groups; group++) {
            const __m256i *place = (const __m256i *)(panel + group * GROUP) + 2 * half;
            __m256i left = _mm256_loadu_si256(place), right = _mm256_loadu_si256(place + 1);
            IN_REGISTER(left);
            IN_REGISTER(right);
            for (int r = 0; r < ROWS; r++) {
                int64_t four;
                memcpy(&four, codes + r * length + 4 * group, sizeof four);
                const __m256i some = _mm256_set1_epi64x(four);
                sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(some, left));
                sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(some, right));
                IN_REGISTER(sums[r][0]);
                IN_REGISTER(sums[r][1]);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            const __m256i added = _mm256_hadd_epi32(sums[r][0], sums[r][1]);
            _mm256_storeu_si256((__m256i *)(out + r * SIDE + 8 * half),
                                _mm256_permute4x64_epi64(added, 0xD8));
        }
    }
}

/* Codes in 16 bits. */
AVX2 static void widen_codes(const uint8_t *codes, int16_t *out, int64_t length)
{
    for (int64_t i = 0; i < length; i++)
        out[i] = codes[i];
}

/* What turns sums of sixteen columns into values; zeros behind the last column. */
typedef struct {
    int32_t offset[SIDE];
    float scale[SIDE], bias[SIDE];
    int64_t count;
} Columns;

static void columns_of(const PanelLayer *layer, int64_t first, Columns *found)
{
    const int64_t left = layer->width - first;
    memset(found, 0, sizeof *found);
    found->count = left < SIDE ? left : SIDE;
    for (int64_t i = 0; i < found->count; i++) {
        found->offset[i] = -layer->zero * layer->sums[first + i];
        found->scale[i] = layer->scale[first + i];
        found->bias[i] = layer->bias ? layer->bias[first + i] : 0.0f;
    }
}

AVX2 static inline __m256 value_of(const int32_t *sums, const Columns *columns, int half, int biased,
                                   const int32_t *row_sum)
{
    const __m256i found = _mm256_loadu_si256((const __m256i *)(sums + 8 * half));
    const __m256i *offset = (const __m256i *)(columns->offset + 8 * half);
    __m256i sum = _mm256_add_epi32(found, _mm256_loadu_si256(offset));
    if (row_sum) /* 2 h + 1: the product with h once more, and the codes themselves */
        sum = _mm256_add_epi32(_mm256_add_epi32(sum, found), _mm256_set1_epi32(*row_sum));
    const __m256 scale = _mm256_loadu_ps(columns->scale + 8 * half);
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
    return biased ? _mm256_add_ps(value, _mm256_loadu_ps(columns->bias + 8 * half)) : value;
}

/* Four rows of sixteen columns as float32. */
AVX2 static inline void store_values(const int32_t *sums, int64_t row, int64_t rows,
                                     const Columns *columns, const PanelLayer *layer,
                                     const Target *target, int64_t column)
{
    for (int64_t i = 0; i < rows; i++) {
        const int64_t place = (row + i) * layer->width + column;
        const int32_t *row_sum = target->row_sums ? target->row_sums + row + i : NULL;
        float rest[SIDE];
        const int whole = columns->count == SIDE;
        float *out = whole ? target->values + place : rest;
        const float *added = target->added ? target->added + place : NULL;
        for (int half = 0; half < 2; half++) {
            __m256 value = value_of(sums + i * SIDE, columns, half, layer->bias != NULL, row_sum);
            if (added && whole)
                value = _mm256_add_ps(value, _mm256_loadu_ps(added + 8 * half));
            _mm256_storeu_ps(out + 8 * half, value);
        }
        for (int64_t k = 0; !whole && k < columns->count; k++)
            target->values[place + k] = added ? rest[k] + added[k] : rest[k];
    }
}

/* The same as codes; rows behind the last one are sums of something, and not stored. */
AVX2 static inline void store_codes(const int32_t *sums, int64_t row, int64_t rows,
                                    const Columns *columns, const PanelLayer *layer,
                                    const Target *target, uint8_t *out, const Ready *how)
{
    const Walk *walk = target->walk;
    __m128i codes[ROWS];
    for (int pair = 0; pair < ROWS; pair += 2) {
        __m256 values[4];
        for (int i = 0; i < 4; i++) {
            const int64_t r = pair + i / 2;
            const int32_t *row_sum = target->row_sums ? target->row_sums + row + r % rows : NULL;
            values[i] = value_of(sums + r * SIDE, columns, i % 2, layer->bias != NULL, row_sum);
        }
        const __m256i both = codes_of(values, how);
        codes[pair] = _mm256_castsi256_si128(both);
        codes[pair + 1] = _mm256_extracti128_si256(both, 1);
    }
    int64_t picture = row / walk->size[2], token = row % walk->size[2];
    for (int64_t i = 0; i < rows; i++) {
        uint8_t *place = out + picture * walk->to[0] + token * walk->to[2];
        if (columns->count == SIDE)
            _mm_storeu_si128((__m128i *)place, codes[i]);
        else
            memcpy(place, codes + i, (size_t)columns->count);
        if (++token == walk->size[2]) {
            token = 0;
            picture++;
        }
    }
}

/* The leading bits of a panel's codes: an arithmetic shift of bytes. */
AVX2 static void shift_panel(const int8_t *panel, int8_t *out, int64_t bytes, int32_t shift)
{
    const __m256i flip = _mm256_set1_epi8((char)128);
    const __m256i middle = _mm256_set1_epi8((char)(128 >> shift));
    const __m256i kept = _mm256_set1_epi8((char)(255 >> shift));
    const __m128i by = _mm_cvtsi32_si128(shift);
    for (int64_t i = 0; i < bytes; i += 32) {
        const __m256i codes = _mm256_loadu_si256((const __m256i *)(panel + i));
        const __m256i whole = _mm256_xor_si256(codes, flip);
        const __m256i leading = _mm256_and_si256(_mm256_srl_epi16(whole, by), kept);
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_sub_epi8(leading, middle));
    }
}

/* How many rows of codes are widened at once, a multiple of ROWS; room for them is on the stack. */
static inline int64_t wide_rows(int64_t depth)
{
    return WIDENED / depth / ROWS * ROWS + ROWS;
}

AVX2 void qtool_multiply_vectors(const PanelLayer *layer, const uint8_t *codes, int64_t first_row,
                                 int64_t last_row, int64_t first_panel, int64_t last_panel,
                                 const Target *target, uint8_t *room)
{
    const int64_t depth = layer->depth, groups = depth / 4, bytes = groups * GROUP;
    const int64_t most = layer->run ? rows_at_once(depth) : wide_rows(depth);
    int8_t shifted[layer->shift ? bytes : 1];
    int16_t wide[layer->run ? 1 : bytes], wide_codes[layer->run ? 1 : most * depth];
    const Quantizer *quantizer = NULL, *known = NULL;
    Ready how;
    for (int64_t start = first_row; start < last_row; start += most) {
        const int64_t end = start + most < last_row ? start + most : last_row;
        const uint8_t *block = target->window ? room : codes + start * depth;
        for (int64_t row = start; target->window && row < end; row++)
            qtool_gather(target->window, codes, row, room + (row - start) * depth, depth);
        if (!layer->run)
            widen_codes(block, wide_codes, (end - start) * depth);
        for (int64_t panel = first_panel; panel < last_panel; panel++) {
            const int8_t *levels = layer->panels + panel * bytes;
            const int64_t column = panel * SIDE;
            uint8_t *out = NULL;
            Columns columns;
            columns_of(layer, column, &columns);
            if (target->codes) {
                out = place_of_codes(layer, target, column, &quantizer);
                if (quantizer != known)
                    how = ready_of(known = quantizer);
            }
            if (layer->shift) {
                shift_panel(levels, shifted, bytes, layer->shift);
                levels = shifted;
            }
            if (!layer->run)
                for (int64_t i = 0; i < bytes; i++)
                    wide[i] = levels[i];
            for (int64_t row = start; row < end; row += ROWS) {
                const int64_t rows = end - row < ROWS ? end - row : ROWS;
                const uint8_t *places[ROWS];
                int32_t sums[ROWS * SIDE] __attribute__((aligned(32)));
                for (int r = 0; r < ROWS; r++) {
                    places[r] = block + (row - start + (r < rows ? r : rows - 1)) * depth;
                    if (target->added) /* fetched while sums are made */
                        _mm_prefetch((const char *)(target->added + (row + r) * layer->width + column),
                                     _MM_HINT_T0);
                }
                if (layer->run) {
                    narrow_sums(places, levels, groups, layer->run, sums);
                } else {
                    wide_sums(wide_codes + (row - start) * depth, depth, wide, groups, sums);
                }
                if (target->codes)
                    store_codes(sums, row, rows, &columns, layer, target, out, &how);
                else
                    store_values(sums, row, rows, &columns, layer, target, column);
            }
        }
    }
}

/* The passes of attention that `native.c` has for AVX-512 VNNI; keys and values are packed in the
 * same order, in 16 bits. */
AVX2 void qtool_pack_keys_avx2(const int8_t *keys, int16_t *packed, int32_t *columns,
                               int64_t tokens, int64_t width, int32_t query_zero)
{
    const int64_t blocks = (tokens + SIDE - 1) / SIDE, words = width / 4;
    const __m256i minus_zero = _mm256_set1_epi16((int16_t)-query_zero);
    for (int64_t token = 0; token < blocks * SIDE; token++) {
        int16_t *target = packed + token / SIDE * words * GROUP + token % SIDE * 4;
        __m256i sums = _mm256_setzero_si256();
        for (int64_t i = 0; i < words; i += 4, target += 4 * GROUP) {
            const __m128i *place = (const __m128i *)(keys + token * width + 4 * i);
            const __m128i some = token < tokens ? _mm_loadu_si128(place) : _mm_setzero_si128();
            const __m256i wide = _mm256_cvtepi8_epi16(some);
            const __m128i low = _mm256_castsi256_si128(wide);
            const __m128i high = _mm256_extracti128_si256(wide, 1);
            _mm_storel_epi64((__m128i *)target, low);
            _mm_storel_epi64((__m128i *)(target + GROUP), _mm_unpackhi_epi64(low, low));
            _mm_storel_epi64((__m128i *)(target + 2 * GROUP), high);
            _mm_storel_epi64((__m128i *)(target + 3 * GROUP), _mm_unpackhi_epi64(high, high));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(wide, minus_zero));
        }
        int32_t lanes[8];
        _mm256_storeu_si256((__m256i *)lanes, sums);
        columns[token] = 0;
        for (int i = 0; i < 8; i++)
            columns[token] += lanes[i];
    }
}

AVX2 void qtool_scores_avx2(const uint8_t *queries, int64_t rows, const int16_t *packed,
                            const int32_t *columns, int64_t tokens, int64_t width,
                            int32_t query_zero, int32_t shift, float scale, float *out)
{
    const int64_t blocks = (tokens + SIDE - 1) / SIDE, words = width / 4;
    const __m256 scales = _mm256_set1_ps(scale);
    const Rows some = rows_at(queries, width, rows, width, query_zero, shift);
    int16_t codes[ROWS * width];
    for (int r = 0; r < ROWS; r++)
        widen_codes(some.codes[r], codes + r * width, width);
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * SIDE, left = tokens - start < SIDE ? tokens - start : SIDE;
        int32_t sums[ROWS * SIDE];
        wide_sums(codes, width, packed + block * words * GROUP, words, sums);
        for (int64_t r = 0; r < rows; r++) {
            float rest[SIDE], *place = out + r * tokens + start;
            float *values = left == SIDE ? place : rest;
            for (int half = 0; half < 2; half++) {
                const __m256i *found = (const __m256i *)(sums + r * SIDE + 8 * half);
                const __m256i *column = (const __m256i *)(columns + start + 8 * half);
                const __m256i sum =
                    _mm256_add_epi32(_mm256_loadu_si256(found), _mm256_loadu_si256(column));
                const __m256i whole = _mm256_add_epi32(sum, _mm256_set1_epi32(some.added[r]));
                _mm256_storeu_ps(values + 8 * half,
                                 _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scales));
            }
            if (left < SIDE)
                memcpy(place, rest, (size_t)left * sizeof(float));
        }
    }
}

AVX2 void qtool_pack_values_avx2(const int8_t *values, int16_t *packed, int32_t *columns,
                                 int64_t tokens, int64_t width, int32_t zero)
{
    const int64_t groups = (tokens + 3) / 4; /* of each sixteen columns, which lie together */
    const __m256i minus_zero = _mm256_set1_epi16((int16_t)-zero);
    for (int64_t column = 0; column < width; column += SIDE) {
        __m256i sums[4];
        for (int part = 0; part < 4; part++)
            sums[part] = _mm256_setzero_si256();
        for (int64_t group = 0; group < groups; group++) {
            __m128i row[4];
            for (int64_t j = 0; j < 4; j++) {
                const int64_t token = 4 * group + j;
                const __m128i *place = (const __m128i *)(values + token * width + column);
                row[j] = token < tokens ? _mm_loadu_si128(place) : _mm_setzero_si128();
            }
            const __m128i low = _mm_unpacklo_epi8(row[0], row[1]);
            const __m128i low_next = _mm_unpacklo_epi8(row[2], row[3]);
            const __m128i high = _mm_unpackhi_epi8(row[0], row[1]);
            const __m128i high_next = _mm_unpackhi_epi8(row[2], row[3]);
            const __m128i turned[4] = {
                _mm_unpacklo_epi16(low, low_next), _mm_unpackhi_epi16(low, low_next),
                _mm_unpacklo_epi16(high, high_next), _mm_unpackhi_epi16(high, high_next)};
            for (int part = 0; part < 4; part++) {
                const __m256i four = _mm256_cvtepi8_epi16(turned[part]); /* columns */
                _mm256_storeu_si256((__m256i *)packed + part, four);
                sums[part] = _mm256_add_epi32(sums[part], _mm256_madd_epi16(four, minus_zero));
            }
            packed += GROUP;
        }
        for (int half = 0; half < 2; half++) {
            const __m256i added = _mm256_hadd_epi32(sums[2 * half], sums[2 * half + 1]);
            _mm256_storeu_si256((__m256i *)(columns + column + 8 * half),
                                _mm256_permute4x64_epi64(added, 0xD8));
        }
    }
}

AVX2 void qtool_attended_avx2(const uint8_t *probabilities, int64_t stride, int64_t rows,
                              const int16_t *packed, const int32_t *columns, int64_t tokens,
                              int64_t width, int32_t zero, int32_t shift, float *out)
{
    const int64_t groups = (tokens + 3) / 4;
    const Rows some = rows_at(probabilities, stride, rows, tokens, zero, shift);
    int16_t codes[ROWS * 4 * groups];
    for (int r = 0; r < ROWS; r++)
        widen_codes(some.codes[r], codes + r * 4 * groups, 4 * groups);
    for (int64_t column = 0; column < width; column += SIDE) {
        int32_t sums[ROWS * SIDE];
        wide_sums(codes, 4 * groups, packed + column / SIDE * groups * GROUP, groups, sums);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < SIDE; i++)
                out[r * width + column + i] =
                    (float)(sums[r * SIDE + i] + columns[column + i] + some.added[r]);
    }
}
#endif
