/* Linear layers whose weights lie in panels: what their kernels share. */
#ifndef QTOOL_PANELS_H
#define QTOOL_PANELS_H

#include "native.h"

#define BLOCK 32           /* rows that a thread takes at once */
#define MOST_DEPTH 8192    /* inputs of a layer */
#define CACHED (512 * 1024) /* bytes of codes that stay near while panels pass */

/* A layer of `width` columns. `sums` are those of the levels of each column; without a bias it is
 * NULL. Nested codes lose `shift` bits. With `vectors` it is laid out for 256-bit vectors, else for
 * tiles; `run` is how many groups of four inputs are safely summed in 16 bits, 0 for none. */
typedef struct {
    const int8_t *panels;
    const int32_t *sums;
    const float *scale, *bias;
    int64_t depth, width;
    int32_t zero, shift, vectors, run;
} PanelLayer;

/* Where results go: float32 rows, with another matrix added or not, or codes. `row_sums`, those of
 * the codes of each row, are there for nested levels, and NULL for others. Codes of `parts` equal
 * parts of the columns, each with a quantizer, lie `apart` elements from one another, each as told
 * by a walk over (pictures, heads, tokens, columns of a head). With a `window` rows are places of a
 * convolution, whose codes are gathered first. */
typedef struct {
    float *values;
    const float *added;
    int32_t *row_sums;
    uint8_t *codes;
    const Walk *walk;
    const Quantizer *quantizers;
    int64_t parts, apart;
    const Window *window;
} Target;

/* Where the codes of sixteen columns go, and their quantizer. */
static inline uint8_t *place_of_codes(const PanelLayer *layer, const Target *target, int64_t column,
                                      const Quantizer **quantizer)
{
    const Walk *walk = target->walk;
    const int64_t part_width = layer->width / target->parts;
    const int64_t part = column / part_width, within = column % part_width;
    *quantizer = target->quantizers + part;
    return target->codes + part * target->apart + within / walk->size[3] * walk->to[1] +
           within % walk->size[3];
}

/* How many rows of codes stay near while panels pass, a multiple of BLOCK. */
static inline int64_t rows_at_once(int64_t depth)
{
    return CACHED / depth / BLOCK * BLOCK + BLOCK;
}

/* Bytes of the codes that a thread gathers at once. */
int64_t qtool_window_room(int64_t depth);

/* The codes of one place of a convolution, (kernel rows, kernel columns, channels), and zeros up to
 * `length`. */
void qtool_gather(const Window *window, const uint8_t *x, int64_t place, uint8_t *out,
                  int64_t length);

/* Some rows and panels, by one thread; the rows begin at a multiple of BLOCK. `room` holds the codes
 * of as many places of a window as rows are taken at once. */
#if X86
void qtool_multiply_vectors(const PanelLayer *layer, const uint8_t *codes, int64_t first_row,
                            int64_t last_row, int64_t first_panel, int64_t last_panel,
                            const Target *target, uint8_t *room);
void qtool_multiply_tiles(const PanelLayer *layer, const uint8_t *codes, int64_t rows,
                          int64_t first_row, int64_t last_row, int64_t first_panel,
                          int64_t last_panel, const Target *target);
#endif

#endif
