/* Layers in panels on the matrix tiles of x86 (AMX).
 *
 * A panel has 32 columns; it holds, for every 64 inputs, two tiles of 16 columns: sixteen rows of four
 * inputs side by side for each column. The depth is a multiple of 64.
 */
#define _GNU_SOURCE
#include "panels.h"

#if X86 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define AMX 0
#endif

#if AMX
#define TILES __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512vbmi")))
#define SIDE 16    /* rows or columns of a tile */
#define STEP 64    /* inputs of a tile */
#define PAIR 2048  /* bytes of the two tiles of a panel */
#define LINE 64    /* bytes that memory hands over at once */

/* Palette 1: eight tiles of sixteen rows of 64 bytes. */
TILES static void configure(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        tiles.bytes[tile] = LINE;
        tiles.rows[tile] = SIDE;
    }
    _tile_loadconfig(&tiles);
}

/* What turns sums of sixteen columns into values. */
typedef struct {
    __m512i offset;
    __m512 scale, bias;
    __mmask16 inside;
} Columns;

/* Sums of 32 rows and 32 columns that wait to be made values, by UNITS of FEW rows and sixteen
 * columns: the next ones are summed meanwhile. */
#define FEW 4
#define UNITS (BLOCK / FEW * 2)
typedef struct {
    int32_t sums[BLOCK * BLOCK];
    Columns columns[2];
    int64_t row, rows, column;
    int next;
} Pending;

TILES static inline void columns_of(const PanelLayer *layer, int64_t first, Columns *found)
{
    const int64_t left = layer->width - first;
    const __mmask16 inside =
        left >= SIDE ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    const __m512i sums = _mm512_maskz_loadu_epi32(inside, layer->sums + first);
    found->inside = inside;
    found->offset = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-layer->zero));
    found->scale = _mm512_maskz_loadu_ps(inside, layer->scale + first);
    found->bias =
        layer->bias ? _mm512_maskz_loadu_ps(inside, layer->bias + first) : _mm512_setzero_ps();
}

TILES static inline __m512 value_of(const int32_t *sums, const Columns *columns, int biased,
                                    const int32_t *row_sum)
{
    __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums), columns->offset);
    if (row_sum) { /* 2 h + 1: the product with h once more, and the codes themselves */
        sum = _mm512_add_epi32(sum, _mm512_load_si512(sums));
        sum = _mm512_add_epi32(sum, _mm512_set1_epi32(*row_sum));
    }
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), columns->scale);
    return biased ? _mm512_add_ps(value, columns->bias) : value;
}

/* A few rows of sixteen columns as float32. */
TILES static inline void store_values(const int32_t *sums, int64_t row, int64_t rows,
                                      const Columns *columns, const PanelLayer *layer,
                                      const Target *target, int64_t column)
{
    const int64_t width = layer->width, place = row * width + column;
    const float *added = target->added ? target->added + place : NULL;
    float *values = target->values + place;
    const __mmask16 inside = columns->inside;
    const int32_t *row_sums = target->row_sums ? target->row_sums + row : NULL;
    for (int64_t i = 0; i < rows; i++) {
        const int32_t *row_sum = row_sums ? row_sums + i : NULL;
        __m512 value = value_of(sums + i * BLOCK, columns, layer->bias != NULL, row_sum);
        if (added)
            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(inside, added + i * width));
        _mm512_mask_storeu_ps(values + i * width, inside, value);
    }
}

/* The same as codes. */
TILES static inline void store_codes(const int32_t *sums, int64_t row, int64_t rows,
                                     const Columns *columns, const PanelLayer *layer,
                                     const Target *target, int64_t column)
{
    const Walk *walk = target->walk;
    const int64_t tokens = walk->size[2];
    const Quantizer *quantizer;
    uint8_t *out = place_of_codes(layer, target, column, &quantizer);
    const __m512 scale = _mm512_set1_ps(quantizer->scale);
    const __m512 inverse = _mm512_set1_ps(1.0f / quantizer->scale);
    const __m512 zero = _mm512_set1_ps(quantizer->zero), top = _mm512_set1_ps(quantizer->top);
    const __m512 factor = _mm512_set1_ps(quantizer->factor);
    const __m512 bottom = _mm512_set1_ps(quantizer->bottom);
    __m128i found[FEW]; /* rows behind the last one are sums of something, and not stored */
    for (int i = 0; i < FEW; i++) {
        const int32_t *row_sum = target->row_sums ? target->row_sums + row + i % rows : NULL;
        const __m512 value = value_of(sums + i * BLOCK, columns, layer->bias != NULL, row_sum);
        found[i] = sixteen_codes(_mm512_mul_ps(value, factor), scale, inverse, zero, bottom, top);
    }
    __m512i quarters[4];
    load_table(quantizer->table, quarters);
    const __m512i codes = joined_codes(found, quantizer->table != NULL, quarters,
                                       _mm512_set1_epi8((char)quantizer->flip));
    found[0] = _mm512_castsi512_si128(codes);
    found[1] = _mm512_extracti32x4_epi32(codes, 1);
    found[2] = _mm512_extracti32x4_epi32(codes, 2);
    found[3] = _mm512_extracti32x4_epi32(codes, 3);
    int64_t picture = row / tokens, token = row % tokens;
    for (int64_t i = 0; i < rows; i++) {
        _mm_storeu_si128((__m128i *)(out + picture * walk->to[0] + token * walk->to[2]), found[i]);
        if (++token == tokens) {
            token = 0;
            picture++;
        }
    }
}

/* Make sums values, up to the unit with this number. */
TILES static inline void finish(Pending *pending, int until, const PanelLayer *layer,
                                const Target *target)
{
    for (; pending->next < until; pending->next++) {
        const int half = pending->next & 1;
        const int64_t first = (pending->next >> 1) * FEW, left = pending->rows - first;
        const Columns *columns = pending->columns + half;
        const int32_t *sums = pending->sums + first * BLOCK + half * SIDE;
        const int64_t rows = left < FEW ? left : FEW, column = pending->column + half * SIDE;
        if (rows <= 0 || !columns->inside)
            continue;
        if (target->codes)
            store_codes(sums, pending->row + first, rows, columns, layer, target, column);
        else
            store_values(sums, pending->row + first, rows, columns, layer, target, column);
    }
}

/* The leading bits of a panel's codes: an arithmetic shift of bytes. */
TILES static void shift_panel(const int8_t *panel, int8_t *out, int64_t bytes, int32_t shift)
{
    const __m512i flip = _mm512_set1_epi8((char)128), middle = _mm512_set1_epi8((char)(128 >> shift));
    const __m512i kept = _mm512_set1_epi8((char)(255 >> shift));
    const __m128i by = _mm_cvtsi32_si128(shift);
    for (int64_t i = 0; i < bytes; i += LINE) {
        const __m512i whole = _mm512_xor_si512(_mm512_loadu_si512(panel + i), flip);
        const __m512i leading = _mm512_and_si512(_mm512_srl_epi16(whole, by), kept);
        _mm512_storeu_si512(out + i, _mm512_sub_epi8(leading, middle));
    }
}

/* Some rows and panels, by one thread. `tail` holds the last rows, made sixteen. */
TILES static void multiply(const PanelLayer *layer, const uint8_t *codes, const uint8_t *tail,
                           int64_t whole, int64_t first_row, int64_t last_row, int64_t first_panel,
                           int64_t last_panel, const Target *target)
{
    const int64_t depth = layer->depth, steps = depth / STEP;
    const int64_t most = CACHED / depth / BLOCK * BLOCK + BLOCK;
    Pending both[2] __attribute__((aligned(LINE)));
    int8_t shifted[layer->shift ? steps * PAIR : 1];
    Pending *before = both, *now = both + 1;
    before->next = UNITS;
    configure();
    for (int64_t start = first_row; start < last_row; start += most) {
        const int64_t end = start + most < last_row ? start + most : last_row;
        const int64_t blocks = (end - start + BLOCK - 1) / BLOCK;
        for (int64_t panel = first_panel; panel < last_panel; panel++) {
            const int8_t *levels = layer->panels + panel * steps * PAIR;
            const int8_t *next = levels + steps * PAIR; /* fetched while this one is in use */
            int64_t lines = (PAIR / LINE + blocks - 1) / blocks;
            if (panel + 1 == last_panel || start > first_row)
                lines = 0;
            if (layer->shift) {
                shift_panel(levels, shifted, steps * PAIR, layer->shift);
                levels = shifted;
            }
            for (int64_t row = start; row < end; row += BLOCK) {
                const uint8_t *above = row < whole ? codes + row * depth : tail;
                const uint8_t *below = row + SIDE < whole ? codes + (row + SIDE) * depth : tail;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t step = 0; step < steps; step++) {
                    _tile_loadd(4, above + step * STEP, depth);
                    _tile_loadd(6, levels + step * PAIR, LINE);
                    _tile_loadd(7, levels + step * PAIR + PAIR / 2, LINE);
                    _tile_dpbusd(0, 4, 6);
                    _tile_dpbusd(1, 4, 7);
                    _tile_loadd(5, below + step * STEP, depth);
                    _tile_dpbusd(2, 5, 6);
                    _tile_dpbusd(3, 5, 7);
                    for (int64_t line = 0; line < lines; line++, next += LINE)
                        _mm_prefetch((const char *)next, _MM_HINT_T1);
                    finish(before, (int)((step + 1) * UNITS / steps), layer, target);
                }
                _tile_stored(0, now->sums, BLOCK * sizeof(int32_t));
                _tile_stored(1, now->sums + SIDE, BLOCK * sizeof(int32_t));
                _tile_stored(2, now->sums + SIDE * BLOCK, BLOCK * sizeof(int32_t));
                _tile_stored(3, now->sums + SIDE * BLOCK + SIDE, BLOCK * sizeof(int32_t));
                columns_of(layer, panel * BLOCK, now->columns);
                columns_of(layer, panel * BLOCK + SIDE, now->columns + 1);
                now->row = row;
                now->rows = end - row < BLOCK ? end - row : BLOCK;
                now->column = panel * BLOCK;
                now->next = 0;
                Pending *other = before;
                before = now;
                now = other;
            }
        }
    }
    finish(before, UNITS, layer, target);
    _tile_release();
}

/* Some rows and panels, by one thread. */
TILES void qtool_multiply_tiles(const PanelLayer *layer, const uint8_t *codes, int64_t rows,
                                int64_t first_row, int64_t last_row, int64_t first_panel,
                                int64_t last_panel, const Target *target)
{
    const int64_t depth = layer->depth, whole = rows / SIDE * SIDE, kept = (rows - whole) * depth;
    uint8_t tail[SIDE * MOST_DEPTH];
    if (last_row == rows) {
        memcpy(tail, codes + whole * depth, (size_t)kept);
        memset(tail + kept, 0, (size_t)(SIDE * depth - kept));
    }
    multiply(layer, codes, tail, whole, first_row, last_row, first_panel, last_panel, target);
}

/* Whether this processor has tiles and the system lets them be used. */
int qtool_has_tiles(void)
{
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx512vbmi") || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    if (!(d >> 24 & 1) || !(d >> 25 & 1))
        return 0;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
}

#else
int qtool_has_tiles(void)
{
    return 0;
}

#if X86
void qtool_multiply_tiles(const PanelLayer *layer, const uint8_t *codes, int64_t rows,
                          int64_t first_row, int64_t last_row, int64_t first_panel,
                          int64_t last_panel, const Target *target)
{ /* never called */
    (void)layer, (void)codes, (void)rows, (void)first_row, (void)last_row, (void)first_panel;
    (void)last_panel, (void)target;
}
#endif
#endif
