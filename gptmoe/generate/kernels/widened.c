/* The product of any number of rows with a packed weight, on a processor that cannot multiply
   bfloat16: both are widened to float32 as they are read; see product.h. */

#include "product.h"

#define DEEP 64  /* pairs of inputs whose weights, 16 KiB, stay in the nearest cache for all rows */
#define PANEL 48 /* rows that are computed together */

/* Go on with the sums of some rows and outputs, which fill the registers. Whatever the tile, an
   output adds the odd and then the even product of one pair after the other. */
static inline __attribute__((always_inline)) void tile(
    const words *weight, const uint32_t *x, int64_t stride, int64_t pairs, floats *total,
    const int rows, const int vectors)
{
    floats sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            sum[r][v] = total[r * WIDE + v];
    for (int64_t pair = 0; pair < pairs; pair++, weight += WIDE) {
        floats odds[vectors], evens[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            odds[v] = odd(weight[v]);
            evens[v] = even(weight[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            words same = (words){} + x[r * stride + pair];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sum[r][v] = plus_product(sum[r][v], odd(same), odds[v]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sum[r][v] = plus_product(sum[r][v], even(same), evens[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            total[r * WIDE + v] = sum[r][v];
}

/* The tiles of some rows, side by side. */
#define TILES(rows, vectors)                     \
    for (int v = 0; v < WIDE; v += (vectors))  \
        tile(weight + v, x, stride, pairs, total + v, rows, vectors)

static void add_pairs(
    const words *weight, const uint32_t *x, int64_t stride, int64_t pairs, floats *total,
    int64_t rows)
{
    for (; rows >= 6; rows -= 6, x += 6 * stride, total += 6 * WIDE)
        TILES(6, 2);
    switch (rows) {
    case 1: TILES(1, WIDE); break;
    case 2: TILES(2, 4); break;
    case 3: TILES(3, 2); break;
    case 4: TILES(4, 2); break;
    case 5: TILES(5, 2); break;
    }
}

static void panel(const Product *task, int64_t block, int64_t first_row)
{
    int64_t left = task->rows - first_row, rows = left < PANEL ? left : PANEL;
    const words *weight = task->weight + block * task->pairs * WIDE;
    const uint32_t *x = task->x + first_row * task->pairs;
    floats total[PANEL * WIDE];
    memset(total, 0, rows * WIDE * sizeof *total);
    for (int64_t pair = 0; pair < task->pairs; pair += DEEP) {
        int64_t pairs = task->pairs - pair < DEEP ? task->pairs - pair : DEEP;
        add_pairs(weight + pair * WIDE, x + pair, task->pairs, pairs, total, rows);
    }
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *out = task->out + (first_row + r) * task->outputs;
        write_block(total + r * WIDE, task->bias, out, block, task->outputs);
    }
}

void widened_product(Product *task)
{
    int64_t piece, panels = (task->rows + PANEL - 1) / PANEL;
    while ((piece = next_piece(&task->next)) < task->blocks * panels)
        panel(task, piece / panels, piece % panels * PANEL);
}
