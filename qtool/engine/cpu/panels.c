/* Linear layers whose weights lie in panels: uint8 codes times int8 levels, or times the odd levels
 * 2 h + 1 of the leading bits h of nested codes.
 *
 * Sums are exact integers; what follows them, (sum - zero * sum of levels) * scale + bias, rounds as
 * PyTorch's own products do. Threads share the panels here; `amx.c` and `avx2.c` multiply.
 */
#include "panels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define SMALL (256 * 1024) /* bytes of weights that every thread may read */

#if X86
#define WIDE_PANEL 32   /* columns of a panel for tiles */
#define NARROW_PANEL 16 /* and for vectors */

void qtool_gather(const Window *window, const uint8_t *x, int64_t place, uint8_t *out,
                  int64_t length)
{
    const int64_t height = window->size[0], width = window->size[1], channels = window->channels;
    const int64_t across = window->kernel[1], apart = window->dilation[1];
    const int64_t line = place / window->found[1];
    const int64_t top = line % window->found[0] * window->stride[0] - window->padding[0];
    const int64_t left = place % window->found[1] * window->stride[1] - window->padding[1];
    const uint8_t *picture = x + line / window->found[0] * height * width * channels;
    const int whole = left >= 0 && left + (across - 1) * apart < width && apart == 1;
    const uint8_t *end = out + length;
    for (int64_t down = 0; down < window->kernel[0]; down++) {
        const int64_t y = top + down * window->dilation[0];
        const uint8_t *row = picture + y * width * channels;
        if (y < 0 || y >= height) {
            memset(out, (int)window->zero, (size_t)(across * channels));
        } else if (whole) {
            memcpy(out, row + left * channels, (size_t)(across * channels));
        } else {
            for (int64_t i = 0; i < across; i++) {
                const int64_t at = left + i * apart;
                if (at >= 0 && at < width)
                    memcpy(out + i * channels, row + at * channels, (size_t)channels);
                else
                    memset(out + i * channels, (int)window->zero, (size_t)channels);
            }
        }
        out += across * channels;
    }
    memset(out, 0, (size_t)(end - out));
}

int64_t qtool_window_room(int64_t depth)
{
    return rows_at_once(depth) * depth;
}

/* All rows and panels. Threads share the panels, so that each reads its weights once; where there
 * are more threads than panels, rows as well. */
static void multiply_all(const PanelLayer *layer, const uint8_t *codes, int64_t rows,
                         const Target *target, uint8_t *room, int threads)
{
    const int64_t columns = layer->vectors ? NARROW_PANEL : WIDE_PANEL;
    const int64_t panels = (layer->width + columns - 1) / columns;
    const int64_t row_blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
    {
        if (target->row_sums) {
#pragma omp for
            for (int64_t row = 0; row < rows; row++)
                target->row_sums[row] =
                    qtool_sum_of_codes(codes + row * layer->depth, layer->depth);
        }
#ifdef _OPENMP
        const int64_t all = omp_get_num_threads(), thread = omp_get_thread_num();
#else
        const int64_t all = 1, thread = 0;
        (void)threads;
#endif
        int64_t beside = all < panels ? all : panels;
        if (layer->depth * layer->width <= SMALL && row_blocks >= 2 * all)
            beside = 1;
        const int64_t above = all / beside;
        const int64_t row = thread / beside, panel = thread % beside;
        const int64_t first = row * row_blocks / above * BLOCK;
        const int64_t end = (row + 1) * row_blocks / above * BLOCK, last = end < rows ? end : rows;
        const int64_t from = panel * panels / beside, until = (panel + 1) * panels / beside;
        if (row < above && first < rows) {
            if (layer->vectors)
                qtool_multiply_vectors(layer, codes, first, last, from, until, target,
                                       room ? room + thread * qtool_window_room(layer->depth) : NULL);
            else
                qtool_multiply_tiles(layer, codes, rows, first, last, from, until, target);
        }
    }
}

/* float32 (rows, width), with another such matrix added unless it is NULL. Nested codes need room
 * for as many row sums. */
void qtool_panel_values(const PanelLayer *layer, const uint8_t *codes, int64_t rows,
                        int32_t *row_sums, const float *added, float *out, int threads)
{
    const Target target = {.values = out, .added = added, .row_sums = row_sums};
    multiply_all(layer, codes, rows, &target, NULL, threads);
}

/* A convolution: float32 (pictures, places down, places across, width), or codes with a quantizer,
 * as told by a walk over (1, 1, all places, width). `room` holds as many codes for each thread as
 * `qtool_window_room` tells. */
void qtool_panel_windows(const PanelLayer *layer, const Window *window, const uint8_t *x,
                         uint8_t *room, float *values, uint8_t *codes, const Walk *walk,
                         const Quantizer *quantizer, int threads)
{
    const Target target = {.values = values, .codes = codes, .walk = walk, .parts = 1,
                           .quantizers = quantizer, .window = window};
    multiply_all(layer, x, window->pictures * window->found[0] * window->found[1], &target, room,
                 threads);
}

/* Codes of the values; the walk's last size is a multiple of 16 where it is not the width, rows are
 * pictures by tokens. */
void qtool_panel_codes(const PanelLayer *layer, const uint8_t *codes, int64_t rows,
                       int32_t *row_sums, uint8_t *out, const Walk *walk,
                       const Quantizer *quantizers, int64_t parts, int64_t apart, int threads)
{
    const Target target = {.codes = out, .row_sums = row_sums, .walk = walk,
                           .quantizers = quantizers, .parts = parts, .apart = apart};
    multiply_all(layer, codes, rows, &target, NULL, threads);
}
#endif
