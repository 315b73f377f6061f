/* The product of any number of rows with a packed weight, on a processor that cannot multiply
   bfloat16: both are widened to float32 as they are read; see product.h. */

#include "product.h"

#define NARROW 8 /* vectors of 8 numbers in a block of outputs: registers are that wide */
#define DEEP 64  /* pairs of inputs whose weights, 16 KiB, stay in the nearest cache for all rows */
#define PANEL 48 /* rows that are computed together */

typedef float few __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t few_words __attribute__((vector_size(32), aligned(4), may_alias));

static inline few odd_few(few_words pairs) { return (few)(pairs & 0xFFFF0000u); }
static inline few even_few(few_words pairs) { return (few)(pairs << 16); }

/* Go on with the sums of some rows and outputs, which fill the registers. Whatever the tile, an
   output adds the odd and then the even product of one pair after the other. */
static inline __attribute__((always_inline)) void tile(
    const few_words *weight, const uint32_t *x, int64_t stride, int64_t pairs, few *total,
    const int rows, const int vectors)
{
    few sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            sum[r][v] = total[r * NARROW + v];
    for (int64_t pair = 0; pair < pairs; pair++, weight += NARROW) {
        few odds[vectors], evens[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            odds[v] = odd_few(weight[v]);
            evens[v] = even_few(weight[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            few_words same = (few_words){} + x[r * stride + pair];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sum[r][v] += odd_few(same) * odds[v];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sum[r][v] += even_few(same) * evens[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            total[r * NARROW + v] = sum[r][v];
}

/* The tiles of some rows, side by side. */
#define TILES(rows, vectors)                     \
    for (int v = 0; v < NARROW; v += (vectors))  \
        tile(weight + v, x, stride, pairs, total + v, rows, vectors)

static void add_pairs(
    const few_words *weight, const uint32_t *x, int64_t stride, int64_t pairs, few *total,
    int64_t rows)
{
    for (; rows >= 6; rows -= 6, x += 6 * stride, total += 6 * NARROW)
        TILES(6, 2);
    switch (rows) {
    case 1: TILES(1, 8); break;
    case 2: TILES(2, 4); break;
    case 3: TILES(3, 2); break;
    case 4: TILES(4, 2); break;
    case 5: TILES(5, 2); break;
    }
}

static void panel(const Product *task, int64_t block, int64_t first_row)
{
    int64_t left = task->rows - first_row, rows = left < PANEL ? left : PANEL;
    const few_words *weight = (const few_words *)task->weight + block * task->pairs * NARROW;
    const uint32_t *x = task->x + first_row * task->pairs;
    few total[PANEL * NARROW];
    memset(total, 0, rows * NARROW * sizeof *total);
    for (int64_t pair = 0; pair < task->pairs; pair += DEEP) {
        int64_t pairs = task->pairs - pair < DEEP ? task->pairs - pair : DEEP;
        add_pairs(weight + pair * NARROW, x + pair, task->pairs, pairs, total, rows);
    }
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *out = task->out + (first_row + r) * task->outputs;
        write_block((floats *)(total + r * NARROW), task->bias, out, block, task->outputs);
    }
}

void widened_product(Product *task)
{
    int64_t piece, panels = (task->rows + PANEL - 1) / PANEL;
    while ((piece = next_piece(&task->next)) < task->blocks * panels)
        panel(task, piece / panels, piece % panels * PANEL);
}
