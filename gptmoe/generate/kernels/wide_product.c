/* The product of a few rows with a packed float32 weight. I inputs; see common.h. */

#include "common.h"

#define SHARE 2 /* rows that share the reading of a weight: their sums for some vectors of outputs */
#define SOME (WIDE / SHARE) /* fill as many registers as one row's for the whole block */

typedef struct {
    Rows rows;
    const float *weight; /* [B, I, BLOCK]: 64 outputs together: as oneDNN packs */
    const float *x;      /* [R, I] */
    const float *bias;   /* [O] or null */
    float *out;          /* [R, O] */
    int64_t blocks, inputs, chunk, outputs;
} WideProduct;

/* Some rows and some vectors of outputs. The order of additions is oneDNN's: by inputs; every `chunk`
   of them has a sum of its own; the bias comes last. */
static inline __attribute__((always_inline)) void tile(
    const WideProduct *task, int64_t row, const int rows, int64_t output, const int vectors)
{
    int64_t inputs = task->inputs;
    const float *weight = task->weight + output / BLOCK * BLOCK * inputs + output % BLOCK;
    const float *x = task->x + row * inputs;
    floats total[SHARE][WIDE] = {0};
    for (int64_t first = 0; first < inputs; first += task->chunk) {
        int64_t end = first + task->chunk < inputs ? first + task->chunk : inputs;
        floats sum[SHARE][WIDE] = {0};
        for (int64_t i = first; i < end; i++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                floats some = *(const floats *)(weight + i * BLOCK + v * LANES);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++)
                    sum[r][v] = plus_product(sum[r][v], (floats){} + x[r * inputs + i], some);
            }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                total[r][v] += sum[r][v];
    }
    for (int r = 0; r < rows; r++)
        for (int64_t v = 0, o = output; v < vectors && o < task->outputs; v++, o += LANES) {
            int64_t left = task->outputs - o, bytes = 4 * (left < LANES ? left : LANES);
            floats bias = {0};
            if (task->bias) {
                memcpy(&bias, task->bias + o, bytes);
                total[r][v] += bias;
            }
            memcpy(task->out + (row + r) * task->outputs + o, &total[r][v], bytes);
        }
}

void wide_product(WideProduct *task)
{
    int64_t block;
    while ((block = next_piece(&task->rows.next)) < task->blocks) {
        int64_t row = task->rows.first, output = block * BLOCK;
        for (; row + SHARE <= task->rows.end; row += SHARE)
            for (int64_t part = 0; part < BLOCK; part += SOME * LANES)
                tile(task, row, SHARE, output + part, SOME);
        if (row < task->rows.end)
            tile(task, row, 1, output, WIDE);
    }
}
