/* The product of any number of rows with a bfloat16 weight as it lies in a checkpoint: both are
   widened to float32 as they are read. O outputs, I inputs; see common.h. */

#include "common.h"

#define ROWS 2 /* rows that share the reading of a weight, */
#define SOME 4 /* and outputs that share the reading of a row: their sums fill 8 registers */
#define APART (BLOCK / SOME)
/* Of each such output the next ones follow in memory. Were these outputs neighbours, several would
   begin in one page of 4 KiB, and the processor would read none of them ahead. */
#define AHEAD 512 /* bytes that are asked for before they are needed */

typedef struct {
    Rows rows;
    const uint16_t *weight; /* [O, I] */
    const uint16_t *x;      /* [R, I] */
    const uint16_t *bias;   /* [O] or null */
    uint16_t *out;          /* [R, O] */
    int64_t outputs, inputs;
} Plain;

/* Some rows, `output` and those after it that are APART. Each lane has a sum in order of the inputs,
   then the lanes are added: alike for each row and output. */
static inline __attribute__((always_inline)) void tile(
    const Plain *task, int64_t row, const int rows, int64_t output, const int outputs)
{
    int64_t vectors = task->inputs / 2 / LANES;
    const words *x = (const words *)task->x + row * vectors;
    const words *weight = (const words *)task->weight + output * vectors;
    floats sum[ROWS][SOME] = {0};
    for (int64_t v = 0; v < vectors; v++)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            const words *pairs = weight + o * APART * vectors + v;
            __builtin_prefetch((const char *)pairs + AHEAD);
            floats odds = odd(*pairs), evens = even(*pairs);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                sum[r][o] = plus_product(sum[r][o], odd(x[r * vectors + v]), odds);
                sum[r][o] = plus_product(sum[r][o], even(x[r * vectors + v]), evens);
            }
        }
    for (int o = 0; o < outputs; o++) {
        int64_t place = output + o * APART;
        float bias = task->bias ? wide(task->bias[place]) : 0;
        for (int r = 0; r < rows; r++)
            task->out[(row + r) * task->outputs + place] = narrow(sum_of(sum[r][o]) + bias);
    }
}

static inline __attribute__((always_inline)) void all_rows(
    const Plain *task, int64_t output, const int outputs)
{
    int64_t row = task->rows.first;
    for (; row + ROWS <= task->rows.end; row += ROWS)
        tile(task, row, ROWS, output, outputs);
    for (; row < task->rows.end; row++)
        tile(task, row, 1, output, outputs);
}

void plain_product(Plain *task)
{
    int64_t piece;
    while ((piece = next_piece(&task->rows.next)) * BLOCK < task->outputs) {
        int64_t output = piece * BLOCK, left = task->outputs - output;
        if (left >= BLOCK)
            for (int64_t next = output; next < output + APART; next++)
                all_rows(task, next, SOME);
        else
            for (; output < task->outputs; output++)
                all_rows(task, output, 1);
    }
}
