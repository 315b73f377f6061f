/* The product of any number of rows with a bfloat16 weight as it lies in a checkpoint: both are
   widened to float32 as they are read. O outputs, I inputs; see common.h. */

#include "common.h"

#define ROWS 2 /* rows that share the reading of a weight, */
#define SOME 4 /* and outputs that share the reading of a row: their sums fill 8 registers */
#define FEW 8  /* the same for one row */

typedef struct {
    const uint16_t *weight; /* [O, I] */
    const uint16_t *x;      /* [R, I] */
    const uint16_t *bias;   /* [O] or null */
    uint16_t *out;          /* [R, O] */
    int64_t next, rows, outputs, inputs;
} Plain;

/* A sum for each lane in order of the inputs, then over the lanes: alike for each row and output. */
static inline __attribute__((always_inline)) void tile(
    const Plain *task, int64_t row, const int rows, int64_t output, const int outputs)
{
    int64_t vectors = task->inputs / 2 / LANES;
    const words *x = (const words *)task->x + row * vectors;
    const words *weight = (const words *)task->weight + output * vectors;
    floats sum[ROWS][FEW] = {0};
    for (int64_t v = 0; v < vectors; v++)
#pragma GCC unroll 8
        for (int o = 0; o < outputs; o++) {
            floats odds = odd(weight[o * vectors + v]), evens = even(weight[o * vectors + v]);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                sum[r][o] = plus_product(sum[r][o], odd(x[r * vectors + v]), odds);
                sum[r][o] = plus_product(sum[r][o], even(x[r * vectors + v]), evens);
            }
        }
    for (int o = 0; o < outputs; o++) {
        float bias = task->bias ? wide(task->bias[output + o]) : 0;
        for (int r = 0; r < rows; r++) {
            uint16_t *out = task->out + (row + r) * task->outputs + output + o;
            *out = narrow(sum_of(sum[r][o]) + bias);
        }
    }
}

static void few_outputs(const Plain *task, int64_t output)
{
    int64_t row = 0;
    for (; row + ROWS <= task->rows; row += ROWS)
        for (int o = 0; o < FEW; o += SOME)
            tile(task, row, ROWS, output + o, SOME);
    for (; row < task->rows; row++)
        tile(task, row, 1, output, FEW);
}

void plain_product(Plain *task)
{
    int64_t piece;
    while ((piece = next_piece(&task->next)) * BLOCK < task->outputs) {
        int64_t output = piece * BLOCK, left = task->outputs - output;
        int64_t end = output + (left < BLOCK ? left : BLOCK);
        for (; output + FEW <= end; output += FEW)
            few_outputs(task, output);
        for (; output < end; output++)
            for (int64_t row = 0; row < task->rows; row++)
                tile(task, row, 1, output, 1);
    }
}
